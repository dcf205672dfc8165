"""What stages refuse before they spend minutes."""

from pathlib import Path

import pytest

from components.agents.reinforce import ReinforceConfig
from components.errors import InputError
from components.interactions.contract import Evidence, Manifest, RatioAssumption, Reward
from components.interactions.log_folder import Log, write_log
from flows import stages
from flows.config import LoopConfig


def test_a_reward_that_no_world_model_can_earn_is_named(storefront_log: Log, tmp_path: Path) -> None:
    manifest = storefront_log.manifest.model_copy(
        update={"signals": ("watch_time",), "reward": Reward(weights={"clicked": 1.0, "watch_time": 0.1})}
    )
    rows = storefront_log.scan().collect()
    rows = rows.with_columns(rows["clicked"].cast(manifest.schema()["signals.watch_time"]).alias("signals.watch_time"))
    write_log(tmp_path / "split" / "train", manifest, [rows], storefront_log.items())

    with pytest.raises(InputError, match=r"reward\.weights\.watch_time: .* expected weights of clicked and purchased"):
        stages.fit_user_model.compute(
            LoopConfig(), split=tmp_path / "split", out=tmp_path, progress=lambda message, share: None
        )


@pytest.mark.parametrize(
    ("changes", "credit"),
    [
        ({}, "positions"),
        ({"ratio_assumption": RatioAssumption.FULL_SLATE}, "slate"),
        ({"responses": "choice"}, "slate"),
    ],
)
def test_positions_have_credit_of_their_own_where_nothing_below_them_matters(
    storefront_log: Log, changes: dict[str, object], credit: str
) -> None:
    manifest = storefront_log.manifest.model_copy(update=changes)
    assert stages.reinforce_on(manifest, ReinforceConfig()).credit == credit
    assert stages.reinforce_on(manifest, ReinforceConfig(credit="clicks")).credit == "clicks"


def test_where_nothing_was_shown_nothing_pulls(storefront_log: Log) -> None:
    clicks: Manifest = storefront_log.manifest.model_copy(update={"evidence": Evidence.CLICKS})
    assert stages.reinforce_on(clicks, ReinforceConfig()).pull == 0.0
    assert stages.reinforce_on(storefront_log.manifest, ReinforceConfig()) == ReinforceConfig()
