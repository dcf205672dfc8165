"""A sound log of the shop, broken in all the ways that a pipeline breaks logs: what catches each, and with which words.

`docs/validation.md` lists the same corruptions. Each is written to disk as a log and goes through `slateloop validate`.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import Result
from typer.testing import CliRunner

from components.errors import InputError
from components.interactions.contract import CANDIDATE_SCHEMA, Feature, Manifest, Reward
from components.interactions.log_folder import Log, open_log, write_log
from components.interactions.splits import SplitConfig, split_log
from components.validation.rules import SESSION_OF_A_BAD_ROW
from flows.command_line import app

REPOSITORY = Path(__file__).parents[2]
#: The sound log's last feedback is known by then.
AS_OF = datetime(2026, 2, 2, 12, tzinfo=UTC)
MIDDLE = datetime(2026, 1, 19, tzinfo=UTC)
UNREADABLE = "ContractError"

Damage = Callable[[Path], None]


@dataclass(frozen=True)
class Corruption:
    """One way to break the sound log."""

    name: str
    damage: Damage
    """Breaks the log in a folder."""
    caught_by: tuple[str, ...]
    """All rules and expectations that fire."""
    says: str
    """Part of the message."""
    warns: bool = False
    """Whether the log passes with a warning."""
    slow: bool = False
    """Left to the slow tests, since a fast one, perhaps in tests/validation, has the same rule or expectation fire."""


def rewritten(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Damage:
    """Other rows, in a log that its writer finished in order."""

    def damage(folder: Path) -> None:
        log = open_log(folder)
        rows = change(log.scan().collect().sort("session_id", "step"))
        write_log(folder, log.manifest, [rows], log.items(), log.candidate_table())

    return damage


def columns(**expressions: pl.Expr) -> Damage:
    """Other values in some columns; a dot in a column's name is written as two underscores."""
    return rewritten(
        lambda rows: rows.with_columns(value.alias(name.replace("__", ".")) for name, value in expressions.items())
    )


def log_probs(slates: pl.Expr) -> Damage:
    """Other log_probs of slates, in a log that does not have those of positions."""
    return columns(slate_log_prob=slates, position_log_probs=pl.lit(None))


def context(**expressions: pl.Expr) -> Damage:
    return columns(context=pl.col("context").struct.with_fields(**expressions))


def tables(
    items: Callable[[pl.DataFrame], pl.DataFrame] = lambda table: table,
    candidates: Callable[[pl.DataFrame], pl.DataFrame] = lambda table: table,
) -> Damage:
    """Another item table or candidate table."""

    def damage(folder: Path) -> None:
        log = open_log(folder)
        write_log(folder, log.manifest, list(log.parts()), items(log.items()), candidates(log.candidate_table()))

    return damage


def file(name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Damage:
    """Another table in one file, written over the old one by something that knows of no manifest."""

    def damage(folder: Path) -> None:
        change(pl.read_parquet(folder / name)).write_parquet(folder / name)

    return damage


def raw(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Other bytes in one file."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def cut_into_parts(folder: Path) -> None:
    log = open_log(folder)
    rows, opening = log.scan().collect(), pl.col("step") == 0
    write_log(folder, log.manifest, [rows.filter(opening), rows.filter(~opening)], log.items(), log.candidate_table())


def forget_signal(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"signals": [], "reward": {"weights": {"clicked": 1.0}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def remove_parts(folder: Path) -> None:
    for path in (folder / "requests").iterdir():
        path.unlink()


def pick(column: str, values: Callable[[pl.Series], pl.Series]) -> Damage:
    """Only the rows of some sessions or users."""
    return rewritten(lambda rows: rows.filter(pl.col(column).is_in(values(rows[column].unique().sort()).implode())))


def under_two_ids(rows: pl.DataFrame) -> pl.DataFrame:
    """A tenth of the sessions delivered twice, each time with new ids."""
    again = rows.filter(pl.col("session_id").rank("dense") % 10 == 0)
    ids = [pl.format("{}-again", name).alias(name) for name in ("session_id", "request_id")]
    return pl.concat([rows, again.with_columns(ids)])


def one_session(rows: pl.DataFrame) -> pl.DataFrame:
    step = pl.int_range(pl.len(), dtype=pl.Int32)
    end = pl.when(step == pl.len() - 1).then(pl.lit("left"))
    first = [pl.col(name).first() for name in ("session_id", "user_id")]
    return rows.sort("timestamp").with_columns(*first, step=step, session_end=end)


def glued(rows: pl.DataFrame) -> pl.DataFrame:
    """Each two neighbouring sessions under one id, their steps counted on: a timeout that was set too long."""
    pair = (pl.col("session_id").rank("dense") - 1) // 2
    rows = rows.with_columns(session_id=pl.col("session_id").first().over(pair)).sort("session_id", "timestamp")
    return rows.with_columns(step=pl.int_range(pl.len(), dtype=pl.Int32).over("session_id"))


SECOND_ITEM, TIMES = pl.col("slate").list.get(1), ("timestamp", "available_at")
LATE = pl.col("timestamp") >= MIDDLE
LOG_PROB, CLICKED, SLATE = pl.col("slate_log_prob"), pl.col("clicked"), pl.col("slate")
PART = "requests/part-00000.parquet"
NONE = pl.lit([False] * 4, dtype=pl.List(pl.Boolean))
PROPENSITY = "slate_log_prob is the natural log of the ordered slate's probability"


def unix(unit_error: float) -> dict[str, pl.Expr]:
    return {
        name: (pl.col(name).dt.epoch("us") * unit_error).cast(pl.Int64).cast(pl.Datetime("us", "UTC")) for name in TIMES
    }


def by_position(log_prob: pl.Expr) -> pl.Expr:
    return pl.col("position_log_probs").list.eval(log_prob)


def shorter(column: str) -> pl.Expr:
    return pl.col(column).list.head(3)


CORRUPTIONS = (
    # Files that are not what the contract says.
    Corruption("a part cut off", raw(PART, lambda data: data[:1_000]), (UNREADABLE,), "not readable as Parquet"),
    Corruption(
        "zeros in the middle of a part",
        raw(PART, lambda data: data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :]),
        (UNREADABLE,),
        "part-00000.parquet: not readable as Parquet",
    ),
    Corruption("no parts", remove_parts, (UNREADABLE,), "holds no part-*.parquet"),
    Corruption(
        "a column renamed in the rows",
        file(PART, lambda rows: rows.rename({"slate_log_prob": "propensity"})),
        (UNREADABLE,),
        "part-00000.parquet: column 'slate_log_prob' is missing; expected type Float64",
    ),
    Corruption(
        "a column renamed in the item table",
        file("items.parquet", lambda items: items.rename({"price": "list_price"})),
        (UNREADABLE,),
        "items.parquet: column 'price' is missing; expected type Float32",
    ),
    Corruption(
        "a column renamed in the candidate table",
        file("candidates.parquet", lambda table: table.rename({"candidates_digest": "digest"})),
        (UNREADABLE,),
        "candidates.parquet: column 'candidates_digest' is missing",
    ),
    Corruption(
        "a feature renamed in the context",
        file(
            PART, lambda rows: rows.with_columns(pl.col("context").struct.rename_fields(["platform", "segment", "age"]))
        ),
        (UNREADABLE,),
        "column 'context' has type Struct({'platform'",
    ),
    Corruption(
        "a column of another type",
        file(PART, lambda rows: rows.with_columns(pl.col("step").cast(pl.String))),
        (UNREADABLE,),
        "column 'step' has type String; expected Int32",
    ),
    Corruption("a signal that the manifest does not know", forget_signal, (UNREADABLE,), "unexpected column 'signals."),
    Corruption(
        "a manifest of another contract version",
        raw("manifest.json", lambda text: text.replace(b'"contract_version": 2', b'"contract_version": 3')),
        (UNREADABLE,),
        "contract_version is 3; this program reads 1 and 2",
    ),
    Corruption(
        "a manifest with a value of another type",
        raw("manifest.json", lambda text: text.replace(b'"slate_size": 4', b'"slate_size": "four"')),
        (UNREADABLE,),
        "manifest.json: slate_size: Input should be a valid integer",
    ),
    Corruption("a manifest cut off", raw("manifest.json", lambda text: text[:300]), (UNREADABLE,), "manifest.json: "),
    # The log as a whole.
    Corruption(
        "rows lost after writing",
        file(PART, lambda rows: rows.head(rows.height - 10)),
        ("requests_off_manifest", "digest_off_manifest"),
        "requests_off_manifest is 10, expected at most 0",
    ),
    Corruption(
        "rows changed after writing",
        file(PART, lambda rows: rows.with_columns(pl.col("policy") + "-2")),
        ("digest_off_manifest",),
        "digest_off_manifest is 1, expected at most 0",
        warns=True,
    ),
    Corruption(
        "no rows",
        file(PART, lambda rows: rows.clear()),
        ("accepted_requests", "accepted_sessions", "users", "requests_off_manifest", "digest_off_manifest"),
        "accepted_requests is 0, expected at least 100",
        slow=True,
    ),
    Corruption(
        "one session only",
        rewritten(one_session),
        ("accepted_sessions", "users"),
        "accepted_sessions is 1, expected at least 2",
    ),
    Corruption(
        "one user only",
        columns(user_id=pl.lit("anonymous")),
        ("users",),
        "users is 1, expected at least 2",
        slow=True,
    ),
    Corruption(
        "a few sessions", pick("session_id", lambda ids: ids.head(9)), ("accepted_requests",), "at least 100", slow=True
    ),
    # Identity and sessions.
    Corruption(
        "every row twice",
        rewritten(lambda rows: pl.concat([rows, rows])),
        ("request_id_repeats", "step_gap", "session_end_too_early"),
        "a request_id that no other row of the log has",
        slow=True,
    ),
    Corruption(
        "sessions under two ids",
        rewritten(under_two_ids),
        ("session_repeats",),
        "no other session of its user with the same times, slates and events",
        slow=True,
    ),
    Corruption(
        "sessions cut over two parts",
        cut_into_parts,
        ("session_in_two_parts", "step_gap"),
        "in one part of the log",
        slow=True,
    ),
    Corruption(
        "rows of another loop",
        columns(loop=pl.when(LATE).then(pl.lit("news")).otherwise("loop")),
        ("other_loop",),
        "expected rows of the loop 'shop'",
        slow=True,
    ),
    Corruption(
        "no version of the logging policy",
        columns(policy=pl.lit("")),
        ("required_is_empty",),
        "policy neither null nor empty",
        slow=True,
    ),
    Corruption("steps from 1", columns(step=pl.col("step") + 1), ("step_gap",), "to count 0, 1, 2, ...", slow=True),
    Corruption(
        "two users' sessions glued",
        rewritten(glued),
        ("two_users_in_session", "session_end_too_early"),
        "expected the user_id of the session's first request",
        slow=True,
    ),
    Corruption(
        "another word for an end",
        columns(session_end=pl.col("session_end").str.to_uppercase()),
        ("session_end_unknown",),
        "expected one of left, censored, or null",
        slow=True,
    ),
    # Times.
    Corruption(
        "rows of the future",
        columns(**{name: pl.col(name).dt.offset_by("14d") for name in TIMES}),
        ("after_as_of",),
        "expected nothing after 2026-02-02T12:00:00+00:00",
        slow=True,
    ),
    Corruption(
        "milliseconds read as microseconds",
        columns(**unix(0.001)),
        ("time_not_credible",),
        "expected nothing before 1990-01-01T00:00:00+00:00 or after",
        slow=True,
    ),
    Corruption(
        "microseconds read as milliseconds",
        columns(**unix(1_000.0)),
        ("time_not_credible", "after_as_of"),
        "or after 2100-01-01T00:00:00+00:00",
        slow=True,
    ),
    Corruption(
        "no times", columns(timestamp=pl.lit(None)), ("timestamp_is_missing",), "as the manifest has times", slow=True
    ),
    Corruption(
        "feedback known before it was asked for",
        columns(timestamp=pl.col("available_at"), available_at=pl.col("timestamp")),
        ("feedback_before_request",),
        "expected available_at not before timestamp",
        slow=True,
    ),
    Corruption(
        "clocks that disagree",
        columns(
            timestamp=pl.when(pl.col("step") % 2 == 1)
            .then(pl.col("timestamp").dt.offset_by("-2m"))
            .otherwise("timestamp")
        ),
        ("timestamps_out_of_order",),
        "expected no timestamp before that of the session's previous request",
        slow=True,
    ),
    # Items, slates and candidates.
    Corruption(
        "item ids in another case",
        columns(slate=SLATE.list.eval(pl.element().str.to_uppercase())),
        ("slate_item_unknown", "slate_outside_candidates"),
        "slate = ['ITEM-",
    ),
    Corruption(
        "spaces around the ids of candidates",
        columns(candidates=pl.col("candidates").list.eval(pl.element() + " ")),
        ("candidate_item_unknown", "slate_outside_candidates"),
        "expected item ids of the item table",
        slow=True,
    ),
    Corruption(
        "an item table with both spellings",
        tables(items=lambda items: pl.concat([items, items.with_columns(pl.col("item_id").str.to_uppercase())])),
        ("item_ids_alike",),
        "No two item ids are the same but for case",
        warns=True,
    ),
    Corruption(
        "an item table with each item twice",
        tables(items=lambda items: pl.concat([items, items])),
        ("item_rows_without_own_id",),
        "item_rows_without_own_id is 60, expected at most 0",
        slow=True,
    ),
    Corruption(
        "an item table of another day",
        tables(items=lambda items: items.head(50)),
        ("slate_item_unknown", "candidate_item_unknown", "event_item_unknown"),
        "candidate_item_unknown: ",
        slow=True,
    ),
    Corruption(
        "a candidate table of another day",
        tables(candidates=lambda table: table.with_columns(pl.col("candidates_digest") + "-old")),
        ("candidates_digest_unknown",),
        "expected a candidates_digest of the candidate table",
        slow=True,
    ),
    Corruption(
        "a candidate table with each list twice",
        tables(candidates=lambda table: pl.concat([table, table])),
        ("candidate_rows_without_own_digest",),
        "Each row of the candidate table has a digest of its own",
    ),
    Corruption(
        "candidates cut short",
        columns(candidates=pl.col("candidates").list.head(6)),
        ("slate_outside_candidates",),
        "expected only items of the request's candidates",
        slow=True,
    ),
    Corruption(
        "slates filled up by repeating",
        columns(slate=pl.concat_list(SLATE.list.head(3), SECOND_ITEM)),
        ("slate_repeats_an_item",),
        "expected each item at most once",
        slow=True,
    ),
    Corruption(
        "no slates",
        columns(slate=pl.lit(None), clicked=pl.lit(None), purchased=pl.lit(None), signals__watch_time=pl.lit(None)),
        ("slate_is_missing",),
        "expected at least one item",
        slow=True,
    ),
    Corruption(
        "events on items of another catalog",
        columns(events=pl.col("events").list.eval(pl.struct(type=pl.lit("view"), item_id=pl.lit("sku-1")))),
        ("event_item_unknown",),
        "expected item ids of the item table, or null",
        slow=True,
    ),
    # Feedback and rewards.
    Corruption(
        "feedback of a shorter slate",
        columns(clicked=shorter("clicked"), purchased=shorter("purchased")),
        ("feedback_off_slate",),
        "expected feedback as long as the slate",
        slow=True,
    ),
    Corruption(
        "purchases of the request before",
        columns(purchased=pl.col("purchased").shift(1, fill_value=[False] * 4)),
        ("purchase_without_click",),
        "expected a purchase only at a clicked position",
        slow=True,
    ),
    Corruption(
        "not a number where nothing was watched",
        columns(signals__watch_time=pl.col("signals.watch_time").list.eval(pl.element().replace(0.0, math.nan))),
        ("number_is_not_finite",),
        "expected finite numbers or null",
        slow=True,
    ),
    Corruption(
        "clicks all zero", columns(clicked=NONE, purchased=NONE), ("click_rate",), "click_rate is 0", warns=True
    ),
    Corruption(
        "clicks all one",
        columns(clicked=NONE.list.eval(~pl.element())),
        ("click_rate",),
        "click_rate is 1",
        warns=True,
        slow=True,
    ),
    Corruption(
        "clicks never joined",
        columns(clicked=pl.when(pl.col("session_id").rank("dense") % 5 == 0).then("clicked")),
        ("null_share.clicked",),
        "clicked is mostly known",
        slow=True,
    ),
    Corruption(
        "a tracker that broke halfway",
        columns(clicked=pl.when(LATE).then(NONE).otherwise("clicked"), purchased=pl.when(~LATE).then("purchased")),
        ("steadiness.clicked",),
        "clicked keeps its scale from one quarter of the log to another",
    ),
    Corruption(
        "seconds that became milliseconds",
        columns(
            signals__watch_time=pl.when(LATE)
            .then(pl.col("signals.watch_time").list.eval(pl.element() * 1_000))
            .otherwise("signals.watch_time")
        ),
        ("steadiness.signals.watch_time",),
        "signals.watch_time keeps its scale",
    ),
    # Features.
    Corruption(
        "a vocabulary in another case",
        context(device=pl.field("device").str.to_titlecase()),
        ("unknown_share.context.device",),
        "context.device has values of the manifest's vocabulary",
    ),
    Corruption(
        "an item vocabulary of another catalog",
        tables(items=lambda items: items.with_columns(category=pl.lit("shoes"))),
        ("unknown_share.items.category",),
        "items.category has values of the manifest's vocabulary",
    ),
    Corruption(
        "a feature that nobody sends",
        context(device=pl.lit(None, dtype=pl.String)),
        ("null_share.context.device",),
        "context.device is known somewhere",
        warns=True,
    ),
    Corruption(
        "an item feature that nobody fills",
        tables(items=lambda items: items.with_columns(price=pl.lit(None, dtype=pl.Float32))),
        ("null_share.items.price",),
        "items.price is known somewhere",
        warns=True,
        slow=True,
    ),
    Corruption(
        "a feature no longer sent",
        context(age=pl.when(~LATE).then(pl.field("age"))),
        ("steadiness.known.context.age",),
        "known.context.age keeps its scale",
        warns=True,
    ),
    Corruption(
        "a constant feature",
        context(age=pl.lit(1.0)),
        ("range.context.age",),
        "context.age differs",
        warns=True,
    ),
    Corruption(
        "a feature in another unit",
        context(age=pl.when(LATE).then(pl.field("age") * 365).otherwise(pl.field("age"))),
        ("steadiness.context.age",),
        "context.age keeps its scale",
        warns=True,
    ),
    # Propensities.
    Corruption(
        "log_probs left out",
        log_probs(pl.lit(None)),
        ("slate_log_prob_is_missing",),
        "expected a slate_log_prob, as the manifest's evidence is 'propensities'",
        slow=True,
    ),
    Corruption(
        "log_probs without their sign",
        log_probs(-LOG_PROB),
        ("slate_log_prob_invalid",),
        "above",
        slow=True,
    ),
    Corruption(
        "probabilities instead of their logs",
        log_probs(LOG_PROB.exp()),
        ("slate_log_prob_invalid",),
        "expected a finite slate_log_prob, not above 0: the natural logarithm of a probability",
        slow=True,
    ),
    Corruption(
        "log_probs all zero",
        log_probs(pl.lit(0.0)),
        ("share_of_certain_slates",),
        "slate_log_prob is not 0 wherever there was a choice",
        slow=True,
    ),
    Corruption(
        "log_probs all equal",
        log_probs(LOG_PROB.mean()),
        ("equal_log_probs_off_uniform",),
        "slate_log_prob is not the same for all slates, unless they were drawn at random",
    ),
    Corruption(
        "log_probs to the base 10",
        log_probs(LOG_PROB / math.log(10)),
        ("mean_uniform_weight",),
        PROPENSITY,
    ),
    Corruption(
        "log_probs of the set, not of the order",
        log_probs(LOG_PROB + math.lgamma(5)),
        ("mean_uniform_weight",),
        PROPENSITY,
        slow=True,
    ),
    Corruption(
        "log_probs to the base 2",
        log_probs(LOG_PROB / math.log(2)),
        ("log_prob_over_uniform", "mean_uniform_weight"),
        "which no policy's own is",
    ),
    Corruption(
        "candidates thinned out",
        columns(candidates=pl.concat_list("slate", pl.col("candidates").list.set_difference("slate").list.head(2))),
        ("log_prob_over_uniform", "mean_uniform_weight"),
        "which no policy's own is",
        slow=True,
    ),
    Corruption(
        "log_probs of positions to the base 10",
        columns(position_log_probs=by_position(pl.element() / math.log(10))),
        ("position_log_probs_off_sum",),
        "expected position_log_probs that sum to the slate_log_prob",
        slow=True,
    ),
    Corruption(
        "probabilities of positions instead of their logs",
        columns(position_log_probs=by_position(pl.element().exp())),
        ("position_log_probs_invalid", "position_log_probs_off_sum"),
        "expected a finite position_log_prob, not above 0, for each item of the slate",
        slow=True,
    ),
    Corruption(
        "log_probs of positions cut short",
        columns(position_log_probs=shorter("position_log_probs")),
        ("position_log_probs_invalid", "position_log_probs_off_sum"),
        "expected a finite position_log_prob, not above 0, for each item of the slate",
        slow=True,
    ),
)


@pytest.fixture(scope="module")
def sound(storefront_log: Log, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shop's log with a signal, a numeric feature, events, and half of its candidates in a table of their own."""
    rows = storefront_log.scan().collect()
    generator = np.random.default_rng(3)
    seconds = generator.lognormal(2.0, 0.5, rows.height)
    manifest = Manifest.model_validate(
        storefront_log.manifest.model_dump()
        | {
            "context": (*storefront_log.manifest.context, Feature(name="age", kind="numeric")),
            "signals": ("watch_time",),
            "reward": Reward(weights={"clicked": 1.0, "watch_time": 0.1}),
        }
    )
    listed = pl.col("session_id").rank("dense") % 2 == 0
    rows = rows.with_columns(
        pl.col("context").struct.with_fields(age=pl.lit(pl.Series(generator.uniform(18, 80, rows.height)))),
        events=pl.concat_list(pl.struct(type=pl.lit("view"), item_id=pl.col("candidates").list.first())),
        candidates_digest=pl.when(listed).then(pl.format("list-{}", "request_id")),
        **{"signals.watch_time": pl.col("clicked").cast(pl.List(pl.Float64)) * pl.Series(seconds)},
    )
    table = rows.filter(pl.col("candidates_digest").is_not_null()).select(CANDIDATE_SCHEMA.names())
    rows = rows.with_columns(candidates=pl.when(~listed).then("candidates"))
    return write_log(tmp_path_factory.mktemp("sound") / "log", manifest, [rows], storefront_log.items(), table).path


def validated(log: Path, out: Path) -> Result:
    settings = ["--set", f"as_of={AS_OF.isoformat()}"]
    return CliRunner().invoke(app, ["validate", str(log), "--out", str(out), *settings])


def fired(out: Path) -> set[str]:
    """The rules that rows broke, and the other expectations that were not met."""
    checks = json.loads((out / "checks.json").read_text())
    failed = {result["metric"] for result in checks["expectations"] if not result["success"]}
    broken = set(checks["quarantine_reasons"]) - {SESSION_OF_A_BAD_ROW}
    if broken:
        # What their number then does to the log as a whole is no second finding.
        failed = {metric for metric in failed if not metric.startswith(("bad_share", "accepted_"))}
    return broken | failed


def test_in_a_sound_log_nothing_fires(sound: Path, tmp_path: Path) -> None:
    answer = validated(sound, tmp_path / "checks")
    assert answer.exit_code == 0, answer.output
    assert answer.stderr == ""
    assert fired(tmp_path / "checks") == set()


@pytest.mark.parametrize(
    "corruption",
    [
        pytest.param(corruption, id=corruption.name, marks=[pytest.mark.slow] * corruption.slow)
        for corruption in CORRUPTIONS
    ],
)
def test_a_corruption_is_caught_and_named(corruption: Corruption, sound: Path, tmp_path: Path) -> None:
    log, out = shutil.copytree(sound, tmp_path / "log"), tmp_path / "checks"
    corruption.damage(log)

    answer = validated(log, out)

    assert answer.exit_code == (0 if corruption.warns else 2), (answer.output, answer.exception)
    assert answer.stderr.startswith("warning: " if corruption.warns else "slateloop: ")
    assert corruption.says in answer.stderr
    assert "Traceback" not in answer.stderr
    if corruption.caught_by == (UNREADABLE,):
        assert not out.exists()
        return
    assert fired(out) == set(corruption.caught_by)
    left = {path.name for path in out.iterdir()}
    assert left == {"quarantine", "data_docs", "checks.json"} | ({"log"} if corruption.warns else set())


def test_a_log_that_cannot_be_split_is_named(sound: Path, tmp_path: Path) -> None:
    log = shutil.copytree(sound, tmp_path / "log")
    pick("session_id", lambda ids: ids.head(2))(log)
    with pytest.raises(InputError, match="the validation split holds no session; the log has 2 sessions"):
        split_log(open_log(log), SplitConfig(), tmp_path / "split", with_holdout=False)
    assert not (tmp_path / "split").exists()


def test_every_corruption_is_in_the_documentation() -> None:
    page = (REPOSITORY / "docs" / "validation.md").read_text()
    listed = page[page.index("| corruption |") :].split("\n\n")[0].splitlines()[2:]
    assert listed == [
        f"| {corruption.name} | {', '.join(f'`{name}`' for name in corruption.caught_by)}"
        f"{' (warning)' if corruption.warns else ''} |"
        for corruption in CORRUPTIONS
    ]
    assert len(set(listed)) == len(listed)
