"""A loop's past decisions, from the folders that its runs left."""

from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from flows.numbers import interval, number
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
    policy_tag: str = Field(description="Tag of the challenger in the model store.")


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
        estimate=_with_interval(evidence.get("gating"), "value", "not identified", signed=False),
        difference=_with_interval(evidence.get("ab"), "difference", "no A/B", signed=True),
        policy_tag=read_lineage(folder).get("policy_tag", "unknown"),
    )


def _with_interval(record: dict[str, Any] | None, name: str, otherwise: str, *, signed: bool) -> str:
    if not record or name not in record:
        return otherwise
    bounds = interval(record.get("lower"), record.get("upper"), signed=signed)
    return f"{number(record[name], signed=signed)} ({bounds})"
