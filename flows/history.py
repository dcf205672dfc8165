"""A loop's past decisions, from the folders that its runs left."""

from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from flows.numbers import kept_figure
from flows.run_folder import past_runs, read_lineage, read_record


class PastDecision(BaseModel):
    """One run's decision with the figures that it rests on, as text: earlier versions' records have other fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    started: datetime
    source: str
    outcome: str
    estimate: str = Field(description="The gating estimate with its interval; or that there is none.")
    difference: str = Field(
        description="Challenger minus control in the A/B, with its interval; or that there is none."
    )
    policy_tag: str = Field(description="Tag of the challenger in the model store; or that it was not packaged.")


def past_decisions(runs: Path, loop: str) -> list[PastDecision]:
    """The loop's runs in a folder, newest first.

    Raises:
        InputError: a run's record is damaged.
    """
    return [
        _past_decision(runs / past.run, past.started, past.source, past.outcome)
        for past in reversed(past_runs(runs))
        if past.loop == loop
    ]


def _past_decision(folder: Path, started: datetime, source: str, outcome: str) -> PastDecision:
    evidence = read_record(folder, "evidence")
    return PastDecision(
        run=folder.name,
        started=started,
        source=source,
        outcome=outcome,
        estimate=kept_figure(evidence.get("gating"), "value", "not identified"),
        difference=kept_figure(evidence.get("ab"), "difference", "no A/B", signed=True),
        policy_tag=read_lineage(folder).get("policy_tag", "unknown") or "not packaged",
    )
