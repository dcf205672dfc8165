"""Row rules: what each request must keep, as named polars expressions, and the quarantine of sessions that break one.

A rule flags rows (true = bad). It sees one part of the log at a time, so size does not matter; what only the whole log
or its tables can tell (`Lookups`) is gathered once before. A bad row takes its session with it: without the row the
session's steps would have a gap and its history would be a false one.
"""

from dataclasses import dataclass
from datetime import datetime, time

import polars as pl

from components.interactions.contract import ROW_ORDER, SESSION_ENDS, SUM_TOLERANCE, Evidence, Manifest
from components.interactions.log_folder import Log

#: The reason written beside rows that keep every rule but share their session with one that does not.
SESSION_OF_A_BAD_ROW = "session_of_a_bad_row"

_REQUIRED = ("loop", "request_id", "session_id", "user_id", "policy")


@dataclass(frozen=True)
class Rule:
    """What a row must keep: `bad` flags the rows that do not."""

    name: str
    """What is wrong with a row that breaks it; the reason in the quarantine."""
    holds: str
    """What was expected of the row, as it reads after "expected"."""
    columns: tuple[str, ...]
    """Where to look at a row that breaks it."""
    bad: pl.Expr


@dataclass(frozen=True)
class Lookups:
    """What rows may refer to, and what only the whole log shows."""

    item_ids: pl.Series
    """Distinct ids of the item table."""
    candidate_lists: pl.DataFrame
    """Per digest of the candidate table: `candidates_digest`, `listed` (how many), `unknown` and `repeats` (bool)."""
    candidate_pairs: pl.DataFrame
    """The candidate table, one row per `candidates_digest` and `slate` (an item of it)."""
    repeated_request_ids: pl.Series
    """Request ids that more than one row claims."""
    cut_session_ids: pl.Series
    """Sessions with rows in more than one part."""
    repeated_session_ids: pl.Series
    """Sessions of which another one of the same user has the same times, slates and events."""


@dataclass(frozen=True)
class JudgedPart:
    """One part of a log, cut in two: every row is in exactly one of the frames."""

    accepted: pl.DataFrame
    """Rows of sessions without a bad row: the part's columns, and `n_candidates` (null where unknown)."""
    quarantined: pl.DataFrame
    """The other rows: the part's columns, and `reasons` (list[string]), the names of the rules that the row breaks."""


def look_up(log: Log) -> Lookups:
    """What the rules need to know of a log's tables and of its rows taken together.

    Raises:
        polars.exceptions.PolarsError: a file cannot be read.
    """
    item_ids = log.items()["item_id"].drop_nulls().unique().sort()
    table = log.candidate_table()
    candidate_lists = table.select(
        "candidates_digest",
        pl.col("candidates").list.len().alias("listed"),
        _names_unknown("candidates", item_ids).alias("unknown"),
        _repeats("candidates").alias("repeats"),
    ).unique("candidates_digest", keep="first")
    candidate_pairs = table.select("candidates_digest", pl.col("candidates").alias("slate")).explode(
        "slate", empty_as_null=False
    )
    repeated = log.scan().group_by("request_id").len().filter(pl.col("len") > 1).select("request_id")
    cut = (
        pl.scan_parquet(log.part_paths, include_file_paths="part")
        .group_by("session_id")
        .agg(pl.col("part").n_unique())
        .filter(pl.col("part") > 1)
        .select("session_id")
    )
    return Lookups(
        item_ids=item_ids,
        candidate_lists=candidate_lists,
        candidate_pairs=candidate_pairs,
        repeated_request_ids=repeated.collect(engine="streaming").to_series().drop_nulls(),
        cut_session_ids=cut.collect(engine="streaming").to_series().drop_nulls(),
        repeated_session_ids=_repeated_sessions(log.scan()).drop_nulls(),
    )


def _repeated_sessions(rows: pl.LazyFrame) -> pl.Series:
    """Sessions with the same requests under several ids, by the hash of what each of them holds."""
    shown = pl.col("timestamp")
    sessions = (
        rows.group_by("session_id")
        .agg(
            pl.struct("user_id", "step", "timestamp", "slate", "events").hash().sum().alias("content"),
            shown.null_count().alias("untimed"),
            # Dates alone do not tell two visits of one day apart.
            (shown.dt.time() == time()).all().alias("dated"),
        )
        .filter((pl.col("untimed") == 0) & ~pl.col("dated"))
        .select("session_id", "content")
        .collect(engine="streaming")
    )
    return sessions.filter(pl.col("content").is_duplicated())["session_id"]


def row_rules(
    manifest: Manifest,
    lookups: Lookups,
    as_of: datetime | None = None,
    credible: tuple[datetime, datetime] | None = None,
) -> tuple[Rule, ...]:
    """The rules that the rows of a log with this manifest must keep; `docs/validation.md` lists them all.

    Where `as_of` is not None nothing may lie after it, and where `credible` is not None nothing outside of it.
    Their expressions expect rows in row order with the helper columns that `judge` adds.
    """
    return (
        *_identity_rules(manifest, lookups),
        *_session_rules(),
        *_time_rules(manifest, as_of, credible),
        *_slate_rules(manifest, lookups),
        *_action_rules(manifest),
        *_candidate_rules(manifest, lookups),
        *_feedback_rules(manifest),
        *_number_rules(manifest),
    )


def judge(part: pl.DataFrame, rules: tuple[Rule, ...], lookups: Lookups) -> JudgedPart:
    """Cut a part into accepted and quarantined rows. The part holds whole sessions, in any order."""
    rows = _with_helpers(part.sort(ROW_ORDER), lookups)
    flags = rows.select(rule.bad.fill_null(False).alias(rule.name) for rule in rules)
    bad = flags.select(pl.any_horizontal(pl.all()).alias("bad")).to_series()
    condemned = rows.select("session_id", bad).select(pl.col("bad").any().over("session_id")).to_series()
    reasons = pl.concat_list(pl.when(pl.col(name)).then(pl.lit(name)) for name in flags.columns).list.drop_nulls()
    quarantined = (
        rows.select(part.columns)
        .filter(condemned)
        .with_columns(
            flags.filter(condemned)
            .select(
                pl.when(pl.any_horizontal(pl.all()))
                .then(reasons)
                .otherwise(pl.concat_list(pl.lit(SESSION_OF_A_BAD_ROW)))
                .alias("reasons")
            )
            .to_series()
        )
    )
    return JudgedPart(rows.filter(~condemned).select(*part.columns, "n_candidates"), quarantined)


def _with_helpers(rows: pl.DataFrame, lookups: Lookups) -> pl.DataFrame:
    """Add `listed`, `unknown`, `repeats` of the row's candidate list, `outside_list` and `n_candidates`."""
    numbered = rows.with_row_index("row")
    # Joined item by item: putting whole candidate lists beside each row that names one would multiply the part's size.
    outside = (
        numbered.lazy()
        .filter(pl.col("candidates_digest").is_not_null() & pl.col("slate").is_not_null())
        .select("row", "candidates_digest", "slate")
        .join(lookups.candidate_lists.lazy().select("candidates_digest"), on="candidates_digest", how="semi")
        .explode("slate", empty_as_null=False)
        .join(lookups.candidate_pairs.lazy(), on=["candidates_digest", "slate"], how="anti")
        .select(pl.col("row").unique())
        .collect()
        .to_series()
    )
    return (
        numbered.join(lookups.candidate_lists, on="candidates_digest", how="left", maintain_order="left")
        .with_columns(
            pl.col("row").is_in(outside.implode()).alias("outside_list"),
            pl.coalesce(pl.col("candidates").list.len(), "listed").alias("n_candidates"),
        )
        .drop("row")
    )


def _identity_rules(manifest: Manifest, lookups: Lookups) -> tuple[Rule, ...]:
    rules = [
        Rule(
            "required_is_empty",
            f"{', '.join(_REQUIRED)} neither null nor empty",
            _REQUIRED,
            pl.any_horizontal(pl.col(name).is_null() | (pl.col(name) == "") for name in _REQUIRED),
        ),
        Rule("other_loop", f"rows of the loop {manifest.loop!r}", ("loop",), pl.col("loop") != manifest.loop),
        Rule(
            "request_id_repeats",
            # Which copy tells the truth is unknown, so none of them is kept.
            "a request_id that no other row of the log has",
            ("request_id",),
            pl.col("request_id").is_in(lookups.repeated_request_ids.implode()),
        ),
        Rule(
            "session_in_two_parts",
            "all requests of a session in one part of the log",
            ("session_id",),
            pl.col("session_id").is_in(lookups.cut_session_ids.implode()),
        ),
    ]
    if manifest.has_users and manifest.has_times:
        rules.append(
            Rule(
                "session_repeats",
                # Their feedback may differ, so which copy tells the truth is unknown here too.
                "no other session of its user with the same times, slates and events",
                ("session_id", "user_id", "timestamp"),
                pl.col("session_id").is_in(lookups.repeated_session_ids.implode()),
            )
        )
    return tuple(rules)


def _session_rules() -> tuple[Rule, ...]:
    step, user = pl.col("step"), pl.col("user_id")
    end = pl.col("session_end")
    position = pl.int_range(pl.len()).over("session_id")
    return (
        Rule(
            "step_gap",
            # Compared with the row before, not with the position: one gap is one bad row, however long the session.
            "the steps of a session to count 0, 1, 2, ... without gap or repeat",
            ("session_id", "step"),
            step.is_null() | (step != (step.shift(1) + 1).over("session_id").fill_null(0)),
        ),
        Rule(
            "two_users_in_session",
            "the user_id of the session's first request",
            ("session_id", "user_id"),
            user != user.first().over("session_id"),
        ),
        Rule(
            "session_end_unknown",
            f"one of {', '.join(SESSION_ENDS)}, or null",
            ("session_end",),
            ~end.is_in(SESSION_ENDS),
        ),
        Rule(
            "session_end_too_early",
            "null before the session's last request",
            ("session_id", "step", "session_end"),
            end.is_not_null() & (position < pl.len().over("session_id") - 1),
        ),
    )


def _time_rules(
    manifest: Manifest, as_of: datetime | None, credible: tuple[datetime, datetime] | None
) -> tuple[Rule, ...]:
    shown, known = pl.col("timestamp"), pl.col("available_at")
    rules = [
        Rule(
            "timestamps_out_of_order",
            "no timestamp before that of the session's previous request",
            ("session_id", "step", "timestamp"),
            shown < shown.shift(1).over("session_id"),
        ),
        Rule(
            "feedback_before_request",
            "available_at not before timestamp",
            ("timestamp", "available_at"),
            known < shown,
        ),
    ]
    if manifest.has_times:
        rules.append(
            Rule("timestamp_is_missing", "a timestamp, as the manifest has times", ("timestamp",), shown.is_null())
        )
    if as_of is not None:
        rules.append(
            Rule(
                "after_as_of",
                f"nothing after {as_of.isoformat()}",
                ("timestamp", "available_at"),
                pl.max_horizontal(shown, known) > as_of,
            )
        )
    if credible is not None:
        earliest, latest = credible
        rules.append(
            Rule(
                "time_not_credible",
                f"nothing before {earliest.isoformat()} or after {latest.isoformat()}",
                ("timestamp", "available_at"),
                (pl.min_horizontal(shown, known) < earliest) | (pl.max_horizontal(shown, known) > latest),
            )
        )
    return tuple(rules)


def _slate_rules(manifest: Manifest, lookups: Lookups) -> tuple[Rule, ...]:
    slate, log_prob = pl.col("slate"), pl.col("slate_log_prob")
    rules = [
        Rule(
            "slate_too_long",
            f"at most slate_size = {manifest.slate_size} items",
            ("slate",),
            slate.list.len() > manifest.slate_size,
        ),
        Rule("slate_repeats_an_item", "each item at most once", ("slate",), _repeats("slate")),
        Rule("slate_item_unknown", "item ids of the item table", ("slate",), _names_unknown("slate", lookups.item_ids)),
        Rule(
            "slate_log_prob_invalid",
            "a finite slate_log_prob, not above 0: the natural logarithm of a probability",
            ("slate_log_prob",),
            ~log_prob.is_finite() | (log_prob > 0),
        ),
    ]
    if "position_log_probs" in manifest.schema():
        rules.extend(_position_rules())
    if manifest.slate_size:
        rules.append(
            Rule("slate_is_missing", "at least one item", ("slate",), slate.is_null() | (slate.list.len() == 0))
        )
    if manifest.slate_size and manifest.evidence is Evidence.PROPENSITIES:
        rules.append(
            Rule(
                "slate_log_prob_is_missing",
                "a slate_log_prob, as the manifest's evidence is 'propensities'",
                ("slate_log_prob",),
                log_prob.is_null(),
            )
        )
    return tuple(rules)


def _action_rules(manifest: Manifest) -> tuple[Rule, ...]:
    if not manifest.action_size:
        return ()
    action, log_prob = pl.col("action"), pl.col("action_log_prob")
    shown = [pl.col(name) for name in ("candidates", "candidates_digest", "slate_log_prob", "position_log_probs")]
    # What is no number at all is outside too.
    inside = (pl.element().abs() <= 1.0).fill_null(False)
    return (
        Rule("action_is_missing", "an action", ("action",), action.is_null()),
        Rule(
            "action_of_other_length",
            f"action_size = {manifest.action_size} numbers",
            ("action",),
            action.list.len() != manifest.action_size,
        ),
        Rule("action_outside_box", "numbers in [-1, 1]", ("action",), ~action.list.eval(inside).list.all()),
        Rule(
            "action_log_prob_is_missing",
            "an action_log_prob, as the log has actions",
            ("action_log_prob",),
            log_prob.is_null(),
        ),
        Rule(
            "slate_beside_action",
            "no candidates and no log_prob of a slate, as the log has actions",
            ("candidates", "candidates_digest", "slate_log_prob"),
            pl.any_horizontal(cell.is_not_null() for cell in shown),
        ),
    )


def _position_rules() -> tuple[Rule, ...]:
    by_position, log_prob = pl.col("position_log_probs"), pl.col("slate_log_prob")
    sound = (pl.element().is_finite() & (pl.element() <= 0)).fill_null(False)
    gap = (by_position.list.sum() - log_prob).abs()
    return (
        Rule(
            "position_log_probs_invalid",
            "a finite position_log_prob, not above 0, for each item of the slate",
            ("slate", "position_log_probs"),
            (by_position.list.len() != pl.col("slate").list.len().fill_null(0))
            | ~by_position.list.eval(sound).list.all(),
        ),
        Rule(
            "position_log_probs_off_sum",
            "position_log_probs that sum to the slate_log_prob",
            ("slate_log_prob", "position_log_probs"),
            gap.is_finite() & (gap > SUM_TOLERANCE * (1 + log_prob.abs())),
        ),
    )


def _candidate_rules(manifest: Manifest, lookups: Lookups) -> tuple[Rule, ...]:
    candidates, digest = pl.col("candidates"), pl.col("candidates_digest")
    event_items = pl.col("events").list.eval(pl.element().struct.field("item_id")).list.drop_nulls()
    missing = Rule(
        "candidates_are_missing",
        "the candidates of the slate, written out or by digest",
        ("candidates", "candidates_digest"),
        candidates.is_null() & digest.is_null(),
    )
    return (
        *([missing] if manifest.slate_size else []),
        Rule(
            "candidates_digest_unknown",
            "a candidates_digest of the candidate table",
            ("candidates_digest",),
            digest.is_not_null() & pl.col("listed").is_null(),
        ),
        Rule(
            "candidates_repeat_an_item",
            "each item at most once",
            ("candidates", "candidates_digest"),
            _repeats("candidates").fill_null(False) | pl.col("repeats").fill_null(False),
        ),
        Rule(
            "candidate_item_unknown",
            "item ids of the item table",
            ("candidates", "candidates_digest"),
            _names_unknown("candidates", lookups.item_ids).fill_null(False) | pl.col("unknown").fill_null(False),
        ),
        Rule(
            "slate_outside_candidates",
            "only items of the request's candidates",
            ("slate", "candidates", "candidates_digest"),
            (pl.col("slate").list.set_difference(candidates).list.len() > 0).fill_null(False) | pl.col("outside_list"),
        ),
        Rule(
            "event_item_unknown",
            "item ids of the item table, or null",
            ("events",),
            ~event_items.list.eval(pl.element().is_in(lookups.item_ids.implode())).list.all(),
        ),
    )


def _feedback_rules(manifest: Manifest) -> tuple[Rule, ...]:
    slate = pl.col("slate")
    lists = ("exposed", "clicked", "purchased", *(f"signals.{name}" for name in manifest.signals))
    # Positions instead of pairwise operators, which would fail on lists of unequal length.
    bought_at = pl.col("purchased").list.eval(pl.element().arg_true())
    not_clicked_at = pl.col("clicked").list.eval(pl.element().not_().arg_true())
    rules = [
        Rule(
            "feedback_without_slate",
            "null where nothing was shown",
            ("slate", *lists),
            slate.is_null() & pl.any_horizontal(pl.col(name).is_not_null() for name in lists),
        ),
        Rule(
            "feedback_off_slate",
            "feedback as long as the slate",
            ("slate", *lists),
            pl.any_horizontal((pl.col(name).list.len() != slate.list.len()).fill_null(False) for name in lists),
        ),
        Rule(
            "purchase_without_click",
            "a purchase only at a clicked position",
            ("clicked", "purchased"),
            bought_at.list.set_intersection(not_clicked_at).list.len() > 0,
        ),
    ]
    if manifest.responses == "choice":
        rules.append(
            Rule(
                "two_choices",
                "at most one click, as the manifest's responses are 'choice'",
                ("clicked",),
                pl.col("clicked").list.sum() > 1,
            )
        )
    return tuple(rules)


def _number_rules(manifest: Manifest) -> tuple[Rule, ...]:
    lists = ("action", *(f"signals.{name}" for name in manifest.signals))
    fields = [("request_signals", name) for name in manifest.request_signals]
    fields += [("context", feature.name) for feature in manifest.context if feature.kind == "numeric"]
    not_finite = [pl.col(name).list.eval(~pl.element().is_finite()).list.any() for name in lists]
    not_finite += [~pl.col(struct).struct.field(name).is_finite() for struct, name in fields]
    not_finite.append(~pl.col("action_log_prob").is_finite())
    return (
        Rule(
            "number_is_not_finite",
            "finite numbers or null",
            tuple(dict.fromkeys((*lists, *(struct for struct, _ in fields), "action_log_prob"))),
            pl.any_horizontal(bad.fill_null(False) for bad in not_finite),
        ),
    )


def _repeats(column: str) -> pl.Expr:
    return pl.col(column).list.n_unique() != pl.col(column).list.len()


def _names_unknown(column: str, item_ids: pl.Series) -> pl.Expr:
    """Whether a list names an item that is not in the item table; a null id is unknown too."""
    known = pl.element().is_in(item_ids.implode()).fill_null(False)
    return ~pl.col(column).list.eval(known).list.all()
