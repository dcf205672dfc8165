"""Numbers as people read them: few digits, thousands separated, a true minus sign, and their unit beside them."""

import math
from collections.abc import Mapping
from typing import Any

#: Keeps a number and its unit on one line.
_SPACE = "\N{NO-BREAK SPACE}"


def number(value: float, digits: int = 4, *, signed: bool = False) -> str:
    """A number with so many significant digits; whole numbers as they are, and 0 without a sign."""
    sign = "+" if signed and value else ""
    if not math.isfinite(value) or value == int(value):
        return f"{value:{sign},.0f}".replace("-", "−")
    exponent = math.floor(math.log10(abs(value)))
    form = f".{max(digits - 1 - exponent, 0)}f" if exponent >= -4 else f".{digits - 1}e"
    return f"{value:{sign},{form}}".replace("-", "−")


def interval(lower: float | None, upper: float | None, digits: int = 4, *, signed: bool = False) -> str:
    """An interval in words, or that none is claimed."""
    if lower is None or upper is None:
        return "none claimed"
    return f"{number(lower, digits, signed=signed)} to {number(upper, digits, signed=signed)}"


def kept_figure(record: Mapping[str, Any] | None, name: str, otherwise: str, *, signed: bool = False) -> str:
    """A figure of a record that was kept as JSON with its interval, or words where the record does not have it."""
    if not record or name not in record:
        return otherwise
    bounds = interval(record.get("lower"), record.get("upper"), signed=signed)
    return f"{number(record[name], signed=signed)} ({bounds})"


def share(value: float, *, signed: bool = False) -> str:
    """A share in percent: whole ones as they are, others with a decimal; less than that is said to be less."""
    sign = "+" if signed and value else ""
    if 0 < value < 0.001:
        return f"<{_SPACE}{sign}0.1{_SPACE}%"
    whole = math.isclose(value * 100, round(value * 100), rel_tol=1e-9)
    percent = f"{value * 100:{sign}.{0 if whole else 1}f}"
    return f"{percent}{_SPACE}%".replace("-", "−")


def counted(count: int, total: int, lower: float, upper: float) -> str:
    """A share of few as what it was counted from, with its interval: 4 of 5 (28.4 % to 99.5 %)."""
    return f"{count} of {total} ({share(lower)} to {share(upper)})"


def duration(seconds: float) -> str:
    """A time span in the two units that matter."""
    if seconds < 10:
        return f"{seconds:.1f}{_SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours}{_SPACE}h {minutes_left:02d}{_SPACE}min"
    return f"{minutes}{_SPACE}min {rest:02d}{_SPACE}s" if minutes else f"{rest}{_SPACE}s"
