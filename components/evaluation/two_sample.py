"""Are generated sessions told apart from real ones? A classifier two-sample test on what happened in each session.

A logistic classifier learns on one half of the users to tell real sessions from generated ones, and is judged on the
other half (Lopez-Paz and Oquab, ICLR 2017) by its area under the ROC curve

    AUC = P(score of a generated session > score of a real one),    0.5 where nothing tells them apart.

Every generated session replays the requests of one real session, so the two differ in the responses alone, and where
the model is true they may trade places. The p-value comes from trading them, all sessions of a user together. With
enough sessions every model fails that test; how far the AUC lies from 0.5 is the effect size that counts. Its interval
is clustered by user (Obuchowski, Biometrics 1997): with F, G the distributions of real and generated scores,

    ψ_u = Σ_{generated i of u} (F(i) − AUC) / n + Σ_{real j of u} (1 − G(j) − AUC) / n,    Var = U / (U − 1) Σ_u ψ_u²

Where most sessions are alike there is little to tell. If shares a of the real and b of the generated ones have the very
same features, those pairs are ties, which count by half, and no classifier has an AUC above 1 − ab / 2.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field
from scipy import optimize, special, stats
from torch import Tensor

from components.interactions.batching import SessionBatch

#: Requests of a session that have a click rate of their own.
N_OPENING = 4
N_PERMUTATIONS = 999
CONFIDENCE = 0.95
#: Ridge on the classifier's standardised weights; it matters where features repeat each other.
RIDGE = 1.0


class TwoSampleTest(BaseModel):
    """How well a classifier tells generated sessions from real ones that it never saw."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    auc: float = Field(ge=0, le=1, description="Area under the ROC curve; 0.5 is chance.")
    lower: float = Field(description="Lower end of its 95 % interval.")
    upper: float = Field(description="Upper end of its 95 % interval.")
    p_value: float = Field(gt=0, le=1, description="How often sessions that trade places are told apart as well.")
    n_pairs: int = Field(ge=2, description="Real sessions judged, each with the generated one that replays it.")
    n_users: int = Field(ge=2, description="Users of them: the clusters of the interval.")
    strongest: str = Field(description="The feature that weighs most in telling them apart.")
    largest: float = Field(
        default=1.0,
        ge=0.5,
        le=1,
        description="Largest AUC that any classifier could have on features of these sessions.",
    )


def session_features(batch: SessionBatch) -> dict[str, Float[Tensor, " B"]]:
    """What happened in each session, as numbers that need no model: length, clicks by step and position, reward."""
    steps = batch.lengths.clamp(min=1).float()
    features = {"length": steps.log(), "one request only": (steps == 1).float()}
    if batch.clicks.shape[2] == 0:
        return features | _organic_features(batch)
    clicks = batch.clicks.sum(2)
    last = torch.nn.functional.one_hot(batch.lengths.clamp(min=1) - 1, clicks.shape[1])
    features |= {
        "clicks a request": clicks.sum(1) / steps,
        "requests with a click": ((clicks > 0).float() * batch.mask).sum(1) / steps,
        "clicks of the last request": (clicks * last).sum(1),
        "reward a request": batch.rewards.sum((1, 2)) / steps,
        "largest reward": batch.rewards.sum(2).amax(1),
    }
    for step in range(min(N_OPENING, clicks.shape[1])):
        features[f"clicks of request {step + 1}"] = clicks[:, step]
    for position, rate in enumerate((batch.clicks.sum(1) / steps[:, None]).unbind(1)):
        features[f"click rate of position {position + 1}"] = rate
    return features


def _organic_features(batch: SessionBatch) -> dict[str, Float[Tensor, " B"]]:
    """Where no slate is shown, sessions are what their users turn to: how often to the same item, how often back."""
    items = batch.events[:, :, -1]
    turned = (items > 0).sum(1).clamp(min=1)
    same = (items[:, 1:] == items[:, :-1]) & (items[:, 1:] > 0)
    ordered = items.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)
    return {"the same item again": same.sum(1) / turned, "an item of before": repeated.sum(1) / turned}


def judged_pairs(real: SessionBatch, generated: SessionBatch, *, ends_known: bool = True) -> Bool[Tensor, " B"]:
    """Pairs of which both ends are known, where any is, and all responses of the real session."""
    answered = real.rewarded & (real.observed | (real.slates == 0)).flatten(1).all(1)
    return answered & real.left.any(1) & generated.left.any(1) if ends_known else answered


def two_sample_test(
    real: SessionBatch, generated: SessionBatch, generator: np.random.Generator, *, ends_known: bool = True
) -> TwoSampleTest | None:
    """Tell generated sessions from real ones; None where too few can be compared, or all are alike.

    Args:
        real: sessions of a log that the model never saw.
        generated: row by row, sessions that replay their requests under the logging policy.
        generator: of the halves and of what trades places.
        ends_known: false where generated sessions are as long as the real ones since nobody knows how those ended.
    """
    pairs = judged_pairs(real, generated, ends_known=ends_known)
    true, made = (session_features(batch.select(pairs)) for batch in (real, generated))
    names = [name for name in true if name in made]
    return tell_apart(
        torch.stack([true[name] for name in names], dim=1).double().numpy(),
        torch.stack([made[name] for name in names], dim=1).double().numpy(),
        real.users[pairs].numpy(),
        names,
        generator,
    )


def tell_apart(
    real: Float[np.ndarray, "S F"],
    generated: Float[np.ndarray, "S F"],
    users: Int[np.ndarray, " S"],
    names: list[str],
    generator: np.random.Generator,
) -> TwoSampleTest | None:
    """The test on features of S pairs; None where fewer than four users have any, or no feature varies."""
    found, codes = np.unique(users, return_inverse=True)
    if len(found) < 4 or (np.concatenate([real, generated]) == real[:1]).all():
        return None
    learned = (generator.permutation(len(found)) < len(found) // 2)[codes]
    pooled = np.concatenate([real[learned], generated[learned]])
    spread = pooled.std(0)
    scale = np.where(spread > 0, spread, 1.0)
    label = np.repeat([0.0, 1.0], learned.sum())
    weights = _logistic((pooled - pooled.mean(0)) / scale, label)
    scores = np.concatenate([real[~learned] @ (weights / scale), generated[~learned] @ (weights / scale)])
    auc, half_width, p_value = _area(scores, np.unique(codes[~learned], return_inverse=True)[1], generator)
    return TwoSampleTest(
        auc=auc,
        lower=auc - half_width,
        upper=auc + half_width,
        p_value=p_value,
        n_pairs=int((~learned).sum()),
        n_users=len(np.unique(codes[~learned])),
        strongest=names[int(np.abs(weights).argmax())],
        largest=_largest_area(real[~learned], generated[~learned]),
    )


def _largest_area(real: Float[np.ndarray, "S F"], generated: Float[np.ndarray, "S F"]) -> float:
    """1 − ab / 2, with a and b the shares of sessions that have the features which most sessions have."""
    _, codes = np.unique(np.concatenate([real, generated]), axis=0, return_inverse=True)
    most = np.bincount(codes.ravel()).argmax()
    alike = codes.ravel() == most
    return 1.0 - float(alike[: len(real)].mean() * alike[len(real) :].mean()) / 2


def _logistic(x: Float[np.ndarray, "N F"], y: Float[np.ndarray, " N"]) -> Float[np.ndarray, " F"]:
    """Weights of a ridge logistic classifier; halves are balanced and features centered, so it needs no intercept."""

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = x @ weights
        value = np.logaddexp(0.0, logits).sum() - y @ logits + RIDGE / 2 * weights @ weights
        return float(value), x.T @ (special.expit(logits) - y) + RIDGE * weights

    fitted: Float[np.ndarray, " F"] = optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
    return fitted


def _area(
    scores: Float[np.ndarray, " N"], codes: Int[np.ndarray, " S"], generator: np.random.Generator
) -> tuple[float, float, float]:
    """AUC, half the width of its interval and p-value, from the scores of S real sessions and then S generated ones."""
    n, n_users = len(codes), int(codes.max()) + 1
    ranks = stats.rankdata(scores)
    real, generated = ranks[:n], ranks[n:]

    # Mid-ranks among all, less those among one's own, count the others below, ties by half.
    above_real = (generated - stats.rankdata(scores[n:])) / n
    below_generated = 1.0 - (real - stats.rankdata(scores[:n])) / n
    auc = float(above_real.mean())
    influence = np.bincount(codes, above_real - auc + below_generated - auc, n_users) / n
    deviation = float(np.sqrt(n_users / (n_users - 1) * np.square(influence).sum()))

    traded = generator.random((N_PERMUTATIONS, n_users)) < 0.5
    gained = np.bincount(codes, real - generated, n_users)
    # Sums of mid-ranks are exact, so that ties with what was seen are ties.
    p_value = (1 + int(np.count_nonzero(traded @ gained >= 0))) / (1 + N_PERMUTATIONS)
    return auc, float(stats.t.ppf((1 + CONFIDENCE) / 2, n_users - 1)) * deviation, p_value
