"""A log as it was known at some time: what `as_of` means."""

from datetime import datetime
from pathlib import Path

import polars as pl

from components.errors import InputError
from components.interactions.log_folder import Log, write_log


def write_known_by(log: Log, as_of: datetime, out: Path) -> Log:
    """Write the requests whose feedback was known by a time; sessions that lose requests end there, censored.

    A session is kept up to its first request that was not known yet. Requests without times are kept, for validation to
    judge, unless the log has none.

    Raises:
        InputError: the log has no times.
        ContractError: nothing was known by then.
    """
    if not log.manifest.has_times:
        raise InputError(
            f"as_of = {as_of.isoformat()}: source {log.manifest.source!r} has no times here, so what was known then "
            "cannot be told; leave as_of out"
        )
    candidates = log.candidate_table()
    parts = (_known(part, as_of) for part in log.parts())
    return write_log(out, log.manifest, parts, log.items(), candidates if candidates.height else None)


def _known(part: pl.DataFrame, as_of: datetime) -> pl.DataFrame:
    late = (pl.max_horizontal("timestamp", "available_at") > as_of).fill_null(False)
    ordered = part.sort("session_id", "step")
    kept = ordered.with_columns(_late=late.cum_max().over("session_id")).filter(~pl.col("_late")).drop("_late")
    cut = kept.join(ordered.filter(late).select("session_id").unique(), on="session_id", how="semi")
    last = pl.col("step") == pl.col("step").max().over("session_id")
    censored = pl.col("session_id").is_in(cut["session_id"].unique().implode()) & last
    return kept.with_columns(session_end=pl.when(censored).then(pl.lit("censored")).otherwise("session_end"))
