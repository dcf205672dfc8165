"""The mapping file of the `table` importer: which column of a user's file holds what of the contract."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from components.errors import InputError
from components.interactions.contract import Evidence, Name, RatioAssumption, Reward
from components.interactions.importers._cells import TimestampFormat


class LogFacts(BaseModel):
    """`[log]`: what holds for the whole log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str | None = Field(
        default=None, description="The data file, relative to the source's folder; not needed if the path is the file."
    )
    evidence: Evidence = Field(description="How slates were chosen: propensities, slates or clicks.")
    responses: Literal["per_position", "choice"] = Field(
        description="Whether each position is answered on its own, or one item of the slate (or none) is chosen."
    )
    ratio_assumption: RatioAssumption = Field(
        default=RatioAssumption.FULL_SLATE, description="Which importance ratio is valid; full_slate assumes least."
    )
    list_separator: str = Field(default="|", min_length=1, description="What separates the elements of a list in text.")
    timestamp_format: TimestampFormat = Field(
        default="iso", description="ISO 8601 (UTC where no offset is given), or the unit of a Unix time."
    )
    first_step: int = Field(default=0, description="Number that the `step` column gives a session's first request.")
    event_type: str = Field(default="view", min_length=1, description="Type of events without an event_types column.")
    session_end: Literal["left", "censored"] = Field(
        default="left", description="What a session's last row means where no session_end column says it."
    )
    idle_minutes: int = Field(
        default=30, ge=0, description="A session seen this shortly before the log's end is censored, not left."
    )
    policy: str = Field(
        default="unknown", min_length=1, description="Version of the logging policy, where no column gives it."
    )


class Columns(BaseModel):
    """`[columns]`: which column of the file holds what of the contract. Only `session_id` must be there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    session_id: str = Field(description="Visit.")
    request_id: str | None = Field(default=None, description="Unique id of the row; by default session:step.")
    user_id: str | None = Field(default=None, description="User; by default the session stands in.")
    step: str | None = Field(
        default=None, description="Position in the session; by default time order, then file order."
    )
    timestamp: str | None = Field(default=None, description="When the slate was shown.")
    available_at: str | None = Field(default=None, description="When the feedback was known; by default `timestamp`.")
    candidates: str | None = Field(default=None, description="List of the items that might have been shown.")
    slate: str | None = Field(default=None, description="List of the items shown, in display order.")
    slate_log_prob: str | None = Field(default=None, description="Natural log of the probability of the ordered slate.")
    slate_propensity: str | None = Field(default=None, description="The same as a probability; its log is taken.")
    position_log_probs: str | None = Field(
        default=None,
        description="List of the log_probs per position, each given those above it; they sum to the slate's.",
    )
    exposed: str | None = Field(default=None, description="List of 0/1 per position: was it in view.")
    clicked: str | None = Field(default=None, description="List of 0/1 per position.")
    purchased: str | None = Field(default=None, description="List of 0/1 per position.")
    session_end: str | None = Field(default=None, description="left, censored or empty.")
    events: str | None = Field(default=None, description="List of items the user acted on since the last request.")
    event_types: str | None = Field(default=None, description="List of their types, as long as `events`.")
    policy: str | None = Field(default=None, description="Version of the logging policy.")
    arm: str | None = Field(default=None, description="Side of an A/B comparison.")
    experiment: str | None = Field(default=None, description="Name of the A/B comparison.")


class MappedFeature(BaseModel):
    """One feature: its column in the file and its kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    column: str = Field(description="Column of the file.")
    kind: Literal["numeric", "categorical"] = Field(description="A number, or one of a vocabulary of texts.")


class Items(BaseModel):
    """`[items]`: the catalog. Without it, the items are those that the log names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(description="The catalog's file, relative to the source's folder.")
    item_id: str = Field(description="Column of the item's id.")
    features: dict[Name, MappedFeature] = Field(default={}, description="Item features by name.")


class TableMapping(BaseModel):
    """The mapping file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    log: LogFacts
    columns: Columns
    context: dict[Name, MappedFeature] = Field(default={}, description="Features of a request by name.")
    signals: dict[Name, str] = Field(default={}, description="Further feedback per position: name and list column.")
    request_signals: dict[Name, str] = Field(default={}, description="Feedback on the whole request: name and column.")
    items: Items | None = Field(default=None, description="The catalog; null takes the items from the log.")
    reward: Reward | None = Field(
        default=None, description="Weights of the feedback; by default 1 for clicked and 3 for purchased, where mapped."
    )

    @model_validator(mode="after")
    def _columns_fit_evidence(self) -> "TableMapping":
        columns, evidence = self.columns, self.log.evidence
        with_propensity = [key for key in ("slate_log_prob", "slate_propensity") if getattr(columns, key)]
        on_slate = [
            key
            for key in (
                "candidates",
                "slate",
                *with_propensity,
                "position_log_probs",
                "exposed",
                "clicked",
                "purchased",
            )
            if getattr(columns, key)
        ]
        if evidence is Evidence.PROPENSITIES and len(with_propensity) != 1:
            raise ValueError(
                f"columns: {with_propensity or 'neither'} mapped; evidence 'propensities' needs slate_log_prob or "
                "slate_propensity, and only one of them"
            )
        if evidence is Evidence.PROPENSITIES and not columns.candidates:
            raise ValueError(
                "columns.candidates: missing; evidence 'propensities' needs the items that each slate was chosen from, "
                "as no other policy can be asked for its log_prob without them"
            )
        if evidence is Evidence.SLATES and (with_propensity or columns.position_log_probs):
            raise ValueError(
                f"columns.{(*with_propensity, 'position_log_probs')[0]}: mapped, but evidence 'slates' has none; "
                "say 'propensities'"
            )
        if evidence is Evidence.CLICKS:
            if on_slate or self.signals:
                named = f"columns.{on_slate[0]}" if on_slate else "signals"
                raise ValueError(f"{named}: mapped, but evidence 'clicks' means that there are no slates")
            if not columns.events:
                raise ValueError("columns.events: missing; evidence 'clicks' needs the items that users acted on")
        elif not columns.slate:
            raise ValueError(f"columns.slate: missing; evidence {evidence.value!r} needs the items shown")
        elif not columns.clicked:
            raise ValueError("columns.clicked: missing; a log with slates needs the clicks that the user model learns")
        if columns.event_types and not columns.events:
            raise ValueError("columns.event_types: mapped without columns.events")
        return self


def read_mapping(path: Path) -> TableMapping:
    """The mapping in a TOML file.

    Raises:
        InputError: the file is missing or no TOML, or a key is unknown, missing or has a wrong value.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected the mapping of the table's columns") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as TOML: {error}") from None
    try:
        return TableMapping.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            allowed = sorted(_table_at(first["loc"][:-1]).model_fields)
            raise InputError(f"{path}: {key}: unknown key; the keys here are {allowed}") from None
        if first["type"] == "missing":
            raise InputError(f"{path}: {key}: missing") from None
        if not key:  # Our own validators name the key themselves.
            raise InputError(f"{path}: {first['msg'].removeprefix('Value error, ')}") from None
        raise InputError(f"{path}: {key}: {first['msg']} (seen: {first['input']!r:.120})") from None


def _table_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    tables: Mapping[tuple[int | str, ...], type[BaseModel]] = {
        (): TableMapping,
        ("log",): LogFacts,
        ("columns",): Columns,
        ("items",): Items,
        ("reward",): Reward,
    }
    return tables.get(location, MappedFeature)
