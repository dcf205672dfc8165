"""Validation of a log: bad rows put aside with their reasons, good ones accepted, or the run stopped with the evidence.

What is checked, and what happens then, stands in `docs/validation.md`.
"""

import shutil
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import polars.selectors as cs
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from components.errors import ContractError, InputError, TooManyBadRowsError
from components.interactions.contract import CANDIDATE_SCHEMA, OF_REQUEST, Evidence, Manifest
from components.interactions.log_folder import Log, content_digest, copy_log, write_log
from components.validation.data_docs import Expectation, ExpectationResult, Severity, assert_and_render
from components.validation.profile import ROUNDING, item_profile, profile, sum_part
from components.validation.rules import SESSION_OF_A_BAD_ROW, Lookups, Rule, judge, look_up, row_rules
from components.validation.steadiness import quarter_ends

_SEEN_LENGTH = 160
#: Log_probs that a policy truly had lie this many nats below a random draw's, over the whole log, once in e^10 logs.
_CHANCE_NATS = 10.0
#: Share of effective requests from which on the mean importance weight of a random draw is no matter of luck: sharp
#: Plackett-Luce policies, simulated up to utilities of standard deviation 8, stayed below 0.13 where the mean missed 1.
_KNOWN_MEAN = 0.2


class ValidationConfig(BaseModel):
    """How much may be wrong with a log before nothing may be trained on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_quarantined_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Largest share of rows that may break a rule themselves; above it the run stops.",
    )
    min_requests: int = Field(default=100, ge=1, description="Fewest accepted requests that are worth training on.")
    min_sessions: int = Field(
        default=2, ge=2, description="Fewest sessions a log must hold; one alone cannot be split for training and test."
    )
    max_null_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Largest share of slates whose feedback is unknown, for each feedback that the reward weighs.",
    )
    min_users: int = Field(
        default=2, ge=2, description="Fewest users; with one alone there is neither a holdout of users nor an interval."
    )
    earliest: AwareDatetime = Field(
        default=datetime(1990, 1, 1, tzinfo=UTC),
        description="Earliest credible time, with its zone; one before it was read in a wrong unit.",
    )
    latest: AwareDatetime = Field(
        default=datetime(2100, 1, 1, tzinfo=UTC),
        description="Latest credible time, with its zone; what was not known yet is the matter of `as_of`.",
    )
    max_unknown_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Largest share of a categorical feature's values that the manifest's vocabulary may not have.",
    )
    min_steadiness: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Smallest mean of feedback, or of a feature, in a quarter of the log's requests by time, over the "
        "largest.",
    )
    max_propensity_factor: float = Field(
        default=10.0,
        ge=1,
        description="Largest factor by which the mean importance weight of slates drawn at random may miss 1.",
    )

    @model_validator(mode="after")
    def _earliest_before_latest(self) -> "ValidationConfig":
        if self.earliest >= self.latest:
            raise ValueError(
                f"earliest = {self.earliest.isoformat()}, latest = {self.latest.isoformat()}: expected it to be later"
            )
        return self


class BadRow(BaseModel):
    """One row that breaks a rule, as an example of all that do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: str
    request_id: str
    seen: str = Field(description="The columns that the rule looks at and their values, cut where they are long.")
    expected: str


class DataChecks(BaseModel):
    """The evidence that validation leaves; the gate and the report read it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_requests: int = Field(description="Rows read, the quarantined ones included; so are the three counts below.")
    n_sessions: int
    n_users: int
    n_items: int = Field(description="Rows of the item table.")
    n_quarantined: int = Field(description="Rows put aside: bad ones and the rest of their sessions.")
    quarantine_reasons: dict[str, int] = Field(description="Rule -> rows that break it; a row may break several.")
    examples: tuple[BadRow, ...] = Field(description="The first bad row of each broken rule.")
    expectations: tuple[ExpectationResult, ...] = Field(description="What the log as a whole was expected to be.")
    profile: dict[str, float] = Field(description="Numbers over the accepted rows; what a log cannot tell is absent.")
    passed: bool = Field(description="Whether every expectation of severity `error` is met.")

    @property
    def n_bad(self) -> int:
        """Rows that break a rule themselves; the configured share counts these."""
        return self.n_quarantined - self.quarantine_reasons.get(SESSION_OF_A_BAD_ROW, 0)


@dataclass(frozen=True)
class _JudgedLog:
    """What judging all parts of a log came to."""

    n_requests: int
    n_quarantined: int
    n_accepted_sessions: int
    condemned_sessions: pl.Series
    reasons: dict[str, int]
    examples: tuple[BadRow, ...]
    profile: dict[str, float]

    @property
    def n_bad(self) -> int:
        return self.n_quarantined - self.reasons.get(SESSION_OF_A_BAD_ROW, 0)


def validate(log: Log, config: ValidationConfig, out: Path, as_of: datetime | None = None) -> DataChecks:
    """Check a log, write its accepted rows as a log of their own, and return the evidence.

    Writes into `out`: `quarantine/rows.parquet` (the log's columns and `reasons`), `data_docs/index.html`,
    `checks.json` and, if the log passes, `log/`. The first three are there too when the log does not pass, so that a
    user can look at what is wrong with it.

    Args:
        log: as opened by `open_log`.
        config: the limits.
        out: an existing, empty folder.
        as_of: a time with a time zone; a row with anything later is bad. None: no row is too late.

    Raises:
        TooManyBadRowsError: more rows are bad than `max_quarantined_share` allows.
        InputError: the log as a whole fails an expectation of severity `error`, or `as_of` has no time zone.
        ContractError: one of the log's files cannot be read.
    """
    if as_of is not None and as_of.tzinfo is None:
        raise InputError(f"as_of: {as_of.isoformat()} has no time zone; expected one, such as +00:00")
    table = _candidate_table(log)
    with _readable(log.path / "items.parquet"):
        items = log.items()
    try:
        lookups = look_up(log)
        quarters = quarter_ends(log)
        n_users = log.scan().select(pl.col("user_id").n_unique()).collect(engine="streaming").item()
    except (pl.exceptions.PolarsError, OSError):
        # A scan over all parts does not say which of them it failed on; reading them one by one does.
        deque(_parts(log), maxlen=0)
        raise
    rules = row_rules(log.manifest, lookups, as_of, (config.earliest, config.latest))
    try:
        judged = _judge_parts(log, rules, lookups, quarters, out / "quarantine")
    except ContractError:
        # A quarantine of the parts before the unreadable one would pass for the whole log's.
        shutil.rmtree(out / "quarantine")
        raise
    log_profile = judged.profile | item_profile(items, log.manifest)
    n_rows = max(judged.n_requests, 1)
    metrics = {
        "accepted_requests": float(judged.n_requests - judged.n_quarantined),
        "accepted_sessions": float(judged.n_accepted_sessions),
        "users": float(n_users),
        "requests_off_manifest": float(abs(judged.n_requests - log.manifest.n_requests)),
        "item_rows_without_own_id": float(items.height - len(lookups.item_ids)),
        "candidate_rows_without_own_digest": float(table.height - lookups.candidate_lists.height),
        "bad_share": judged.n_bad / n_rows,
        **{f"bad_share.{rule.name}": judged.reasons.get(rule.name, 0) / n_rows for rule in rules},
        **log_profile,
    }
    if log.manifest.content_digest:
        metrics["digest_off_manifest"] = float(content_digest(log) != log.manifest.content_digest)
    expectations = [
        *_expectations(log.manifest, config, rules),
        *_feature_expectations(log.manifest, config),
        *_propensity_expectations(log.manifest, metrics, config),
    ]
    expectations = [expectation for expectation in expectations if expectation.metric in metrics]
    results = assert_and_render(expectations, metrics, out / "data_docs")
    failed = [result for result in results if result.severity == "error" and not result.success]
    checks = DataChecks(
        n_requests=judged.n_requests,
        n_sessions=judged.n_accepted_sessions + judged.condemned_sessions.len(),
        n_users=n_users,
        n_items=items.height,
        n_quarantined=judged.n_quarantined,
        quarantine_reasons=judged.reasons,
        examples=judged.examples,
        expectations=results,
        profile=log_profile,
        passed=not failed,
    )
    (out / "checks.json").write_text(checks.model_dump_json(indent=2) + "\n")
    if metrics["bad_share"] > config.max_quarantined_share:
        raise TooManyBadRowsError(_too_many_bad_rows(log, checks, config))
    if failed:
        lines = [
            f"{result.name}: {result.metric} is {result.observed:g}, expected {result.expected}" for result in failed
        ]
        raise InputError("\n".join([f"{log.path}: the log cannot be trained on", *lines]))
    # Writing means digesting every row again; where all are accepted as the manifest has them, the files will do.
    if not judged.n_quarantined and metrics.get("digest_off_manifest") == 0:
        copy_log(log, out / "log")
    else:
        write_log(out / "log", log.manifest, _accepted(log, judged.condemned_sessions), items, table)
    return checks


def _expectations(manifest: Manifest, config: ValidationConfig, rules: tuple[Rule, ...]) -> list[Expectation]:
    limit = config.max_quarantined_share
    expectations = [
        Expectation("Enough requests are accepted", "accepted_requests", minimum=float(config.min_requests)),
        Expectation("Enough sessions are accepted", "accepted_sessions", minimum=float(config.min_sessions)),
        Expectation("Enough users are there", "users", minimum=float(config.min_users)),
        Expectation("The log holds as many requests as its manifest says", "requests_off_manifest", maximum=0.0),
        Expectation(
            "The log's rows and tables are those of its manifest's content_digest",
            "digest_off_manifest",
            maximum=0.0,
            severity="warning",
        ),
        Expectation("Each row of the item table has an id of its own", "item_rows_without_own_id", maximum=0.0),
        Expectation(
            "Each row of the candidate table has a digest of its own", "candidate_rows_without_own_digest", maximum=0.0
        ),
        Expectation(
            "No two item ids are the same but for case and the space around them",
            "item_ids_alike",
            maximum=0.0,
            severity="warning",
        ),
        Expectation("Few rows are bad", "bad_share", maximum=limit),
        *(
            Expectation(f"Rows keep {rule.name}: {rule.holds}", f"bad_share.{rule.name}", maximum=limit)
            for rule in rules
        ),
    ]
    if manifest.evidence is Evidence.CLICKS:
        return expectations
    weighed = [name for name in manifest.reward.weights if name != "purchased" or manifest.has_purchases]
    columns = [_column(name) for name in weighed]
    others = [f"signals.{name}" for name in manifest.signals if name not in weighed]
    others += [name for name in ("clicked", "purchased") if name not in weighed and manifest.slate_size]
    return [
        *expectations,
        *(
            Expectation(f"{column} is mostly known", f"null_share.{column}", maximum=config.max_null_share)
            for column in columns
        ),
        *(_steady(column, config, "error") for column in columns),
        *(_steady(column, config, "warning") for column in others),
        Expectation(
            "Some positions are clicked, but not all",
            "click_rate",
            minimum=0.0,
            maximum=1.0,
            strict=True,
            severity="warning",
        ),
        Expectation(
            "The reward differs between requests", "reward_range", minimum=0.0, strict=True, severity="warning"
        ),
    ]


def _feature_expectations(manifest: Manifest, config: ValidationConfig) -> list[Expectation]:
    """What the manifest says of features, held against what the rows and the item table have."""
    context = [f"context.{feature.name}" for feature in manifest.context]
    items = [f"items.{feature.name}" for feature in manifest.item_features]
    signals = [f"request_signals.{name}" for name in manifest.request_signals]
    weighed = [_column(name) for name in manifest.reward.weights]
    return [
        *(
            Expectation(
                f"{name} has values of the manifest's vocabulary",
                f"unknown_share.{name}",
                maximum=config.max_unknown_share,
            )
            for name in (*context, *items)
        ),
        *(
            Expectation(
                f"{name} is known somewhere", f"null_share.{name}", maximum=1.0, strict=True, severity="warning"
            )
            for name in (*context, *items)
        ),
        *(
            Expectation(f"{name} differs", f"range.{name}", minimum=0.0, strict=True, severity="warning")
            for name in (*context, *items)
        ),
        *(_steady(name, config, "warning") for name in (*context, *signals) if name not in weighed),
        *(_steady(f"known.{name}", config, "warning") for name in (*context, *signals)),
    ]


def _propensity_expectations(
    manifest: Manifest, metrics: Mapping[str, float], config: ValidationConfig
) -> list[Expectation]:
    """What no policy's own log_probs could be; see `components.validation.profile` for the two identities."""
    if manifest.evidence is not Evidence.PROPENSITIES:
        return []
    if manifest.action_size:
        return [
            Expectation(
                "action_log_prob is on average not below that of actions drawn at random, which no policy's own is",
                "log_density_over_uniform",
                minimum=-max(ROUNDING, _CHANCE_NATS / max(metrics["accepted_requests"], 1.0)),
            )
        ]
    certain = Expectation(
        "slate_log_prob is not 0 wherever there was a choice, as if every slate had been certain",
        "share_of_certain_slates",
        maximum=1.0,
        strict=True,
    )
    if "mean_uniform_weight" not in metrics:
        return [certain]
    n_uncertain = metrics["share_of_uncertain_slates"] * metrics["accepted_requests"]
    # A sharp policy's mean rests on slates so rare that an honest log may hold none of them: then it is a warning.
    effective = metrics["mean_uniform_weight"] ** 2 / metrics["mean_square_uniform_weight"]
    factor = config.max_propensity_factor
    return [
        certain,
        Expectation(
            "slate_log_prob is not the same for all slates, unless they were drawn at random",
            "equal_log_probs_off_uniform",
            maximum=0.0,
        ),
        Expectation(
            "slate_log_prob is on average not below that of slates drawn at random, which no policy's own is",
            "log_prob_over_uniform",
            minimum=-max(ROUNDING, _CHANCE_NATS / n_uncertain),
        ),
        Expectation(
            "slate_log_prob is the natural log of the ordered slate's probability: the importance weights of slates "
            "drawn at random average to 1",
            "mean_uniform_weight",
            minimum=1.0 / factor,
            maximum=factor,
            severity="error" if effective >= _KNOWN_MEAN else "warning",
        ),
    ]


def _steady(name: str, config: ValidationConfig, severity: Severity) -> Expectation:
    return Expectation(
        f"{name} keeps its scale from one quarter of the log to another",
        f"steadiness.{name}",
        minimum=config.min_steadiness,
        severity=severity,
    )


def _column(feedback: str) -> str:
    """The column of what a reward names."""
    if feedback.startswith(OF_REQUEST):
        return f"request_signals.{feedback.removeprefix(OF_REQUEST)}"
    return feedback if feedback in ("clicked", "purchased") else f"signals.{feedback}"


def _judge_parts(
    log: Log, rules: tuple[Rule, ...], lookups: Lookups, quarters: tuple[float, ...], quarantine: Path
) -> _JudgedLog:
    """Judge part by part; the quarantined rows go into `rows.parquet` of the new folder `quarantine`."""
    n_requests = n_quarantined = n_accepted_sessions = 0
    reasons: Counter[str] = Counter()
    examples: dict[str, BadRow] = {}
    condemned: list[pl.Series] = []
    sums: list[pl.DataFrame] = []
    quarantine.mkdir()
    empty = pl.DataFrame(schema={**log.manifest.schema(), "reasons": pl.List(pl.String)})
    with pq.ParquetWriter(quarantine / "rows.parquet", _to_arrow(empty).schema, compression="zstd") as writer:
        for part in _parts(log):
            judged = judge(part, rules, lookups)
            n_requests += part.height
            n_accepted_sessions += judged.accepted["session_id"].n_unique()
            sums.append(sum_part(judged.accepted, log.manifest, quarters))
            if judged.quarantined.height:
                writer.write_table(_to_arrow(judged.quarantined))
                n_quarantined += judged.quarantined.height
                reasons.update(judged.quarantined["reasons"].explode().to_list())
                condemned.append(judged.quarantined["session_id"].unique())
                examples = _examples(judged.quarantined, rules) | examples
    return _JudgedLog(
        n_requests=n_requests,
        n_quarantined=n_quarantined,
        n_accepted_sessions=n_accepted_sessions,
        condemned_sessions=pl.concat(condemned).unique() if condemned else pl.Series(dtype=pl.String),
        reasons=dict(reasons.most_common()),
        examples=tuple(examples[name] for name in reasons if name in examples),
        profile=profile(sums, log.manifest, quarters),
    )


def _examples(quarantined: pl.DataFrame, rules: tuple[Rule, ...]) -> dict[str, BadRow]:
    examples = {}
    # Times as text: those of a wrong unit may lie beyond the year 9999, where Python's own end.
    quarantined = quarantined.with_columns(cs.datetime().cast(pl.String))
    for rule in rules:
        rows = quarantined.filter(pl.col("reasons").list.contains(rule.name)).head(1)
        for row in rows.iter_rows(named=True):
            seen = ", ".join(f"{column} = {row[column]!r:.{_SEEN_LENGTH}}" for column in rule.columns)
            examples[rule.name] = BadRow(
                rule=rule.name, request_id=str(row["request_id"]), seen=seen, expected=rule.holds
            )
    return examples


def _too_many_bad_rows(log: Log, checks: DataChecks, config: ValidationConfig) -> str:
    most_common = sorted(checks.examples, key=lambda example: -checks.quarantine_reasons[example.rule])[:3]
    return "\n".join(
        [
            f"{log.path}: {checks.n_bad} of {checks.n_requests} rows ({checks.n_bad / checks.n_requests:.2%}) are bad; "
            f"max_quarantined_share allows {config.max_quarantined_share:.2%}. Nothing may be trained on this log. "
            "The most frequent reasons:",
            *(
                f"- {example.rule}: {checks.quarantine_reasons[example.rule]} rows, such as request "
                f"{example.request_id!r}: {example.seen}; expected {example.expected}"
                for example in most_common
            ),
        ]
    )


def _candidate_table(log: Log) -> pl.DataFrame:
    path = log.path / "candidates.parquet"
    with _readable(path):
        table = log.candidate_table()
    if table.schema != CANDIDATE_SCHEMA:
        raise ContractError(f"{path}: has columns {dict(table.schema)}; expected {dict(CANDIDATE_SCHEMA)}")
    return table


def _parts(log: Log) -> Iterator[pl.DataFrame]:
    for path in log.part_paths:
        with _readable(path):
            part = pl.read_parquet(path)
        yield part


def _accepted(log: Log, condemned_sessions: pl.Series) -> Iterator[pl.DataFrame]:
    """The parts without the condemned sessions, read again: whether the log passes is known after the first reading."""
    for part in _parts(log):
        accepted = part.filter(~pl.col("session_id").is_in(condemned_sessions.implode()))
        if accepted.height:
            yield accepted


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ContractError(f"{path}: not readable as Parquet: {str(error).splitlines()[0]}") from None


def _to_arrow(rows: pl.DataFrame) -> pa.Table:
    return rows.to_arrow(compat_level=pl.CompatLevel.oldest())
