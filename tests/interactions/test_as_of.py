"""What a log looked like at an earlier time."""

from datetime import timedelta

import polars as pl
import pytest

from components.errors import ContractError
from components.interactions.as_of import write_known_by
from components.interactions.log_folder import Log


def test_only_what_was_known_is_kept_and_cut_sessions_are_censored(storefront_log: Log, tmp_path):
    rows = storefront_log.scan().collect()
    as_of = rows["available_at"].sort()[rows.height // 2]
    known = write_known_by(storefront_log, as_of, tmp_path / "known").scan().collect()
    assert known["available_at"].max() <= as_of
    assert known.height == rows.filter(pl.col("available_at") <= as_of).height
    cut = rows.filter(pl.col("available_at") > as_of)["session_id"].unique()
    ends = known.group_by("session_id").agg(pl.col("session_end").sort_by("step").last())
    assert set(ends.filter(pl.col("session_id").is_in(cut.implode()))["session_end"]) <= {"censored"}
    whole = rows.group_by("session_id").agg(pl.col("session_end").sort_by("step").last())
    same = ends.filter(~pl.col("session_id").is_in(cut.implode())).join(whole, on="session_id", suffix="_before")
    assert same["session_end"].equals(same["session_end_before"], check_names=False)


def test_a_time_after_the_log_changes_nothing(storefront_log: Log, tmp_path):
    late = storefront_log.scan().collect()["available_at"].max() + timedelta(days=1)
    known = write_known_by(storefront_log, late, tmp_path / "known")
    assert known.manifest.content_digest == storefront_log.manifest.content_digest


def test_a_time_before_the_log_is_refused(storefront_log: Log, tmp_path):
    early = storefront_log.scan().collect()["timestamp"].min() - timedelta(days=1)
    with pytest.raises(ContractError, match="holds no requests"):
        write_known_by(storefront_log, early, tmp_path / "known")
