"""The trust score: stated parts, each from 0 (at its limit or beyond) to 1 (nothing wrong), and the smallest of them.

A world model is as trustworthy as its weakest side, since an agent that trains in it finds that side: so the score is
no mean, in which much that is right would hide one thing that is wrong. A part that compares a number with a limit
scores the share of the limit that is left, uncertainty counted against it; a part that is right or wrong scores 1 or 0.
"""

from pydantic import BaseModel, ConfigDict, Field


class TrustPart(BaseModel):
    """One thing that was checked of a world model."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    passed: bool | None = Field(description="Whether it held; None where the log cannot tell.")
    score: float | None = Field(
        ge=0, le=1, description="How much of the limit is left; None where the log cannot tell."
    )
    text: str = Field(description="What was checked and seen, in a sentence.")


class TrustScore(BaseModel):
    """Whether a world model may be trusted, and how much."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    score: float = Field(ge=0, le=1, description="The smallest score of the parts that are known.")
    passed: bool = Field(description="Whether every part that is known held, and one is.")
    weakest: str = Field(description="The part that the score is of.")
    parts: tuple[TrustPart, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """What was checked and seen, in sentences; what failed says so."""
        return tuple(("Failed: " if part.passed is False else "") + part.text for part in self.parts)


def limited(name: str, seen: float, limit: float, text: str) -> TrustPart:
    """A part whose number, 0 at best, must not exceed its limit."""
    left = 1.0 if seen == 0 else max(1.0 - seen / limit, 0.0) if limit else 0.0
    return TrustPart(name=name, passed=seen <= limit, score=left, text=text)


def right_or_wrong(name: str, right: bool, text: str) -> TrustPart:
    """A part without degrees."""
    return TrustPart(name=name, passed=right, score=float(right), text=text)


def unknown(name: str, text: str) -> TrustPart:
    """A part that this log cannot tell; it speaks neither for nor against the world model."""
    return TrustPart(name=name, passed=None, score=None, text=text)


def trust_score(parts: tuple[TrustPart, ...]) -> TrustScore:
    """The smallest score of the parts; 0 where none is known."""
    scores = {part.name: part.score for part in parts if part.score is not None}
    weakest = min(scores, key=lambda name: scores[name], default="nothing is known")
    return TrustScore(
        score=scores.get(weakest, 0.0),
        passed=bool(scores) and all(part.passed is not False for part in parts),
        weakest=weakest,
        parts=parts,
    )
