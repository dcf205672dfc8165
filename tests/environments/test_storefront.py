import itertools
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
import torch

from components.environments.rollout import log_rows, rollout
from components.environments.storefront import (
    FEEDBACK_DELAY,
    FIRST_DAY,
    MAX_STEPS,
    REQUEST_GAP,
    BehaviorPolicy,
    Config,
    Storefront,
    StorefrontState,
    write_storefront_log,
)
from components.interactions.batching import SessionBatch, read_sessions
from components.interactions.contract import Evidence, RatioAssumption
from components.interactions.log_folder import Log, open_log, write_log
from components.interactions.vocabulary import FIRST_ITEM, Vocabulary
from components.policies.slate_policy import OraclePolicy, SlatePolicy, UniformPolicy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sessions(shop: Storefront, policy: SlatePolicy, n: int) -> SessionBatch:
    return rollout(shop, policy, torch.arange(n) % shop.n_users, generator(5), MAX_STEPS)


def test_the_same_seed_gives_the_same_log_in_another_folder(storefront_config: Config, tmp_path: Path) -> None:
    config = storefront_config.model_copy(update={"n_sessions": 60})
    logs = [write_storefront_log(config, "shop", tmp_path / name) for name in ("one", "two")]
    other = write_storefront_log(config.model_copy(update={"log_seed": 2}), "shop", tmp_path / "other")

    assert logs[0].manifest == logs[1].manifest
    assert logs[0].manifest.content_digest != other.manifest.content_digest


def test_the_log_says_what_its_numbers_are_worth(storefront_log: Log, storefront_config: Config) -> None:
    manifest = open_log(storefront_log.path).manifest

    assert manifest.evidence is Evidence.PROPENSITIES
    assert manifest.ratio_assumption is RatioAssumption.CASCADE
    assert manifest.n_requests == storefront_log.scan().select(pl.len()).collect().item()
    assert (
        storefront_log.scan().select(pl.col("session_id").n_unique()).collect().item() == storefront_config.n_sessions
    )
    assert storefront_log.items()["item_id"].n_unique() == storefront_config.n_items


def test_slates_hold_distinct_candidates(storefront_log: Log, storefront_config: Config) -> None:
    rows = storefront_log.scan().select("slate", "candidates").collect()

    assert (rows["slate"].list.n_unique() == storefront_config.slate_size).all()
    assert (rows["candidates"].list.n_unique() == storefront_config.n_candidates).all()
    assert (rows["slate"].list.set_difference(rows["candidates"]).list.len() == 0).all()


def test_purchases_are_clicked_and_sessions_end_once(storefront_log: Log) -> None:
    rows = storefront_log.scan().collect()
    flat = rows.select("clicked", "purchased").explode("clicked", "purchased")
    ends = rows.group_by("session_id").agg(pl.col("session_end").drop_nulls().len(), pl.col("step").max() + 1, pl.len())

    assert not (flat["purchased"] & ~flat["clicked"]).any()
    assert (ends["session_end"] == 1).all()
    assert (ends["step"] == ends["len"]).all()


def test_times_lie_in_the_log_s_days_and_feedback_follows(storefront_log: Log, storefront_config: Config) -> None:
    rows = storefront_log.scan().select("timestamp", "available_at").collect()

    assert rows["timestamp"].min() >= FIRST_DAY
    assert rows["timestamp"].max() < FIRST_DAY + timedelta(days=storefront_config.days) + MAX_STEPS * REQUEST_GAP
    assert (rows["available_at"] - rows["timestamp"] == FEEDBACK_DELAY).all()


def test_the_logged_log_prob_is_that_of_the_behavior_policy(storefront_log: Log, storefront: Storefront) -> None:
    vocabulary = Vocabulary.fit(storefront_log)
    table = read_sessions(
        storefront_log.scan().collect(), storefront_log.manifest, vocabulary, storefront_log.candidate_table()
    )
    policy = BehaviorPolicy(storefront)

    asked = policy.log_prob(policy.states(table.rows), table.rows.requests(), table.rows.slates[:, 0])

    assert torch.allclose(asked.double().sum(1), table.rows.log_probs[:, 0], atol=1e-5)


def test_the_behavior_policy_keeps_its_stated_floor(storefront_config: Config) -> None:
    shop = Storefront(storefront_config.model_copy(update={"behavior_sharpness": 1.5}))
    policy = BehaviorPolicy(shop)
    requests = shop.observe(shop.reset(torch.arange(shop.n_users), generator()))

    logits = policy.logits(policy.start(requests), requests)

    spread = logits.max(1).values - logits.min(1).values
    assert float(spread.max()) <= 2 * 1.5
    assert float(spread.max()) > 1.5


def slate_overlap(personal: float) -> float:
    """Mean share of items that the oracle's slates for two users have in common when both have the same candidates."""
    shop = Storefront(Config(n_users=200, n_sessions=10, n_items=60, personal=personal), reveal_truth=True)
    state = shop.reset(torch.arange(200), generator())
    state = replace(state, candidates=state.candidates[:1].expand(200, -1))
    requests = shop.observe(state)
    oracle = OraclePolicy(shop.slate_size)
    slates = oracle.act(oracle.start(requests), requests, generator(1)).slates
    shown = torch.nn.functional.one_hot(slates, 60 + FIRST_ITEM).sum(1).float()
    common = shown @ shown.T / shop.slate_size
    return float((common.sum() - common.diagonal().sum()) / (200 * 199))


def test_the_dial_leads_from_one_slate_for_all_to_a_slate_for_each() -> None:
    alike, personal = slate_overlap(0.0), slate_overlap(1.0)

    # By chance two slates of 4 of 20 candidates share a fifth.
    assert alike > 0.75
    assert personal < 0.5


def test_the_oracle_earns_more_than_the_old_system_and_that_more_than_chance(storefront_config: Config) -> None:
    shop = Storefront(storefront_config, reveal_truth=True)
    policies = (OraclePolicy(shop.slate_size), BehaviorPolicy(shop), UniformPolicy(shop.slate_size))

    rewards = [sessions(shop, policy, 6_000).rewards.sum((1, 2)) for policy in policies]

    for better, worse in itertools.pairwise(rewards):
        error = (better.var() / len(better) + worse.var() / len(worse)).sqrt()
        assert float(better.mean() - worse.mean()) > 3 * float(error)


def test_a_shift_turns_segments_tastes_by_its_share_of_half_a_circle_and_nothing_else(
    storefront_config: Config, storefront: Storefront
) -> None:
    kept = ("category", "price", "rating", "quality", "latent", "segment", "affinity")
    closeness = []
    for share, cosine in ((0.25, 0.5**0.5), (0.5, 0.0), (1.0, -1.0)):
        shop = Storefront(storefront_config.model_copy(update={"taste_shift": share}))
        for name in kept:
            assert torch.equal(getattr(shop, name), getattr(storefront, name)), name
        turned = (shop.segment_interest * storefront.segment_interest).sum(1)
        assert torch.allclose(turned, torch.full_like(turned, cosine), atol=1e-5)
        assert torch.allclose(shop.interest.norm(dim=1), torch.ones(shop.n_users))
        closeness.append(float((shop.interest * storefront.interest).sum(1).mean()))
    # Users follow their segment, and keep what sets them apart from it.
    assert 1 > closeness[0] > closeness[1] > closeness[2] > -1


def test_after_a_shift_the_old_system_earns_less(storefront_config: Config) -> None:
    shops = [Storefront(storefront_config.model_copy(update={"taste_shift": share})) for share in (0.0, 1.0)]

    before, after = (sessions(shop, BehaviorPolicy(shop), 4_000).rewards.sum((1, 2)) for shop in shops)

    assert float(after.mean()) < 0.85 * float(before.mean())


def test_sessions_of_the_default_shop_have_three_to_five_requests() -> None:
    shop = Storefront(Config())

    lengths = sessions(shop, BehaviorPolicy(shop), 1_500).lengths.float()

    assert 3.0 < float(lengths.mean()) < 5.0


def test_good_slates_make_sessions_longer(storefront_config: Config) -> None:
    shop = Storefront(storefront_config, reveal_truth=True)

    oracle, chance = (
        sessions(shop, policy, 1_000).lengths.float().mean()
        for policy in (OraclePolicy(shop.slate_size), UniformPolicy(shop.slate_size))
    )

    assert float(oracle) > 1.2 * float(chance)


def test_a_log_read_back_equals_the_rollout_that_it_came_from(storefront: Storefront, tmp_path: Path) -> None:
    users = torch.arange(80) % 50
    batch = rollout(storefront, BehaviorPolicy(storefront), users, generator(9), max_steps=4)
    rows = log_rows(
        batch,
        manifest=storefront.manifest("shop"),
        item_ids=storefront.item_ids,
        user_ids=[f"user-{number:03d}" for number in range(storefront.n_users)],
        started=pl.Series([FIRST_DAY] * 80),
        request_gap=REQUEST_GAP,
        feedback_delay=FEEDBACK_DELAY,
        policy="old",
    )
    write_log(tmp_path / "log", storefront.manifest("shop"), [rows], storefront.items())

    log = open_log(tmp_path / "log")
    table = read_sessions(log.scan().collect(), log.manifest, Vocabulary.fit(log), log.candidate_table())
    back = table.batch(torch.arange(80))

    assert bool((batch.leave_observed[batch.mask] == 0).any()), "no session was censored: the test is too easy"
    same_user = [codes[:, None] == codes for codes in (batch.users, back.users)]
    assert torch.equal(*same_user)
    for name in set(batch.__dataclass_fields__) - {"users"}:
        before, after = getattr(batch, name), getattr(back, name)
        assert before.shape == after.shape, name
        assert bool((before == after).all()), name


@pytest.fixture
def visitors(storefront: Storefront) -> StorefrontState:
    return storefront.reset(torch.arange(20_000) % storefront.n_users, generator(2))


def test_feedback_at_a_position_does_not_depend_on_the_items_below_it(
    storefront: Storefront, visitors: StorefrontState
) -> None:
    one = visitors.candidates[:, :4]
    two = torch.cat([one[:, :2], visitors.candidates[:, 4:6]], dim=1)

    first, second = (storefront.step(visitors, slates, generator(seed))[0] for slates, seed in ((one, 3), (two, 4)))

    for name in ("clicks", "purchases"):
        a, b = getattr(first, name)[:, :2], getattr(second, name)[:, :2]
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert bool(((a.mean(0) - b.mean(0)).abs() < 4 * error).all()), name
    # With the same chance it is even the same feedback, user by user.
    same_chance, _ = storefront.step(visitors, two, generator(3))
    assert torch.equal(first.clicks[:, :2], same_chance.clicks[:, :2])
    assert torch.equal(first.purchases[:, :2], same_chance.purchases[:, :2])


def test_feedback_at_a_position_depends_on_the_items_above_it(
    storefront: Storefront, visitors: StorefrontState
) -> None:
    click, _ = storefront.click_and_purchase(visitors.interest, visitors.sensitivity, visitors.candidates)
    ranked = visitors.candidates.gather(1, click.argsort(dim=1, descending=True))
    below = ranked[:, 4:5]
    good, bad = torch.cat([ranked[:, :3], below], dim=1), torch.cat([ranked[:, -3:], below], dim=1)

    after_good, after_bad = (
        storefront.step(visitors, slates, generator(3))[0].clicks[:, 3].mean() for slates in (good, bad)
    )

    assert float(after_good) < 0.9 * float(after_bad)


def test_truth_is_revealed_only_where_asked_for(storefront_config: Config) -> None:
    for reveal in (False, True):
        shop = Storefront(storefront_config, reveal_truth=reveal)
        requests = shop.observe(shop.reset(torch.arange(3), generator()))
        assert (requests.truth is not None) == reveal


def test_revealed_truth_is_the_expected_reward_of_an_examined_item(storefront_config: Config) -> None:
    shop = Storefront(storefront_config, reveal_truth=True)
    one = shop.reset(torch.tensor([3]), generator())
    n = 40_000
    state = StorefrontState(
        **{
            name: getattr(one, name).expand(n, *[-1] * (getattr(one, name).dim() - 1))
            for name in one.__dataclass_fields__
        }
    )

    feedback, _ = shop.step(state, one.candidates[:, :4].expand(n, -1), generator(1))

    truth = shop.observe(one).truth
    assert truth is not None
    earned = feedback.clicks[:, 0] + 3 * feedback.purchases[:, 0]
    assert abs(float(earned.mean() - truth[0, 0])) < 4 * float(earned.std()) / n**0.5
