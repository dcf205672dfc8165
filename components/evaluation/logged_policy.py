"""Ask policies what a log needs to know: log_probs of its slates, ESS, and where they rank what users chose."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from components.errors import InputError
from components.evaluation.direct_method import SampledSlates
from components.evaluation.logged_requests import KnownRewards, LoggedRequests, Positions
from components.evaluation.ncis import one_request_sums
from components.evaluation.ratio_sums import RatioSums, merge_shards
from components.evaluation.weights import default_cap
from components.interactions.batching import SessionBatch, SessionReader, Sessions
from components.interactions.contract import RatioAssumption
from components.policies.ranking_policy import NeuralSlatePolicy
from components.policies.slate_policy import SlatePolicy
from components.world_model.environment import WorldModel
from components.world_model.user_model import next_items

BATCH_SESSIONS = 1_024
#: Steps along the path from the logging policy (0) to the trained one (1), furthest first.
STRENGTHS = tuple(step / 40 for step in range(40, 0, -1))


@torch.inference_mode()
def _position_log_probs(policy: SlatePolicy, batch: SessionBatch) -> Float[Tensor, "M K"]:
    flat = batch.mask.flatten()
    requests, slates = batch.requests().select(flat), batch.slates.flatten(0, 1)[flat]
    return policy.log_prob(policy.states(batch).select(flat), requests, slates).double()


@dataclass(frozen=True)
class JudgedRequests:
    """The requests of a log, or of a part of it, whose reward is known: what estimates are made from."""

    requests: LoggedRequests
    in_whole_session: Bool[np.ndarray, " M"]
    """Whether the rewards of the request's whole session are known."""
    known: Bool[np.ndarray, " L"]
    """Which of the log's requests these are."""
    ends_known: bool
    """Whether any session of theirs is known to have ended."""
    slates: SampledSlates | None = None
    """What a world model says of these requests, where one was asked."""

    @property
    def rewards(self) -> KnownRewards:
        """What is known of them, if this is the whole log."""
        return KnownRewards(
            n_requests=len(self.known),
            n_known=len(self.requests.rewards),
            n_whole_sessions=len(np.unique(self.requests.session[self.in_whole_session])),
            lowest=float(self.requests.rewards.min()),
            highest=float(self.requests.rewards.max()),
            ends_known=self.ends_known,
        )

    @property
    def whole_sessions(self) -> LoggedRequests:
        """Those of sessions without an unknown reward: what estimates of sessions are made from."""
        return self.requests.take(self.in_whole_session)


def known_rewards(sessions: Sessions) -> KnownRewards:
    """What is known of a log's rewards."""
    found = KnownRewards()
    for batch in sessions.batches(BATCH_SESSIONS):
        rewards = batch.rewards.double().sum(2)[batch.mask & batch.reward_known].numpy()
        found = KnownRewards(
            n_requests=found.n_requests + int(batch.mask.sum()),
            n_known=found.n_known + len(rewards),
            n_whole_sessions=found.n_whole_sessions + int(batch.rewarded.sum()),
            lowest=float(rewards.min(initial=found.lowest)),
            highest=float(rewards.max(initial=found.highest)),
            ends_known=found.ends_known or bool(batch.left.any()),
        )
    return found


def judged_parts(
    reader: SessionReader,
    target: SlatePolicy,
    ratio: RatioAssumption = RatioAssumption.FULL_SLATE,
    sample: Callable[[Sessions], SampledSlates] | None = None,
) -> Iterator[JudgedRequests]:
    """The requests of a log, part by part; parts without a known reward are left out.

    Args:
        reader: of the log.
        target: the policy that is judged.
        ratio: the one that estimates will use.
        sample: asks a world model what it expects of a part.

    Raises:
        InputError: the ratio is `cascade` and the log_probs of some request's positions are unknown.
    """
    for table in reader.tables():
        if table.rows.reward_known.any():
            judged = logged_requests(table, target, ratio)
            yield judged if sample is None else replace(judged, slates=sample(table).take(judged.known))


def judged_sums(reader: SessionReader, target: SlatePolicy, ratio: RatioAssumption, cap: float) -> RatioSums:
    """Sums of one-request NCIS over a log that is judged part by part.

    Args:
        reader: of a log with at least one known reward.
        target: the policy that is judged.
        ratio: the one that weighs.
        cap: of the weights; the same for each part.

    Raises:
        InputError: the ratio is `cascade` and the log_probs of some request's positions are unknown.
    """
    parts = judged_parts(reader, target, ratio)
    return merge_shards({"log": one_request_sums(part.requests, cap, ratio)} for part in parts)["log"]


def ratio_of(*readers: SessionReader) -> RatioAssumption:
    """The ratio by which policies are judged on logs: the narrowest that is valid on all of them.

    The cascade's, where each log declares that what a user does at a position depends on those above it alone, its
    positions are answered one by one, and the log_prob of each is known at every request; else the whole slate's. The
    one place that decides it: the release is chosen by the ratio that the gate will read.
    """
    cascade = all(reader.log.manifest.is_cascade and reader.knows_position_log_probs for reader in readers)
    return RatioAssumption.CASCADE if cascade else RatioAssumption.FULL_SLATE


def logged_requests(
    sessions: Sessions, target: SlatePolicy, ratio: RatioAssumption = RatioAssumption.FULL_SLATE
) -> JudgedRequests:
    """The requests of a log with both policies' log_probs.

    Args:
        sessions: the log; at least one of its rewards is known.
        target: the policy that is judged.
        ratio: the one that estimates will use; for the cascade the positions are read too.

    Raises:
        InputError: the ratio is `cascade` and the log_probs of some request's positions are unknown.
    """
    columns: dict[str, list[Tensor]] = defaultdict(list)
    n_sessions = 0
    for batch in sessions.batches(BATCH_SESSIONS):
        mask = batch.mask
        rows, step = torch.nonzero(mask, as_tuple=True)
        rewards, target_log_probs = batch.rewards.double()[mask], _position_log_probs(target, batch)
        by_position = {}
        if ratio is RatioAssumption.CASCADE:
            if batch.position_log_probs is None:
                raise InputError("ratio: 'cascade' needs the log_prob of each position; this log has none")
            by_position = {
                "rewards": rewards,
                "behavior_log_probs": batch.position_log_probs[mask],
                "target_log_probs": target_log_probs,
            }
        for name, values in {
            **{f"positions.{name}": values for name, values in by_position.items()},
            "rewards": rewards.sum(1),
            "target_log_probs": target_log_probs.sum(1),
            "known": batch.reward_known[mask],
            "whole": batch.rewarded[rows],
            "ended": batch.left[mask],
            "behavior_log_probs": batch.log_probs[mask],
            "user": batch.users[rows],
            "session": rows + n_sessions,
            "step": step,
        }.items():
            columns[name].append(values)
        n_sessions += len(batch.users)
    arrays = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
    known, in_whole_session, ended = (arrays.pop(name) for name in ("known", "whole", "ended"))
    positions = None
    if ratio is RatioAssumption.CASCADE:
        positions = Positions(**{field.name: arrays.pop(f"positions.{field.name}") for field in fields(Positions)})
    requests = LoggedRequests(positions=positions, **arrays)
    return JudgedRequests(requests.take(known), in_whole_session[known], known, bool(ended.any()))


@dataclass(frozen=True)
class HitRates:
    """Where a policy ranks the item that the user chose."""

    hit_rate_1: float
    hit_rate_10: float
    n_requests: int


@torch.inference_mode()
def ranking_quality(policy: SlatePolicy, reader: SessionReader, world: WorldModel, seed: int) -> HitRates:
    """Hit rates of the chosen item: within the logged candidates, or where a log has none, among the retrieved ones.

    A chosen item that was not retrieved counts as missed.
    """
    generator = torch.Generator().manual_seed(seed)
    hits_1 = hits_10 = n_requests = 0
    for batch in reader.batches(BATCH_SESSIONS):
        flat = batch.mask.flatten()
        state, requests = policy.states(batch).select(flat), batch.requests().select(flat)
        if reader.log.manifest.slate_size == 0:
            chosen = next_items(batch).flatten()[flat]
            requests = replace(requests, candidates=world.retrieve(state, generator))
        else:
            slates, clicks = batch.slates.flatten(0, 1)[flat], batch.clicks.flatten(0, 1)[flat]
            chosen = (slates * (clicks > 0)).amax(1)
        rows = torch.nonzero(chosen > 0)[:, 0]
        if len(rows) == 0:
            continue
        requests, chosen = requests.select(rows), chosen[rows]
        order = policy.logits(state.select(rows), requests).argsort(dim=1, descending=True, stable=True)
        ranked = requests.candidates.gather(1, order) == chosen[:, None]
        hits_1 += int(ranked[:, :1].any(1).sum())
        hits_10 += int(ranked[:, :10].any(1).sum())
        n_requests += len(rows)
    return HitRates(hits_1 / max(n_requests, 1), hits_10 / max(n_requests, 1), n_requests)


@dataclass(frozen=True)
class ReleaseChoice:
    """How far along the path the release lies, and what the log has left there."""

    strength: float
    ess_share: float
    """Effective requests of the log as a share of its requests with a known reward; 0 where it has none."""
    n_known: int
    """Requests of the log whose reward is known."""


def choose_strength(
    policy: NeuralSlatePolicy, validation: SessionReader, required_share: float, ratio: RatioAssumption
) -> ReleaseChoice:
    """Set a policy's strength to the largest whose ESS share on a log reaches what is required; 0 where none does.

    Along π ∝ behavior^(1−α) · trained^α the ESS falls as α grows, so this is the pull toward the logging policy in its
    last and exact form: what is released is what the log can still judge. The ESS is that of one-request NCIS by this
    ratio, as the gate reads it.
    """
    n_known = known_rewards(validation).n_known

    def ess_share() -> float:
        return judged_sums(validation, policy, ratio, default_cap(n_known)).effective.value / n_known

    if n_known == 0:
        policy.strength.fill_(0.0)
        return ReleaseChoice(0.0, 0.0, n_known)
    for strength in STRENGTHS:
        policy.strength.fill_(strength)
        share = ess_share()
        if share >= required_share:
            return ReleaseChoice(strength, share, n_known)
    policy.strength.fill_(0.0)
    return ReleaseChoice(0.0, ess_share(), n_known)
