import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from components.interactions.batching import MAX_EVENTS, SessionReader, SessionTable, read_sessions
from components.interactions.contract import Manifest, Reward
from components.interactions.log_folder import Log, open_log, write_log
from components.interactions.vocabulary import Vocabulary

# Vocabulary of the corner shop: ids in alphabetical order from 2 on; 1 is unknown, 0 padding.
APPLE, CHERRY, LEMON, PLUM, UNKNOWN = 2, 3, 4, 5, 1


def table_of(log: Log) -> SessionTable:
    return read_sessions(log.scan().collect(), log.manifest, Vocabulary.fit(log), log.candidate_table())


@pytest.fixture
def table(corner_log: Log) -> SessionTable:
    return table_of(corner_log)


def test_sessions_are_consecutive_rows(table: SessionTable) -> None:
    assert len(table) == 3
    assert table.starts.tolist() == [0, 3, 4]
    assert table.lengths.tolist() == [3, 1, 1]
    assert table.session_ids.to_list() == ["s1", "s2", "s3"]
    assert table.user_ids.to_list() == ["ann", "bob", "ann"]


def test_sessions_of_one_user_share_its_code(table: SessionTable) -> None:
    ann, bob, ann_again = table.batch(torch.arange(3)).users.tolist()

    assert ann == ann_again != bob


def test_a_user_has_the_same_code_in_every_part_of_a_log(
    write_corner: Callable[..., Log], corner_rows: pl.DataFrame
) -> None:
    cut = write_corner(*(corner_rows.filter(pl.col("session_id") == name) for name in ("s2", "s1", "s3")))

    (bob,), (ann,), (ann_again,) = (
        table.batch(torch.tensor([0])).users.tolist() for table in SessionReader(cut, Vocabulary.fit(cut)).tables()
    )

    assert ann == ann_again != bob


def test_slates_are_padded_and_unknown_items_share_one_index(table: SessionTable) -> None:
    assert table.rows.slates[:, 0].tolist() == [
        [APPLE, CHERRY, PLUM],
        [UNKNOWN, CHERRY, 0],
        [APPLE, 0, 0],
        [PLUM, 0, 0],
        [APPLE, 0, 0],
    ]


def test_candidates_named_by_digest_are_looked_up_and_written_ones_kept(table: SessionTable) -> None:
    assert table.rows.candidates[:, 0].tolist() == [
        [APPLE, CHERRY, PLUM, LEMON],
        [CHERRY, LEMON, UNKNOWN, 0],
        [APPLE, CHERRY, PLUM, LEMON],
        [0, 0, 0, 0],
        [APPLE, 0, 0, 0],
    ]


def test_clicks_are_observed_where_shown_in_view_and_known(table: SessionTable) -> None:
    # First request: click, unknown, out of view though clicked; last request: wholly unknown.
    assert table.rows.clicks[:, 0].tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert table.rows.observed[:, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_what_was_out_of_view_was_not_clicked(
    corner_rows: pl.DataFrame, corner_manifest: Manifest, corner_log: Log
) -> None:
    seen_first_alone = corner_rows.filter(pl.col("request_id") == "s1-1").with_columns(
        clicked=pl.lit([True, None], dtype=pl.List(pl.Boolean)),
        exposed=pl.lit([True, False], dtype=pl.List(pl.Boolean)),
    )

    rows = read_sessions(
        seen_first_alone, corner_manifest, Vocabulary.fit(corner_log), corner_log.candidate_table()
    ).rows

    assert rows.clicks[0, 0].tolist() == [1.0, 0.0, 0.0]
    assert rows.observed[0, 0].tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("clicked", "exposed", "purchased", "observed", "known"),
    [
        ([None, None], [True, False], None, [False, False], False),
        ([True, None], [True, False], None, [True, True], True),
        ([False, None], [True, False], None, [True, True], True),
        ([None, None], [False, False], [True, False], [False, False], False),
    ],
)
def test_that_nothing_was_chosen_is_known_only_where_no_position_is_unknown(
    corner_rows: pl.DataFrame,
    corner_manifest: Manifest,
    corner_log: Log,
    clicked: list[bool | None],
    exposed: list[bool],
    purchased: list[bool] | None,
    observed: list[bool],
    known: bool,
) -> None:
    flags = pl.List(pl.Boolean)
    row = corner_rows.filter(pl.col("request_id") == "s1-1").with_columns(
        clicked=pl.lit(clicked, dtype=flags),
        exposed=pl.lit(exposed, dtype=flags),
        purchased=pl.lit(purchased, dtype=flags),
    )
    choice = corner_manifest.model_copy(
        update={"responses": "choice", "reward": Reward(weights={"clicked": 1.0, "purchased": 3.0})}
    )

    rows = read_sessions(row, choice, Vocabulary.fit(corner_log), corner_log.candidate_table()).rows

    assert rows.observed[0, 0, :2].tolist() == observed
    # A purchase that is unknown at a clicked position leaves the reward unknown.
    assert bool(rows.reward_known[0, 0]) == (known and clicked[0] is not True)


def test_a_reward_is_known_where_all_that_it_weighs_is(table: SessionTable) -> None:
    # Clicks and watch times are weighed: only the second request knows both at every position.
    assert table.rows.reward_known[:, 0].tolist() == [False, True, False, False, False]


def test_purchases_have_a_mask_of_their_own(table: SessionTable) -> None:
    assert table.rows.purchases[:, 0].sum(1).tolist() == [1, 0, 0, 0, 0]
    assert table.rows.purchase_observed[:, 0].int().tolist() == [[1, 1, 0], [0] * 3, [0] * 3, [0] * 3, [0] * 3]


def test_rewards_are_the_manifest_s_with_unknown_feedback_as_none(table: SessionTable) -> None:
    # 1 for a click and 0.1 for a second watched, summed as logged; the third request's watch times are unknown.
    rewards = table.rows.rewards[:, 0].tolist()

    assert rewards[0] == pytest.approx([3.0, 0.0, 1.0])
    assert rewards[1] == pytest.approx([0.0, 1.5, 0.0])
    assert rewards[2:] == [[1.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3]


def test_events_keep_their_order_with_the_latest_in_the_last_column(table: SessionTable) -> None:
    assert table.rows.events[2, 0].tolist() == [0] * (MAX_EVENTS - 2) + [LEMON, APPLE]
    assert table.rows.events[1, 0].tolist() == [0] * MAX_EVENTS


def test_an_event_without_an_item_is_left_out(table: SessionTable) -> None:
    # A view of a plum, then a search.
    assert table.rows.events[0, 0].tolist() == [0] * (MAX_EVENTS - 1) + [PLUM]


def test_only_the_most_recent_events_are_kept(write_corner: Callable[..., Log], corner_rows: pl.DataFrame) -> None:
    seen = ["lemon"] * 3 + ["plum"] * (MAX_EVENTS - 1) + ["apple"]
    events = [[{"type": "view", "item_id": item} for item in seen]]
    row = corner_rows[3:4].with_columns(events=pl.Series(events, dtype=corner_rows.schema["events"]))

    table = table_of(write_corner(row))

    assert table.rows.events[0, 0].tolist() == [PLUM] * (MAX_EVENTS - 1) + [APPLE]


def test_context_is_encoded_and_unknown_categories_are_zeros(table: SessionTable) -> None:
    # Columns: hour (standardised), phone, tablet; the third request came from a watch.
    assert table.rows.context[:, 0, 1:].tolist() == [[1, 0], [0, 1], [0, 0], [1, 0], [1, 0]]
    assert float(table.rows.context[:, 0, 0].mean()) == pytest.approx(0.0, abs=1e-6)


def test_log_probs_are_nan_where_unknown(table: SessionTable) -> None:
    assert bool(table.rows.log_probs.isnan().all())


def test_leaving_is_observed_but_at_censored_ends(table: SessionTable) -> None:
    assert table.rows.left[:, 0].tolist() == [False, False, True, False, False]
    # The session of Bob is censored, and the last one of Ann was cut by the end of the log.
    assert table.rows.leave_observed[:, 0].tolist() == [True, True, True, False, False]


def test_a_batch_is_padded_to_its_longest_session_with_zeros(table: SessionTable) -> None:
    batch = table.batch(torch.tensor([1, 0]))

    assert batch.mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.lengths.tolist() == [1, 3]
    assert batch.slates[1].tolist() == table.rows.slates[:3, 0].tolist()
    for name in ("candidates", "context", "events", "slates", "log_probs", "clicks", "observed", "rewards", "left"):
        assert not bool(getattr(batch, name)[0, 1:].any()), name


def test_trimming_drops_requests_that_are_padding_in_every_session(table: SessionTable) -> None:
    short = table.batch(torch.arange(3)).select(torch.tensor([1, 2])).trim()

    assert short.mask.shape == (2, 1)
    assert short.slates[:, 0].tolist() == [[PLUM, 0, 0], [APPLE, 0, 0]]
    assert short.users.shape == (2,)


def test_rows_in_any_order_give_the_same_table(corner_log: Log, corner_rows: pl.DataFrame, table: SessionTable) -> None:
    turned = read_sessions(
        corner_rows.reverse(), corner_log.manifest, Vocabulary.fit(corner_log), corner_log.candidate_table()
    )

    assert torch.equal(turned.rows.slates, table.rows.slates)
    assert turned.session_ids.to_list() == table.session_ids.to_list()


def test_a_log_of_clicks_alone_has_empty_slates(tmp_path: Path, corner_rows: pl.DataFrame) -> None:
    manifest = Manifest(
        loop="corner",
        source="by-hand",
        evidence="clicks",
        ratio_assumption="full_slate",
        responses="choice",
        slate_size=0,
    )
    nothing = [pl.lit(None).alias(name) for name in ("slate", "clicked", "purchased", "candidates", "exposed")]
    rows = corner_rows.with_columns(*nothing, candidates_digest=None)
    write_log(tmp_path / "clicks", manifest, [rows], pl.DataFrame({"item_id": ["apple", "lemon", "plum"]}))

    batch = table_of(open_log(tmp_path / "clicks")).batch(torch.arange(3))

    assert batch.slates.shape == (3, 3, 0)
    assert batch.candidates.shape == (3, 3, 0)
    assert batch.context.shape == (3, 3, 0)
    assert batch.events[0, 2, -2:].tolist() == [3, 2]


# --- reading in batches


def test_every_session_comes_once_in_a_pass(storefront_log: Log) -> None:
    reader = SessionReader(storefront_log, Vocabulary.fit(storefront_log))

    plain = list(reader.batches(64))
    drawn = [batch for sample in reader.samples(64, torch.Generator().manual_seed(1), 2) for batch in sample]

    n_sessions = storefront_log.scan().select(pl.col("session_id").n_unique()).collect().item()
    for batches in (plain, drawn):
        assert sum(len(batch.users) for batch in batches) == n_sessions
        assert sum(int(batch.mask.sum()) for batch in batches) == storefront_log.manifest.n_requests
        assert float(sum(batch.rewards.sum() for batch in batches)) == pytest.approx(
            float(sum(batch.rewards.sum() for batch in plain))
        )


def test_batches_hold_sessions_of_like_length(storefront_log: Log) -> None:
    batches = list(SessionReader(storefront_log, Vocabulary.fit(storefront_log)).batches(50))

    for shorter, longer in itertools.pairwise(batches):
        assert int(shorter.lengths.max()) <= int(longer.lengths.min())


def test_samples_are_of_mixed_lengths_and_their_pieces_are_not(storefront_log: Log) -> None:
    reader = SessionReader(storefront_log, Vocabulary.fit(storefront_log))

    samples = list(reader.samples(64, torch.Generator().manual_seed(3), 4))

    mean = storefront_log.manifest.n_requests / 400
    for sample in samples[:-1]:
        lengths = torch.cat([batch.lengths for batch in sample])
        assert len(lengths) == 64 and len(sample) == 4
        assert abs(float(lengths.float().mean()) - mean) < 4 * float(lengths.float().std()) / 8
        for shorter, longer in itertools.pairwise(sample):
            assert int(shorter.lengths.max()) <= int(longer.lengths.min())


def test_the_same_generator_gives_the_same_order(storefront_log: Log) -> None:
    reader = SessionReader(storefront_log, Vocabulary.fit(storefront_log))

    def order(seed: int) -> list[int]:
        samples = reader.samples(32, torch.Generator().manual_seed(seed))
        return torch.cat([batch.users for (batch,) in samples]).tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_a_log_in_several_parts_gives_the_sessions_of_the_log_in_one(
    corner_log: Log, write_corner: Callable[..., Log], corner_rows: pl.DataFrame
) -> None:
    vocabulary = Vocabulary.fit(corner_log)
    late = pl.col("session_id") > "s1"
    cut = write_corner(corner_rows.filter(~late), corner_rows.filter(late), name="cut")

    tables = list(SessionReader(cut, vocabulary).tables())
    (whole,) = SessionReader(corner_log, vocabulary).tables()

    assert len(tables) == 2
    assert torch.equal(torch.cat([table.rows.slates for table in tables]), whole.rows.slates)
    assert pl.concat([table.session_ids for table in tables]).to_list() == whole.session_ids.to_list()


def test_a_sample_draws_whole_sessions_from_all_parts_alike(storefront_log: Log, tmp_path: Path) -> None:
    rows = storefront_log.scan().collect()
    ids = rows["session_id"].unique().sort()
    late = pl.col("session_id").is_in(ids[len(ids) // 2 :].implode())
    cut = write_log(
        tmp_path / "cut", storefront_log.manifest, [rows.filter(~late), rows.filter(late)], storefront_log.items()
    )
    reader = SessionReader(cut, Vocabulary.fit(cut))
    lengths = dict(rows.group_by("session_id").len().iter_rows())

    drawn = [reader.sample(20, torch.Generator().manual_seed(seed)) for seed in range(40)]

    for table in drawn:
        assert len(set(table.session_ids)) == 20
        assert table.lengths.tolist() == [lengths[session] for session in table.session_ids]
    # 800 draws without preference: 400 from the later half, give or take four standard deviations.
    assert abs(sum(table.session_ids.is_in(ids[len(ids) // 2 :].implode()).sum() for table in drawn) - 400) < 60
    assert drawn[0].session_ids.to_list() != drawn[1].session_ids.to_list()
    again = reader.sample(20, torch.Generator().manual_seed(0))
    assert again.session_ids.to_list() == drawn[0].session_ids.to_list()


def test_a_sample_of_a_small_log_is_all_of_it(corner_log: Log) -> None:
    reader = SessionReader(corner_log, Vocabulary.fit(corner_log))
    (whole,) = reader.tables()
    assert reader.sample(1_000, torch.Generator()).session_ids.to_list() == whole.session_ids.to_list()


def test_storefront_rows_keep_their_log_probs_and_candidates(storefront_log: Log) -> None:
    table = table_of(storefront_log)
    rows = storefront_log.scan().collect()

    assert table.rows.log_probs[:, 0].tolist() == rows["slate_log_prob"].to_list()
    names = Vocabulary.fit(storefront_log).ids(table.rows.candidates[:, 0].flatten())
    assert names == rows["candidates"].explode().to_list()


def test_log_probs_of_positions_are_padded_and_unknown_where_they_are_null(
    corner_rows: pl.DataFrame, write_corner: Callable[..., Log], corner_log: Log
) -> None:
    lists = [[-1.0, -0.5, -0.25], [-2.0, -1.0], None, [-3.0], [0.0]]
    rows = corner_rows.with_columns(position_log_probs=pl.Series(lists, dtype=pl.List(pl.Float64)))

    read = table_of(write_corner(rows, name="known")).rows.position_log_probs

    assert read is not None
    expected = [[-1.0, -0.5, -0.25], [-2.0, -1.0, 0.0], [math.nan] * 3, [-3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    np.testing.assert_array_equal(read[:, 0].numpy(), expected)
    assert table_of(corner_log).rows.position_log_probs is None


def test_storefront_rows_keep_the_log_probs_of_their_positions(storefront_log: Log) -> None:
    table = table_of(storefront_log)
    assert table.rows.position_log_probs is not None
    np.testing.assert_allclose(table.rows.position_log_probs.sum(2), table.rows.log_probs, rtol=1e-12)
