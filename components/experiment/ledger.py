"""The ledger: every offline estimate beside the A/B that followed it, and how right the estimates were so far.

An offline estimate predicts an A/B. On 39 A/Bs of one company NCIS had a precision of 0.47, missed 0.33 of the
improvements and correlated with the A/B by 0.24 (Gilotte et al. 2018, arXiv 1801.07030). How it is here, only a ledger
of one's own can tell. Its words:

- An A/B is an **improvement** where its whole interval lies above 0, **worse** where it lies below, else **undecided**.
  One whose users did not come to the arms as planned is **unsound**: it is counted as such and used for nothing.
- The **gate passes** a challenger that it would let out, as a canary, before there is any A/B. An **estimator passes**
  one whose difference it puts above 0: that asks what the bare number is worth, which the gate does not trust alone.
- **Precision**: of those passed, the share whose A/B was an improvement, among A/Bs that were decided.
- **False-negative rate**: of the improvements, the share that was not passed. It is unknown where none of those that
  were not passed got an A/B: nobody looked.
- Both have exact binomial intervals (Clopper and Pearson 1934). They take entries as independent; challengers judged on
  the same log are not, so the number of logs stands beside the number of A/Bs.
- **Undecided** A/Bs are in neither share. Most are of small differences, so both shares are about differences that are
  large enough to be seen; how many were left out is stated.

What is never pooled: loops, sources and rewards, since their units differ; A/Bs of different labels; and differences to
different references. An estimate answers the A/B's question where it is of the difference to the A/B's *control*; where
it is to what was *logged*, or to another policy, it may be right and the A/B still go the other way.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from scipy import stats

from components.errors import InputError
from components.evaluation.policy_value import Estimand, Estimate, PolicyValue
from components.experiment.ab import AbLabel, AbResult
from components.experiment.evidence import GateEvidence
from components.experiment.gate import GateConfig, Outcome, decide, decide_offline

AbVerdict = Literal["improvement", "worse", "undecided"]
Contrast = Literal["control", "log", "another policy"]

GATE = "gate"
#: Of every interval here.
CONFIDENCE = 0.95
#: With fewer A/Bs the interval of an even share spans more than 45 points of 100.
FEW = 20


class OfflineDifference(BaseModel):
    """By how much one estimator puts the challenger above a reference."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    estimator: str = Field(description="Name of the estimator.")
    estimand: Estimand = Field(description="What the values are estimates of.")
    reference: str | None = Field(description="The policy compared with; None: the one that wrote the log.")
    difference: float = Field(description="The challenger's value minus the reference's.")
    lower: float | None = Field(description="Lower end of the difference's interval; None where none is claimed.")
    upper: float | None = Field(description="Upper end of the difference's interval; None where none is claimed.")
    effective_sample_size: float = Field(ge=0, description="Kish's effective sample size, of the weaker side.")


class LedgerAb(BaseModel):
    """What the ledger keeps of an A/B; the differences are challenger minus control, in reward per session."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    label: AbLabel = Field(description="Who the users were.")
    control: str = Field(description="The policy that the challenger was compared with.")
    difference: float = Field(description="Challenger's mean minus control's.")
    lower: float = Field(description="Lower end of the difference's interval.")
    upper: float = Field(description="Upper end of the difference's interval.")
    confidence: float = Field(gt=0, lt=1, description="How often such intervals hold the true difference.")
    sample_ratio_p_value: float = Field(ge=0, le=1, description="Of the check that users came to arms as planned.")

    @classmethod
    def of(cls, ab: AbResult) -> "LedgerAb":
        """The part of a result that is kept; of one that could be acted upon early, the bounds that allow for that.

        Raises:
            InputError: such an A/B has no bounds that hold at every look.
        """
        kept = ab.model_dump(include=set(cls.model_fields))
        if ab.looked_early:
            bounds = ab.bounds((1 - ab.confidence) / 2)
            if bounds is None:
                raise InputError("A/B: it could be acted upon early and has no bounds that hold at every look")
            kept |= {"lower": bounds.lower, "upper": bounds.upper}
        return cls.model_validate(kept)

    @property
    def verdict(self) -> AbVerdict:
        """What the interval says."""
        if self.lower > 0:
            return "improvement"
        return "worse" if self.upper < 0 else "undecided"

    @property
    def is_sound(self) -> bool:
        """Whether users came to the arms as planned, as the gate's default asks."""
        return self.sample_ratio_p_value >= GateConfig().sample_ratio_p_value


class LedgerEntry(BaseModel):
    """What was predicted of one challenger, and one A/B that followed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(description="Name of the run.")
    started: AwareDatetime = Field(description="When the run started.")
    loop: str = Field(description="Name of the loop.")
    source: str = Field(description="Where the log came from.")
    reward: str = Field(description="Name, version and weights of the reward, in one line.")
    data_digest: str = Field(description="Digest of the log that the estimates are made from.")
    challenger: str = Field(description="The policy that asked to serve.")
    champion: str | None = Field(description="Whom the gate asked it to beat; None: the policy that wrote the log.")
    offline: tuple[OfflineDifference, ...] = Field(
        description="Every estimate, against every reference; none where the log identifies no value."
    )
    passed: bool = Field(description="Whether the gate would have let it out, as a canary, on offline evidence alone.")
    outcome: Outcome = Field(description="What the gate decided in the end.")
    ab: LedgerAb | None = Field(description="The A/B that followed; None until one does.")

    def followed_by(self, ab: AbResult) -> "LedgerEntry":
        """The same prediction beside another A/B.

        Raises:
            InputError: the A/B is of another policy, or its interval is of less confidence than the gate asks for.
        """
        if ab.treatment != self.challenger:
            raise InputError(
                f"treatment: is {ab.treatment!r}; expected {self.challenger!r}, the challenger of run {self.run}"
            )
        if ab.confidence < (least := GateConfig().confidence):
            raise InputError(f"confidence: is {ab.confidence:g}; expected {least:g} or more, as the gate does")
        return self.model_copy(update={"ab": LedgerAb.of(ab)})


class Proportion(BaseModel):
    """A share with its exact interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(ge=0)
    total: int = Field(ge=1)
    lower: float = Field(ge=0, le=1, description="Lower end of the interval of Clopper and Pearson.")
    upper: float = Field(ge=0, le=1, description="Upper end of the interval of Clopper and Pearson.")

    @classmethod
    def of(cls, count: int, total: int) -> "Proportion | None":
        """`count` of `total`; None of none."""
        if total == 0:
            return None
        bounds = stats.binomtest(count, total).proportion_ci(CONFIDENCE, method="exact")
        return cls(count=count, total=total, lower=float(bounds.low), upper=float(bounds.high))


class Correlation(BaseModel):
    """How offline differences go with those of the A/Bs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    pearson: float = Field(description="Pearson's correlation.")
    lower: float = Field(description="Lower end of its interval, by Fisher's transform.")
    upper: float = Field(description="Upper end of its interval.")
    spearman: float = Field(description="Spearman's correlation of ranks.")

    @classmethod
    def of(cls, offline: Sequence[float], ab: Sequence[float]) -> "Correlation | None":
        """Of pairs; None of fewer than four, which have no interval, or where a side is constant but for rounding."""
        if len(offline) < 4 or not (_varies(offline) and _varies(ab)):
            return None
        pearson = stats.pearsonr(offline, ab)
        bounds = pearson.confidence_interval(CONFIDENCE)
        return cls(
            pearson=float(pearson.statistic),
            lower=float(bounds.low),
            upper=float(bounds.high),
            spearman=float(stats.spearmanr(offline, ab).statistic),
        )


class Point(BaseModel):
    """One prediction and its A/B, to be drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    offline: float = Field(description="The estimator's difference.")
    ab: float = Field(description="The A/B's difference, in reward per session.")
    ab_lower: float = Field(description="Lower end of the A/B's interval.")
    ab_upper: float = Field(description="Upper end of the A/B's interval.")


class Score(BaseModel):
    """How right the gate, or one estimator, was about A/Bs of one label, with one kind of reference."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: AbLabel = Field(description="Who the users of the A/Bs were.")
    judge: str = Field(description="`gate`, or the estimator's name.")
    estimand: Estimand | None = Field(description="What the estimator estimates; None for the gate.")
    contrast: Contrast = Field(description="Whom the challenger was compared with offline.")
    n: int = Field(ge=0, description="Sound A/Bs.")
    n_passed: int = Field(ge=0, description="Those whose challenger was passed, decided or not.")
    n_undecided: int = Field(ge=0, description="Those whose interval holds 0: neither share counts them.")
    precision: Proportion | None = Field(description="Improvements among those passed; None where none was decided.")
    false_negative_rate: Proportion | None = Field(
        description="Not passed among improvements; None where there were none, or nobody looked."
    )
    correlation: Correlation | None = Field(description="None for the gate, which gives a verdict and no number.")
    points: tuple[Point, ...] = Field(description="What the correlation is of, oldest first; none for the gate.")


class LabelSummary(BaseModel):
    """The A/Bs of one label, and how right each judge was about them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: AbLabel = Field(description="Who the users were.")
    n: int = Field(ge=0, description="Sound A/Bs.")
    n_logs: int = Field(ge=0, description="Different logs that the predictions were made from.")
    n_undecided: int = Field(ge=0, description="Sound A/Bs whose interval holds 0.")
    n_unsound: int = Field(ge=0, description="A/Bs that were left out because users did not come as planned.")
    scores: tuple[Score, ...] = Field(description="The gate first, then estimators by estimand.")


class LedgerSummary(BaseModel):
    """How right offline estimates of one loop, source and reward were so far."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loop: str
    source: str
    reward: str
    n_waiting: int = Field(ge=0, description="Predictions that no A/B has followed yet.")
    labels: tuple[LabelSummary, ...] = Field(description="The strongest evidence first.")


def enter(
    evidence: GateEvidence,
    estimates: Iterable[Estimate],
    config: GateConfig,
    *,
    run: str,
    started: datetime,
    loop: str,
    source: str,
    reward: str,
    data_digest: str,
) -> LedgerEntry:
    """The entry of a run.

    Args:
        evidence: what the gate was told.
        estimates: every estimate of every policy on the log, the challenger's and others'.
        config: the gate's.
        run: name of the run.
        started: when it started.
        loop: name of the loop.
        source: where the log came from.
        reward: name, version and weights of the reward.
        data_digest: of the log.
    """
    return LedgerEntry(
        run=run,
        started=started,
        loop=loop,
        source=source,
        reward=reward,
        data_digest=data_digest,
        challenger=evidence.challenger,
        champion=evidence.champion_policy,
        offline=tuple(_differences(evidence, [part for part in estimates if isinstance(part, PolicyValue)])),
        passed=decide_offline(evidence, config).outcome is not Outcome.HOLD,
        outcome=decide(evidence, config).outcome,
        ab=None if evidence.ab is None else LedgerAb.of(evidence.ab),
    )


def _differences(evidence: GateEvidence, values: list[PolicyValue]) -> Iterator[OfflineDifference]:
    """The challenger against the log, and against every other policy that the same estimator judged on it."""
    for value in (part for part in values if part.policy == evidence.challenger):
        named = {"estimator": value.estimator, "estimand": value.estimand}
        yield OfflineDifference(
            **named,
            reference=None,
            difference=value.difference,
            lower=value.difference_lower,
            upper=value.difference_upper,
            effective_sample_size=value.effective_sample_size,
        )
        for other in values:
            same = (other.estimator, other.estimand) == (value.estimator, value.estimand)
            if same and other.policy != value.policy:
                # Their own intervals say nothing about the difference's: both come from the same users.
                lower, upper = None, None
                paired = evidence.comparison
                if paired and (paired.reference, paired.estimand) == (other.policy, value.estimand):
                    lower, upper = paired.lower, paired.upper
                yield OfflineDifference(
                    **named,
                    reference=other.policy,
                    difference=value.value - other.value,
                    lower=lower,
                    upper=upper,
                    effective_sample_size=min(value.effective_sample_size, other.effective_sample_size),
                )


def summarize(entries: Iterable[LedgerEntry]) -> tuple[LedgerSummary, ...]:
    """How right offline estimates were: one summary for each loop, source and reward, by name.

    The order of entries does not matter. The same estimates beside the same A/B are one observation however often a run
    was repeated; the latest entry, whose gate may have had other settings, stands for it.
    """
    observations: dict[tuple[object, ...], LedgerEntry] = {}
    for entry in sorted(entries, key=lambda entry: (entry.started, entry.run)):
        observations[_prediction(entry), entry.ab] = entry
    pools: dict[tuple[str, str, str], list[LedgerEntry]] = {}
    for entry in sorted(observations.values(), key=lambda entry: (entry.started, entry.run)):
        pools.setdefault((entry.loop, entry.source, entry.reward), []).append(entry)
    return tuple(
        LedgerSummary(
            loop=loop,
            source=source,
            reward=reward,
            n_waiting=len(
                {_prediction(entry) for entry in pool} - {_prediction(entry) for entry in pool if entry.ab is not None}
            ),
            labels=tuple(
                _label_summary(label, [(entry, entry.ab) for entry in pool if entry.ab and entry.ab.label == label])
                for label in get_args(AbLabel)
                if any(entry.ab and entry.ab.label == label for entry in pool)
            ),
        )
        for (loop, source, reward), pool in sorted(pools.items())
    )


def _prediction(entry: LedgerEntry) -> tuple[object, ...]:
    """What makes two entries the same prediction. Where nothing is identified there is only the log to tell by."""
    return entry.loop, entry.source, entry.reward, entry.data_digest, entry.challenger, entry.champion, entry.offline


@dataclass(frozen=True)
class _Judge:
    name: str
    estimand: Estimand | None
    contrast: Contrast

    @property
    def rank(self) -> tuple[int, str, int]:
        estimands: list[Estimand | None] = [None, *Estimand]
        return estimands.index(self.estimand), self.name, get_args(Contrast).index(self.contrast)


@dataclass(frozen=True)
class _Judgment:
    """What a judge said of one challenger, and the A/B that followed."""

    run: str
    ab: LedgerAb
    passed: bool
    offline: float | None


def _label_summary(label: AbLabel, followed: list[tuple[LedgerEntry, LedgerAb]]) -> LabelSummary:
    sound = [(entry, ab) for entry, ab in followed if ab.is_sound]
    judged: dict[_Judge, list[_Judgment]] = {}
    for entry, ab in sound:
        for judge, judgment in _judgments(entry, ab):
            judged.setdefault(judge, []).append(judgment)
    return LabelSummary(
        label=label,
        n=len(sound),
        n_logs=len({entry.data_digest for entry, _ in sound}),
        n_undecided=sum(ab.verdict == "undecided" for _, ab in sound),
        n_unsound=len(followed) - len(sound),
        scores=tuple(_score(label, judge, judged[judge]) for judge in sorted(judged, key=lambda judge: judge.rank)),
    )


def _judgments(entry: LedgerEntry, ab: LedgerAb) -> Iterator[tuple[_Judge, _Judgment]]:
    gate = _Judge(GATE, None, _contrast(entry.champion, ab))
    yield gate, _Judgment(entry.run, ab, passed=entry.passed, offline=None)
    chosen: dict[tuple[str, Estimand], OfflineDifference] = {}
    for difference in entry.offline:
        key = difference.estimator, difference.estimand
        # The A/B's own question where it was asked offline, else the difference to what was logged.
        if difference.reference == ab.control or (difference.reference is None and key not in chosen):
            chosen[key] = difference
    for (estimator, estimand), difference in chosen.items():
        judge = _Judge(estimator, estimand, _contrast(difference.reference, ab))
        yield judge, _Judgment(entry.run, ab, passed=difference.difference > 0, offline=difference.difference)


def _contrast(reference: str | None, ab: LedgerAb) -> Contrast:
    if reference is None:
        return "log"
    return "control" if reference == ab.control else "another policy"


def _score(label: AbLabel, judge: _Judge, judgments: list[_Judgment]) -> Score:
    decided = [part for part in judgments if part.ab.verdict != "undecided"]
    passed = [part for part in decided if part.passed]
    improved = [part for part in decided if part.ab.verdict == "improvement"]
    n_passed = sum(part.passed for part in judgments)
    points = tuple(
        Point(
            run=part.run,
            offline=part.offline,
            ab=part.ab.difference,
            ab_lower=part.ab.lower,
            ab_upper=part.ab.upper,
        )
        for part in judgments
        if part.offline is not None
    )
    return Score(
        label=label,
        judge=judge.name,
        estimand=judge.estimand,
        contrast=judge.contrast,
        n=len(judgments),
        n_passed=n_passed,
        n_undecided=len(judgments) - len(decided),
        precision=Proportion.of(sum(part.ab.verdict == "improvement" for part in passed), len(passed)),
        false_negative_rate=Proportion.of(sum(not part.passed for part in improved), len(improved))
        if n_passed < len(judgments)
        else None,
        correlation=Correlation.of([point.offline for point in points], [point.ab for point in points]),
        points=points,
    )


def _varies(values: Sequence[float]) -> bool:
    return bool(np.ptp(values) > 1e-9 * np.abs(values).max())
