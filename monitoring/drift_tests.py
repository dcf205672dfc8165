"""Has it moved? Tests of a window of traffic against what was before, whose error rates hold although users come back.

Requests of one user depend on each other, so the unit is the user: each column is summed over the requests of a user,
and variances come from the users' sums. Let c_u be a user's counts in the bins of a column (or the sum of its values),
n_u the user's requests, N = Σ n_u, p = Σ c_u / N on either side, and

    r_u = c_u − n_u p̄,     d = p_now − p_before
    V   = T / N_now + Σ r_u r_uᵀ / N_before² − (O + Oᵀ) / (N_now N_before)

with p̄ the share of both sides together, T = Σ r rᵀ / Σ n over all users' windows the variance that one request of a
window brings (from the windows before and now, all equally long: one alone is too small for it), and O = Σ r_now
r_beforeᵀ over the users who are on both sides: the same people are not two samples.

**Bins.** The score is the population stability index, PSI = Σ (p_now − p_before) ln(p_now / p_before). Near equality it
is X = Σ d_j² / p̄_j, which under equality is distributed as Σ λ_j Z_j² with λ the eigenvalues of D^−½ V D^−½, D = diag p̄
(Rao and Scott, Annals of Statistics 1984). Satterthwaite's approximation with Σλ = tr and ν = tr² / Σλ² gives

    X / tr ~ F(ν, ν · (U − 1))                                          (Thomas and Rao, JASA 1987; U users now)

Bins that fewer than 25 users now would fall into are joined, since rare bins have no normal tails.

**Means.** d / √V against Student's t with U − 1 degrees of freedom. The score is (d / standard deviation)², which is
what PSI is for a small shift of a normal column, so one floor serves both.

**Effective sample size.** The share (Σw)² / (N Σw²) of the weights w of a policy, by the delta method from the means of
w and w².

**Against a reference whose times are unknown** T cannot be had. There all requests of a user count as one answer
given n_u times, which is the worst that can be: 1 / n_eff = Σn_u² / N² on either side, and X / (1/n_eff + 1/n_eff') is
compared with χ² of bins − 1.

**Volume.** The requests of the window against those of m earlier windows of the same length at the same time of day,
Student's t with m − 1 degrees of freedom on their logarithms. The variance is that between the windows, or where that
is smaller the one that users' visits have by chance alone, Σn_u² / N².

A test's `p_value` is the chance of a difference as large on stable traffic, for that one test at that one look;
`monitoring.alarm_budget` decides from all of them. What is common to all users of a day (a holiday, an outage of the
shop) is no chance to these tests: it moves the traffic, and they say so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped
from scipy import special

N_BINS = 10
#: Users whom a bin must be able to hold.
USERS_OF_A_BIN = 25
#: Log weights beyond this are cut: they are a finding already.
MOST_NATS = 20.0
#: Means that differ by less of themselves are the same.
ROUNDING = 1e-9
#: What stands in for a share of 0 in a PSI, in requests.
HALF = 0.5

Values = Shaped[np.ndarray, " M"]


@dataclass(frozen=True)
class Sample:
    """One side of a comparison: M requests, whose they are, and their columns."""

    user: Int[np.ndarray, " M"]
    """Codes of the users, the same on both sides."""
    window: Int[np.ndarray, " M"]
    """Which window a request lies in; windows are as long as the one that is judged."""
    columns: Mapping[str, Values]
    """Numbers, NaN where unknown, or categories as strings, None where unknown."""

    def take(self, rows: Int[np.ndarray, " R"] | Bool[np.ndarray, " M"]) -> "Sample":
        """Some of the requests."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Sample(self.user[rows], self.window[rows], columns)

    @property
    def n_users(self) -> int:
        """Different users."""
        return len(self.by_user.users)

    @cached_property
    def by_user(self) -> "Clusters":
        """Its requests by user."""
        return Clusters(*np.unique(self.user, return_inverse=True))

    @cached_property
    def by_window(self) -> "Clusters":
        """Its requests by user and window."""
        users, place = self.by_user.users, self.by_user.place
        if not len(users):
            return self.by_user
        first, n_windows = int(self.window.min()), int(np.ptp(self.window)) + 1
        pairs, place = np.unique(place * n_windows + self.window - first, return_inverse=True)
        return Clusters(users[pairs // n_windows], place)


@dataclass(frozen=True)
class Clusters:
    """Which requests belong together."""

    users: Int[np.ndarray, " U"]
    """User of each cluster, ascending."""
    place: Int[np.ndarray, " M"]
    """Cluster of each request."""


@dataclass(frozen=True)
class Difference:
    """What a test found."""

    score: float
    """How far it moved: PSI, or the squared difference in standard deviations."""
    p_value: float
    before: float | None = None
    """The mean before, where there is one."""
    now: float | None = None


@dataclass(frozen=True)
class Bins:
    """Where values fall: deciles of the reference, or its categories; the last one holds the unknown."""

    edges: Float[np.ndarray, " E"] | None
    categories: tuple[str, ...]

    @classmethod
    def of(cls, values: Values) -> "Bins":
        """The bins of a reference."""
        if values.dtype == object:
            return cls(None, tuple(sorted(value for value in pd.unique(values) if value is not None)))
        known = values[np.isfinite(values)]
        if len(known) == 0:
            return cls(np.zeros(0), ())
        # Values that many requests share are bins of their own: an edge on either side of them.
        inner = np.quantile(known, np.arange(1, N_BINS) / N_BINS, method="inverted_cdf")
        inner = np.unique(inner)
        frequent = inner[[np.mean(known == value) >= 1 / (2 * N_BINS) for value in inner]]
        return cls(np.unique(np.concatenate([inner, np.nextafter(frequent, -np.inf)])), ())

    @property
    def size(self) -> int:
        """Number of bins: with one for values that the reference does not have, and one for unknown ones."""
        return len(self.categories) + 2 if self.edges is None else len(self.edges) + 2

    def codes(self, values: Values) -> Int[np.ndarray, " M"]:
        """Bin of each value."""
        if self.edges is None:
            place = {category: code for code, category in enumerate(self.categories)} | {None: self.size - 1}
            unheard_of = len(self.categories)
            seen, different = pd.factorize(values, use_na_sentinel=False)
            return np.array([place.get(value, unheard_of) for value in different], dtype=np.int64)[seen]
        return np.where(np.isfinite(values), np.searchsorted(self.edges, values, side="left"), self.size - 1)

    def contributions(self, values: Values) -> "_Contributions":
        """What each request adds to the counts of the bins."""
        return _Contributions(self.codes(values), self.size, None, None)


@dataclass(frozen=True)
class _Sums:
    """Sums of D contributions and of requests, by cluster."""

    users: Int[np.ndarray, " U"]
    """Ascending; a user stands there once for each window where clusters are users' windows."""
    values: Float[np.ndarray, "U D"]
    requests: Float[np.ndarray, " U"]

    @cached_property
    def total(self) -> float:
        return float(self.requests.sum())

    @cached_property
    def sum(self) -> Float[np.ndarray, " D"]:
        # A product with ones is many times as fast as a sum over rows of few columns.
        return np.ones(len(self.values)) @ self.values

    @cached_property
    def mean(self) -> Float[np.ndarray, " D"]:
        return self.sum / self.total

    @cached_property
    def moments(self) -> tuple[Float[np.ndarray, "D D"], Float[np.ndarray, " D"], float]:
        """Σ c cᵀ, Σ c n and Σ n²: what variances around any mean are made from."""
        return self.values.T @ self.values, self.requests @ self.values, float(self.requests @ self.requests)

    def residuals(self, rows: Int[np.ndarray, " R"], mean: Float[np.ndarray, " D"]) -> Float[np.ndarray, "R D"]:
        return self.values[rows] - self.requests[rows, None] * mean

    def variance_sum(self, mean: Float[np.ndarray, " D"]) -> Float[np.ndarray, "D D"]:
        products, mixed, squares = self.moments
        cross = np.outer(mixed, mean)
        n = len(self.users)
        return (products - cross - cross.T + squares * np.outer(mean, mean)) * (n / max(n - 1, 1))


class Baseline:
    """The side that later windows are compared with; its sums are made once."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self._bins: dict[str, Bins] = {}
        self._sums: dict[str, tuple[_Sums, _Sums]] = {}

    def _by_user_and_window(self, name: str, contribute: "Callable[[Values], _Contributions]") -> tuple[_Sums, _Sums]:
        key = f"{contribute.__name__} {name}"
        if key not in self._sums:
            contributions = contribute(self.sample.columns[name])
            clusters = self.sample.by_user, self.sample.by_window
            self._sums[key] = _sum(clusters[0], contributions), _sum(clusters[1], contributions)
        return self._sums[key]

    def shares(self, current: Sample, name: str) -> Difference | None:
        """Test of a column's distribution; None where neither side varies, and they are alike."""
        if name not in self._bins:
            self._bins[name] = Bins.of(self.sample.columns[name])
        bins = self._bins[name]
        before = self._by_user_and_window(name, bins.contributions)
        now = _sum(current.by_user, bins.contributions(current.columns[name]))
        return _shares(*before, now) if before[0].total and now.total else None

    def means(self, current: Sample, name: str) -> Difference | None:
        """Test of a column's mean; None where it is unknown on a side, or neither varies and they are alike."""
        before = self._by_user_and_window(name, _moments)
        now = _sum(current.by_user, _moments(current.columns[name]))
        if not (before[0].total and now.total):
            return None
        d, covariance, mean = _difference(*before, now)
        spread = float(mean[1] - mean[0] ** 2)
        return _student(
            float(d[0]), float(covariance[0, 0]), len(now.users), spread, float(before[0].mean[0]), float(now.mean[0])
        )

    def effective_share(self, current: Sample, name: str) -> Difference | None:
        """Test of the share of effective requests that a column of log weights leaves."""
        before = self._by_user_and_window(name, _weights)
        now = _sum(current.by_user, _weights(current.columns[name]))
        if not (before[0].total and now.total):
            return None
        _, covariance, mean = _difference(*before, now)
        gradient = np.array([2 * mean[0] / mean[1], -(mean[0] ** 2) / mean[1] ** 2])
        shares = [float(side.mean[0] ** 2 / side.mean[1]) for side in (before[0], now)]
        # A share is its own scale: a tenth of it is to this column what a tenth of the spread is to another.
        return _student(
            shares[1] - shares[0], float(gradient @ covariance @ gradient), len(now.users), 1.0, shares[0], shares[1]
        )


def shares_against_unknown_times(reference: Sample, current: Sample, name: str) -> Difference | None:
    """Test of a column against a reference whose windows are unknown, as if each user had given one answer."""
    bins = Bins.of(reference.columns[name])
    before, now = (_sum(side.by_user, bins.contributions(side.columns[name])) for side in (reference, current))
    if not (before.total and now.total):
        return None
    joined = _joined(before, now)
    pooled = (before.sum + now.sum) @ joined / (before.total + now.total)
    real = pooled > 0
    if real.sum() < 2:
        return None
    chi = float((np.square((now.mean - before.mean) @ joined)[real] / pooled[real]).sum())
    per_answer = sum(float(np.square(side.requests).sum()) / side.total**2 for side in (before, now))
    return Difference(_psi(before, now, joined), float(special.chdtrc(int(real.sum()) - 1, chi / per_answer)))


@dataclass(frozen=True)
class Volume:
    """Requests of one window."""

    requests: int
    squares: int
    """Σ over its users of the square of how many requests they made."""


def volume(earlier: Sequence[Volume], now: Volume) -> Difference | None:
    """Test of the number of requests; None with fewer than three earlier windows, or none with a request."""
    counts = np.array([window.requests for window in earlier], dtype=np.float64)
    if len(counts) < 3 or not counts.any():
        return None
    # One request more, so that a window without any has a logarithm.
    logs = np.log1p(counts)
    chance = float(np.mean([window.squares / max(window.requests, 1) ** 2 for window in earlier]))
    variance = max(float(logs.var(ddof=1)), chance) * (1 + 1 / len(logs))
    d = float(np.log1p(now.requests) - logs.mean())
    p_value = 2 * float(special.stdtr(len(logs) - 1, -abs(d) / np.sqrt(variance)))
    return Difference(d**2, p_value, before=float(counts.mean()), now=float(now.requests))


@dataclass(frozen=True)
class _Contributions:
    """What each request adds: a bin, or numbers and whether they are known."""

    codes: Int[np.ndarray, " M"] | None
    size: int
    values: Float[np.ndarray, "M D"] | None
    known: Bool[np.ndarray, " M"] | None


def _moments(values: Values) -> _Contributions:
    numbers = values.astype(np.float64)
    known = np.isfinite(numbers)
    numbers = np.where(known, numbers, 0.0)
    return _Contributions(None, 2, np.column_stack([numbers, np.square(numbers)]), known)


def _weights(log_weights: Values) -> _Contributions:
    return _moments(np.exp(np.clip(log_weights.astype(np.float64), -MOST_NATS, MOST_NATS)))


def _sum(clusters: Clusters, contributions: _Contributions) -> _Sums:
    cluster, n, size = clusters.place, len(clusters.users), contributions.size
    if contributions.codes is not None:
        counts = np.bincount(cluster * size + contributions.codes, minlength=n * size).reshape(n, size)
        return _Sums(clusters.users, counts.astype(np.float64), counts.sum(1).astype(np.float64))
    assert contributions.values is not None and contributions.known is not None
    sums = np.column_stack([np.bincount(cluster, column, n) for column in contributions.values.T])
    return _Sums(clusters.users, sums, np.bincount(cluster, contributions.known, n))


def _difference(
    before: _Sums, windows: _Sums, now: _Sums
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D D"], Float[np.ndarray, " D"]]:
    """d, V and p̄."""
    mean = (before.sum + now.sum) / (before.total + now.total)
    one_window = (windows.variance_sum(mean) + now.variance_sum(mean)) / (windows.total + now.total)
    covariance = one_window / now.total + before.variance_sum(mean) / before.total**2
    place = np.searchsorted(before.users, now.users).clip(max=len(before.users) - 1)
    both = np.flatnonzero(before.users[place] == now.users)
    overlap = now.residuals(both, mean).T @ before.residuals(place[both], mean) / (now.total * before.total)
    return now.mean - before.mean, covariance - overlap - overlap.T, mean


def _shares(before: _Sums, windows: _Sums, now: _Sums) -> Difference | None:
    joined = _joined(before, now)
    d, covariance, pooled = _difference(before, windows, now)
    # Sums of joined bins are sums of the bins' own.
    d, covariance, pooled = d @ joined, joined.T @ covariance @ joined, pooled @ joined
    real = pooled > 0
    if real.sum() < 2:
        return None
    scaled = covariance[np.ix_(real, real)] / np.sqrt(np.outer(pooled[real], pooled[real]))
    trace, squared = float(np.trace(scaled)), float(np.square(scaled).sum())
    statistic = float((np.square(d[real]) / pooled[real]).sum())
    if trace <= 0:
        return Difference(_psi(before, now, joined), float(statistic == 0))
    degrees = trace**2 / squared
    p_value = float(special.fdtrc(degrees, degrees * (len(now.users) - 1), statistic / trace))
    return Difference(_psi(before, now, joined), p_value)


def _joined(before: _Sums, now: _Sums) -> Float[np.ndarray, "D J"]:
    """Which bins become one: those that would hold few users now, and with them the smallest other if need be."""
    expected = np.maximum(before.mean, now.mean) * len(now.users)
    rare = expected < USERS_OF_A_BIN
    places = np.zeros(len(expected), dtype=np.int64)
    places[~rare] = np.arange(1, (~rare).sum() + 1)
    if rare.any() and expected[rare].sum() < USERS_OF_A_BIN and not rare.all():
        places[rare] = places[np.flatnonzero(~rare)[np.argmin(expected[~rare])]]
    places = np.unique(places, return_inverse=True)[1]
    return np.eye(int(places.max()) + 1)[places]


def _psi(before: _Sums, now: _Sums, joined: Float[np.ndarray, "D J"]) -> float:
    p, q = ((side.mean @ joined * side.total + HALF) / (side.total + HALF * joined.shape[1]) for side in (now, before))
    return float(((p - q) * np.log(p / q)).sum())


def _student(d: float, variance: float, n_users: int, spread: float, before: float, now: float) -> Difference | None:
    if spread <= 0 and d == 0:
        return None
    if abs(d) <= ROUNDING * max(abs(before), abs(now)):
        return Difference(0.0, 1.0, before, now)
    score = d**2 / spread if spread > 0 else np.inf
    p_value = 2 * float(special.stdtr(n_users - 1, -abs(d) / np.sqrt(variance))) if variance > 0 else float(d == 0)
    return Difference(float(score), p_value, before, now)
