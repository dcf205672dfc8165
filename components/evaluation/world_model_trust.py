"""How far the world model can be trusted: on sessions that it never saw, and on sessions that it makes up.

Held-out likelihood against the best constant rate, calibration (does what is predicted at p happen at rate p?) of
clicks, purchases and leaving, and generated sessions against the real ones whose requests they replay, both under the
logging policy: length and reward, and whether a classifier tells them apart (`two_sample`). What it says of other
policies is asked in `exploit_probes`; `trust_score` puts the parts together.

Where a log never tells whether a user went on, neither does its world model: generated sessions are as long as those
that they replay. Lengths then compare nothing, and what a session earns is not known. What single requests earn and
where they are clicked is, and has to agree instead.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from components.environments.rollout import position_rewards
from components.errors import InputError
from components.evaluation.trust_score import TrustPart, limited, right_or_wrong, unknown
from components.evaluation.two_sample import TwoSampleTest
from components.interactions.batching import SessionBatch, SessionReader
from components.world_model.user_model import FlatRequests, UserModel, next_items

LENGTH, REWARD = "requests of a session", "reward of a session"
REQUEST_REWARD, CLICKS_AT = "reward of a request", "clicks at position {}"
N_BINS = 10
BATCH_SESSIONS = 1_024


class TrustConfig(BaseModel):
    """Where trust in the world model ends. Limits can be made stricter than their defaults, never milder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_calibration_error: float = Field(
        default=0.03, gt=0, le=0.03, description="Largest expected calibration error of clicks, purchases or leaving."
    )
    max_session_gap: float = Field(
        default=0.15,
        gt=0,
        le=0.15,
        description="Largest relative gap between generated and real sessions in mean length and reward, or between "
        "expected and real requests where no session's end is known; two standard errors around it must lie within.",
    )
    max_two_sample_auc: float = Field(
        default=0.6,
        gt=0.5,
        le=0.6,
        description="Largest area under the ROC curve of a classifier that tells generated sessions from real ones; "
        "its whole interval must lie below.",
    )
    max_exploit_gap: float = Field(
        default=0.15,
        gt=0,
        le=0.15,
        description="Share of the logged mean by which a policy's value in the world model may exceed its value by the "
        "log; a gap whose whole interval lies above is an exploit.",
    )
    min_rank_agreement: float = Field(
        default=0.8,
        ge=0.8,
        lt=1,
        description="Share of pairs of probe policies that the log tells apart and the world model must order alike.",
    )
    max_outside_share: float = Field(
        default=0.1,
        gt=0,
        le=0.1,
        description="Largest share of a policy's first items that the logging policy shows less often than a tenth of "
        "chance.",
    )
    sessions: int = Field(
        default=6_000,
        ge=100,
        description="Test sessions replayed for the comparison; all of them where there are fewer.",
    )


class Calibration(BaseModel):
    """Predicted probabilities against what happened, in bins of equal count."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    response: str
    predicted: tuple[float, ...] = Field(description="Mean prediction of each bin.")
    observed: tuple[float, ...] = Field(description="Rate at which it happened in each bin.")
    error: float = Field(description="Mean distance of the two, weighted by the bins' counts.")
    n: int = Field(description="Predictions judged.")


class GeneratedAgainstReal(BaseModel):
    """One mean over sessions, of real and of generated ones; or over requests, of what is heard and expected."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    quantity: str
    real: float
    generated: float
    gap: float = Field(description="(generated − real) / real.")
    standard_error: float = Field(description="Of the gap.")


class WorldModelTrust(BaseModel):
    """The trust report."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    click_nats: float = Field(description="Held-out negative log-likelihood of a click event, in nats.")
    baseline_nats: float = Field(description="The same of the best predictor that sees no session.")
    baseline: str = Field(description="What that predictor is.")
    calibrations: tuple[Calibration, ...]
    sessions: tuple[GeneratedAgainstReal, ...] = Field(description="Of requests where no session's end is known.")
    two_sample: TwoSampleTest | None = Field(
        description="Generated against real sessions; None where too few can be compared, or all are alike."
    )
    discriminator_accuracy: float | None = Field(
        default=None, description="Held-out share of sessions that the discriminator tells apart; 0.5 is chance."
    )
    parts: tuple[TrustPart, ...] = Field(description="What was checked and seen.")


def calibration(
    response: str, predicted: Float[Tensor, " M"], happened: Float[Tensor, " M"], n_bins: int = N_BINS
) -> Calibration:
    """Expected calibration error Σ_b n_b / n · |mean predicted − mean happened| over bins of equal count."""
    order = predicted.argsort()
    bins = [chunk for chunk in order.tensor_split(n_bins) if len(chunk)]
    means = [(float(predicted[chunk].mean()), float(happened[chunk].mean()), len(chunk)) for chunk in bins]
    error = sum(n * abs(mean - rate) for mean, rate, n in means) / max(len(predicted), 1)
    return Calibration(
        response=response,
        predicted=tuple(mean for mean, _, _ in means),
        observed=tuple(rate for _, rate, _ in means),
        error=error,
        n=len(predicted),
    )


@torch.inference_mode()
def response_calibrations(user_model: UserModel, reader: SessionReader) -> tuple[Calibration, ...]:
    """Calibration of clicks, purchases and leaving on logged sessions; what was never observed is left out."""
    collected: dict[str, list[tuple[Tensor, Tensor]]] = {"clicks": [], "purchases": [], "leaving": []}
    for batch in reader.batches(BATCH_SESSIONS):
        state, flat = user_model.encoder.states(batch), FlatRequests.of(batch)
        if user_model.slate_size:
            probabilities = user_model.click_probabilities(state, flat.slates, flat.clicks)
            collected["clicks"].append((probabilities[flat.observed], flat.clicks[flat.observed]))
            bought = flat.purchase_observed & (flat.clicks > 0)
            purchase = torch.sigmoid(user_model.encoder.purchase_logits(state, flat.slates))
            collected["purchases"].append((purchase[bought], flat.purchases[bought]))
        leave = torch.sigmoid(user_model.leave_logits(state, flat.slates, flat.clicks, flat.purchases))
        collected["leaving"].append((leave[flat.leave_observed], flat.left[flat.leave_observed].float()))
    judged = {name: tuple(map(torch.cat, zip(*pairs, strict=True))) for name, pairs in collected.items() if pairs}
    return tuple(
        calibration(name, predicted, happened) for name, (predicted, happened) in judged.items() if len(predicted)
    )


def baseline_nats(user_model: UserModel, reader: SessionReader, counts: Float[Tensor, " V"]) -> tuple[str, float]:
    """Held-out click likelihood of the best predictor that sees no session, and what it is.

    Raises:
        InputError: the log holds no click that is known.
    """
    if user_model.slate_size == 0:
        log_p = ((counts + 1.0) / (counts[1:] + 1.0).sum()).log()
        targets = [next_items(batch)[batch.mask] for batch in reader.batches(BATCH_SESSIONS)]
        items = torch.cat(targets)
        _require((items > 0).any(), reader, "next item")
        return "popularity", float(-log_p[items[items > 0].long()].mean())
    clicks, observed = _position_counts(reader)
    _require(observed.any(), reader, "position whose click is known")
    if user_model.responses == "choice":
        rate = torch.cat([clicks, (observed.max() - clicks.sum()).clamp(min=0.0)[None]])
        log_p = (rate / rate.sum()).clamp(min=1e-12).log()
        return "display position", float(-(rate * log_p).sum() / rate.sum())
    rate = (clicks / observed.clamp(min=1.0)).clamp(1e-6, 1.0 - 1e-6)
    loss = -(clicks * rate.log() + (observed - clicks) * (1.0 - rate).log())
    return "click rate of each position", float(loss.sum() / observed.sum())


def _require(there_is_one: Tensor, reader: SessionReader, what: str) -> None:
    if not bool(there_is_one):
        raise InputError(f"{reader.log.path}: holds no {what}, so the world model cannot be judged on it")


def _position_counts(reader: SessionReader) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    clicks, observed = [], []
    for batch in reader.batches(BATCH_SESSIONS):
        clicks.append((batch.clicks * batch.observed).sum((0, 1)))
        observed.append(batch.observed.float().sum((0, 1)))
    return torch.stack(clicks).sum(0), torch.stack(observed).sum(0)


def compare_sessions(
    real: list[SessionBatch], generated: SessionBatch, *, with_reward: bool
) -> tuple[GeneratedAgainstReal, ...]:
    """Mean length and reward of real and generated sessions, both under the logging policy.

    Sessions with a censored end are left out, on both sides: their full length is unknown. Both sides must be cut after
    the same number of requests. Rewards are compared on sessions in which all of them are known. What cannot be
    compared, as there are fewer than two sessions or nothing real to relate a gap to, is left out.
    """
    quantities: dict[str, Callable[[SessionBatch], Tensor]] = {
        LENGTH: lambda batch: batch.lengths.double()[_ended(batch)]
    }
    if with_reward:
        quantities[REWARD] = lambda batch: batch.rewards.double().sum((1, 2))[_ended(batch) & batch.rewarded]
    compared = []
    for quantity, measure in quantities.items():
        true = torch.cat([measure(batch) for batch in real]).numpy()
        made = measure(generated).numpy()
        if min(len(true), len(made)) < 2 or true.mean() == 0:
            continue
        mean = float(true.mean())
        spread = np.hypot(true.std(ddof=1) / np.sqrt(len(true)), made.std(ddof=1) / np.sqrt(len(made)))
        compared.append(
            GeneratedAgainstReal(
                quantity=quantity,
                real=mean,
                generated=float(made.mean()),
                gap=(float(made.mean()) - mean) / abs(mean),
                standard_error=float(spread / abs(mean)),
            )
        )
    return tuple(compared)


def _ended(batch: SessionBatch) -> Bool[Tensor, " B"]:
    return batch.left.any(1)


def tells_of_ends(sessions: SessionReader) -> bool:
    """Whether any request of a log says if its user stayed or left."""
    return any(bool(batch.leave_observed.any()) for batch in sessions.batches(BATCH_SESSIONS))


@torch.inference_mode()
def compare_requests(user_model: UserModel, reader: SessionReader) -> dict[str, GeneratedAgainstReal | None]:
    """Mean reward of a logged request, and clicks at each position, as heard and as expected of the same slates.

    With e what is expected of a request, r what was heard and g = Σ e / Σ r − 1 the gap, users are independent:

        ψ_u = Σ_{i of u} (e_i − (1 + g) r_i) / Σ r,    Var g = U / (U − 1) Σ_u ψ_u²

    Clicks are expected given those above them that took place. None where fewer than two users or nothing but zeros
    were heard; a position that no slate has is left out.

    Args:
        user_model: of slates.
        reader: a log that the model never saw.
    """
    reward, slate_size = reader.log.manifest.reward, user_model.slate_size
    names = [REQUEST_REWARD, *(CLICKS_AT.format(place + 1) for place in range(slate_size))]
    collected: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in names}
    for batch in reader.batches(BATCH_SESSIONS):
        state, flat = user_model.encoder.states(batch), FlatRequests.of(batch)
        users = batch.users[:, None].expand(batch.mask.shape).flatten()
        known = flat.mask & batch.reward_known.flatten()
        earned = position_rewards(reward, *user_model.expected_responses(state, flat.slates)).double().sum(1)
        heard = batch.rewards.double().sum(2).flatten()
        collected[REQUEST_REWARD].append((earned[known], heard[known], users[known]))
        clicks = user_model.click_probabilities(state, flat.slates, flat.clicks).double()
        for place, name in enumerate(names[1:]):
            seen = flat.observed[:, place]
            collected[name].append((clicks[seen, place], flat.clicks[seen, place].double(), users[seen]))
    columns = {
        name: [torch.cat(part).numpy() for part in zip(*parts, strict=True)] for name, parts in collected.items()
    }
    return {
        name: gap_of_requests(name, *parts)
        for name, parts in columns.items()
        if len(parts[0]) or name == REQUEST_REWARD
    }


def gap_of_requests(
    quantity: str, expected: Float[np.ndarray, " M"], heard: Float[np.ndarray, " M"], users: Int[np.ndarray, " M"]
) -> GeneratedAgainstReal | None:
    """What is expected of logged requests against what was heard, as `compare_requests` has it.

    Args:
        quantity: what is compared.
        expected: of each request.
        heard: at each request.
        users: code of each request's user.

    Returns:
        None where fewer than two users, or nothing but zeros, were heard.
    """
    found, codes = np.unique(users, return_inverse=True)
    total = float(heard.sum())
    if len(found) < 2 or total == 0:
        return None
    gap = (float(expected.sum()) - total) / abs(total)
    influence = np.bincount(codes, expected - heard - (gap * np.sign(total)) * heard) / total
    return GeneratedAgainstReal(
        quantity=quantity,
        real=total / len(heard),
        generated=float(expected.mean()),
        gap=gap,
        standard_error=float(np.sqrt(len(found) / (len(found) - 1) * np.square(influence).sum())),
    )


def judge_trust(
    *,
    click_nats: float,
    baseline: tuple[str, float],
    calibrations: tuple[Calibration, ...],
    sessions: tuple[GeneratedAgainstReal, ...],
    two_sample: TwoSampleTest | None,
    with_reward: bool,
    discriminator_accuracy: float | None,
    config: TrustConfig,
    requests: dict[str, GeneratedAgainstReal | None] | None = None,
) -> WorldModelTrust:
    """The trust report from its parts.

    A gap passes where it is known to lie within the limit, chance (two standard errors) included: few sessions prove
    nothing. `requests` is given where neither log nor world model tells of a session's end; they are then judged in
    place of the sessions, of which length and reward count neither way.
    """
    name, nats = baseline
    parts = [
        right_or_wrong(
            "likelihood gain",
            click_nats < nats,
            f"Held-out clicks cost {click_nats:.3f} nats; by {name} alone they cost {nats:.3f}.",
        ),
        *(calibration_part(part, config) for part in calibrations),
        *(_session_parts(sessions, with_reward, config) if requests is None else _request_parts(requests, config)),
    ]
    return WorldModelTrust(
        click_nats=click_nats,
        baseline_nats=nats,
        baseline=name,
        calibrations=calibrations,
        sessions=sessions if requests is None else tuple(part for part in requests.values() if part is not None),
        two_sample=two_sample,
        discriminator_accuracy=discriminator_accuracy,
        parts=(*parts, _told_apart(two_sample, config)),
    )


def _session_parts(
    sessions: tuple[GeneratedAgainstReal, ...], with_reward: bool, config: TrustConfig
) -> list[TrustPart]:
    compared = {part.quantity for part in sessions}
    return [
        *(gap_part(part, "Generated sessions differ", config) for part in sessions),
        *(
            right_or_wrong(
                quantity,
                False,
                f"Generated sessions cannot be compared in {quantity}: too few are known to have ended, real ones or "
                "those that the world model learned from.",
            )
            for quantity in (LENGTH, *([REWARD] if with_reward else []))
            if quantity not in compared
        ),
    ]


def _request_parts(requests: dict[str, GeneratedAgainstReal | None], config: TrustConfig) -> list[TrustPart]:
    """One part of each quantity of requests; what sessions would be asked for cannot be known."""
    parts = [
        unknown(
            LENGTH,
            "How long sessions are cannot be compared: the log never tells whether a user went on, so generated "
            "sessions end where the logged ones do.",
        ),
        unknown(REWARD, "What a session earns cannot be known either; what a request earns is compared instead."),
    ]
    for quantity, part in requests.items():
        if part is None:
            text = f"Requests cannot be compared in {quantity}: too few users, or nothing but zeros, were heard."
            parts.append(right_or_wrong(quantity, False, text))
        else:
            parts.append(gap_part(part, "What is expected of logged requests differs", config))
    return parts


def calibration_part(part: Calibration, config: TrustConfig) -> TrustPart:
    """The part of the trust score that a calibration makes."""
    return limited(
        f"calibration of {part.response}",
        part.error,
        config.max_calibration_error,
        f"Predicted rates of {part.response} are off by {part.error:.3f} on average "
        f"(limit {config.max_calibration_error:g}).",
    )


def gap_part(part: GeneratedAgainstReal, what: str, config: TrustConfig) -> TrustPart:
    """The part of the trust score that a gap makes; `what` differs, in words."""
    return limited(
        part.quantity,
        abs(part.gap) + 2.0 * part.standard_error,
        config.max_session_gap,
        f"{what} by {part.gap:+.1%} ± {2.0 * part.standard_error:.1%} in {part.quantity} "
        f"(real {part.real:.3g}, limit {config.max_session_gap:.0%}).",
    )


def _told_apart(test: TwoSampleTest | None, config: TrustConfig) -> TrustPart:
    name = "two-sample test"
    if test is None:
        text = "Whether generated sessions look real cannot be tested: too few can be compared, or all are alike."
        return right_or_wrong(name, False, text)
    if max(test.largest, test.upper) <= config.max_two_sample_auc:
        # No classifier could make it fail, so it must not pass.
        return unknown(
            name,
            f"Most sessions are alike, such as without any click, so no classifier could tell generated from real ones "
            f"with an AUC above {test.largest:.3f} (limit {config.max_two_sample_auc:g}).",
        )
    return limited(
        name,
        max(test.upper - 0.5, 0.0),
        config.max_two_sample_auc - 0.5,
        f"A classifier tells generated sessions from real ones with an AUC of {test.auc:.3f} (95% interval "
        f"{test.lower:.3f} to {test.upper:.3f}, 0.5 is chance, limit {config.max_two_sample_auc:g}; p = "
        f"{test.p_value:.2g} on {test.n_pairs:,} pairs), most of all by {test.strongest}.",
    )
