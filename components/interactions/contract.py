"""The data contract: one row is a request, one folder is a log, and its manifest says what the rows mean.

Whatever learns or judges reads this and nothing else, so a source is finished when its log keeps the contract.

===================  ============================  =====================================================================
column               type                          meaning
===================  ============================  =====================================================================
loop                 string                        one recommender with its own log, champion and schedule
request_id           string                        unique in the log
session_id           string                        one visit of one user
user_id              string                        keyed hash where it came from an endpoint
step                 int32                         position of the request in its session, from 0
timestamp            datetime[us, UTC], nullable   when the slate was shown
available_at         datetime[us, UTC], nullable   when its feedback was known
candidates           list[string], nullable        items that might have been shown, written out
candidates_digest    string, nullable              or a key into the log's candidate table
slate                list[string], nullable        items shown, in display order; null where a log has no slates
action               list[float32], nullable       ranking weights or another continuous action, in [-1, 1]
slate_log_prob       float64, nullable             of the ordered slate under the logging policy (given the weights)
position_log_probs   list[float64], nullable       of each position given those above it; they sum to slate_log_prob
action_log_prob      float64, nullable             log-density of `action` under the logging policy
exposed              list[bool], nullable          per position: was it in view
clicked              list[bool], nullable          per position; null = unknown, false = observed and none
purchased            list[bool], nullable          per position; null = unknown, false = observed and none
signals.NAME         list[float32], nullable       per position; one column for each of the manifest's signals
request_signals      struct of float32             signals of the whole request; present when the manifest names any
session_end          "left", "censored" or null    how the session ended at this request; null before its end
events               list of (type, item_id)       what the user did on their own since the last request, in order
context              struct of features            present when the manifest names any
policy               string                        version of the logging policy
arm, experiment      string, nullable              where the logging policy stood
===================  ============================  =====================================================================

Version 2 added `position_log_probs`. Logs of version 1 are read as they are: they lack it, which says what null does.

Logs of actions (`action_size` above 0) have no slates: what was chosen is the vector `action`, and the reward weighs
request signals. They have no version of their own, since their rows have no column that others lack, and a program that
does not know them cannot misread them: it refuses a manifest with a key that it does not know.
"""

from enum import StrEnum
from typing import Annotated, Literal, Self

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, model_validator

CONTRACT_VERSION = 2
#: Versions that are read: each adds nullable columns to the one before, and a log keeps the one that it was written in.
READ_VERSIONS = (1, CONTRACT_VERSION)
#: How far position_log_probs may be from summing to slate_log_prob, in nats and as a share of it: sums of float32.
SUM_TOLERANCE = 1e-4

TIMESTAMP = pl.Datetime("us", "UTC")
EVENTS = pl.List(pl.Struct({"type": pl.String, "item_id": pl.String}))
SESSION_ENDS = ("left", "censored")
#: Rows in this order are canonical: sessions stay together and their requests are consecutive.
ROW_ORDER = ("session_id", "step", "request_id")

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]


class Evidence(StrEnum):
    """What a log knows about how its slates were chosen; decides what can be estimated from it."""

    PROPENSITIES = "propensities"
    """Slates with the log_prob under which they were shown."""
    SLATES = "slates"
    """Slates were shown, but their log_prob is unknown."""
    CLICKS = "clicks"
    """No slates at all: only what users did."""


class RatioAssumption(StrEnum):
    """Which importance ratio is valid for a log or an environment."""

    FULL_SLATE = "full_slate"
    """Responses may depend on the whole slate: only the ratio of the whole slate is valid."""
    CASCADE = "cascade"
    """Responses at a position depend on that position and those above it."""


class Feature(BaseModel):
    """One named feature of a request's context or of an item."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    kind: Literal["numeric", "categorical"]
    values: tuple[str, ...] = Field(
        default=(), description="Vocabulary of a categorical feature; other values become the unknown bucket."
    )

    @property
    def dtype(self) -> pl.DataType:
        """The column's polars type."""
        return pl.Float32() if self.kind == "numeric" else pl.String()


#: Whether each position is answered on its own, or one item of the slate (or none) is chosen.
Responses = Literal["per_position", "choice"]


#: What stands before a request signal's name in a reward's weights, where a log has no positions.
OF_REQUEST = "request."


class Reward(BaseModel):
    """One number per request: sum over positions of the weighted feedback, `Σ_k Σ_signal weight · signal_k`.

    Where a log has actions and no slates there are no positions: `Σ_signal weight · signal` of the request's signals.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name = "weighted-feedback"
    version: int = Field(default=1, ge=1)
    weights: dict[str, float] = Field(
        default={"clicked": 1.0, "purchased": 3.0},
        description="Weight of `clicked`, `purchased` or a signal's name in the reward of one position; in a log of "
        "actions, weight of `request.NAME` for the request signal NAME.",
    )


class Manifest(BaseModel):
    """What a log's rows mean. Written last, so a folder with a manifest is a whole log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contract_version: int = CONTRACT_VERSION
    loop: Name
    source: Name = Field(description="Importer or environment that wrote the log.")
    evidence: Evidence
    ratio_assumption: RatioAssumption = Field(description="Which importance ratio is valid for this log.")
    responses: Responses = Field(
        description="Whether each position is answered on its own, or one item of the slate (or none) is chosen."
    )
    slate_size: int = Field(ge=0, description="Longest slate K; 0 where there are no slates.")
    action_size: int = Field(
        default=0,
        ge=0,
        # Manifests of slates stay as they were, for programs that know no actions.
        exclude_if=lambda size: size == 0,
        description="Numbers of an action; 0 where there are no actions. A log has slates or actions, not both.",
    )
    has_users: bool = Field(default=True, description="False where a session had to stand in for its user.")
    has_times: bool = Field(default=True, description="False where the source has no times: `timestamp` is null.")
    has_purchases: bool = Field(default=True, description="False where purchases were not observed.")
    context: tuple[Feature, ...] = ()
    item_features: tuple[Feature, ...] = ()
    signals: tuple[Name, ...] = ()
    request_signals: tuple[Name, ...] = ()
    reward: Reward = Reward()
    limits: tuple[str, ...] = Field(
        default=(), description="What this log cannot tell, in sentences that the report prints."
    )
    n_requests: int = Field(default=0, ge=0)
    content_digest: str = Field(default="", description="Digest of the canonical rows, independent of their files.")

    @model_validator(mode="after")
    def _known_reward_signals(self) -> Self:
        known = {"clicked", "purchased", *self.signals}
        if self.action_size:
            known = {f"{OF_REQUEST}{name}" for name in self.request_signals}
        if unknown := sorted(set(self.reward.weights) - known):
            raise ValueError(f"reward.weights: {unknown} are no signals of this log; it has {sorted(known)}")
        if self.action_size and (self.slate_size or self.evidence is not Evidence.PROPENSITIES):
            raise ValueError(
                f"action_size: {self.action_size} does not fit slate_size {self.slate_size} and evidence "
                f"{self.evidence.value!r}; a log of actions has no slates, and the log-density of each action"
            )
        if not self.action_size and (self.slate_size == 0) != (self.evidence is Evidence.CLICKS):
            raise ValueError(
                f"slate_size: {self.slate_size} does not fit evidence {self.evidence.value!r}; "
                "0 is for 'clicks', and only for it"
            )
        return self

    @property
    def is_cascade(self) -> bool:
        """Whether each position is answered on its own, and what is shown below it makes no difference."""
        return self.responses == "per_position" and self.ratio_assumption is RatioAssumption.CASCADE

    def schema(self) -> pl.Schema:  # type: ignore[override]  # pydantic 1's deprecated name for model_json_schema
        """Columns of the log's rows and their types, in order."""
        columns: dict[str, pl.DataType] = {
            "loop": pl.String(),
            "request_id": pl.String(),
            "session_id": pl.String(),
            "user_id": pl.String(),
            "step": pl.Int32(),
            "timestamp": TIMESTAMP,
            "available_at": TIMESTAMP,
            "candidates": pl.List(pl.String),
            "candidates_digest": pl.String(),
            "slate": pl.List(pl.String),
            "action": pl.List(pl.Float32),
            "slate_log_prob": pl.Float64(),
            **({"position_log_probs": pl.List(pl.Float64)} if self.contract_version > 1 else {}),
            "action_log_prob": pl.Float64(),
            "exposed": pl.List(pl.Boolean),
            "clicked": pl.List(pl.Boolean),
            "purchased": pl.List(pl.Boolean),
        }
        columns |= {f"signals.{name}": pl.List(pl.Float32) for name in self.signals}
        if self.request_signals:
            columns["request_signals"] = pl.Struct({name: pl.Float32 for name in self.request_signals})
        columns |= {"session_end": pl.String(), "events": EVENTS}
        if self.context:
            columns["context"] = pl.Struct({feature.name: feature.dtype for feature in self.context})
        columns |= {"policy": pl.String(), "arm": pl.String(), "experiment": pl.String()}
        return pl.Schema(columns)

    def item_schema(self) -> pl.Schema:
        """Columns of the log's item table and their types, in order."""
        return pl.Schema({"item_id": pl.String()} | {feature.name: feature.dtype for feature in self.item_features})


CANDIDATE_SCHEMA = pl.Schema({"candidates_digest": pl.String(), "candidates": pl.List(pl.String)})


def reward_per_position(manifest: Manifest) -> pl.Expr:
    """Reward of each position of each row: a list[float64] column named `reward`, unknown feedback counted as none.

    Null only where no list of feedback is known at all.
    """
    terms = [
        pl.col(name if name in ("clicked", "purchased") else f"signals.{name}").list.eval(
            pl.element().cast(pl.Float64).fill_null(0.0) * weight
        )
        for name, weight in manifest.reward.weights.items()
    ]
    # A null list would make the whole sum null: clicks count also where purchases are unknown.
    none = pl.coalesce(terms) * 0.0
    total = pl.coalesce(terms[0], none)
    for term in terms[1:]:
        total = total + pl.coalesce(term, none)
    return total.alias("reward")


def request_reward(manifest: Manifest) -> pl.Expr:
    """Reward of each row as float64, unknown feedback counted as none; null only where nothing of it is known."""
    if not manifest.action_size:
        return reward_per_position(manifest).list.sum()
    terms = {
        name: pl.col("request_signals").struct.field(name.removeprefix(OF_REQUEST)).cast(pl.Float64)
        for name in manifest.reward.weights
    }
    known = pl.any_horizontal(term.is_not_null() for term in terms.values())
    total = pl.sum_horizontal(term * manifest.reward.weights[name] for name, term in terms.items())
    return pl.when(known).then(total).alias("reward")
