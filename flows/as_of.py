"""The moment as of which a run sees its log: what came later is as if it had not come yet."""

from datetime import UTC, datetime, time
from pathlib import Path

from pydantic import AwareDatetime, TypeAdapter, ValidationError

from components.errors import InputError
from components.interactions.importers import interaction_log
from components.interactions.log import InteractionLog
from flows.config import LoopConfig, interaction_database, source_path

EXPECTED = "expected a date, which means its end in UTC, or a time with its zone, such as 2026-05-01T12:00:00Z"
_TIME: TypeAdapter[datetime] = TypeAdapter(AwareDatetime)


def read_as_of(text: str) -> datetime:
    """The moment that a date or a time names; a date means its last microsecond in UTC.

    Raises:
        InputError: it is neither, has no zone, or lies ahead.
    """
    try:
        moment = datetime.combine(datetime.strptime(text, "%Y-%m-%d"), time.max, UTC)
    except ValueError:
        try:
            # Of a number, which pydantic would take for seconds, nobody could say what it means.
            moment = _TIME.validate_python(text if not text.replace(".", "", 1).isdigit() else None)
        except ValidationError:
            raise InputError(f"--as-of {text}: {EXPECTED}") from None
    require_past(moment)
    return moment


def require_past(as_of: datetime | None) -> None:
    """Refuse a moment of which nobody can know yet what will have been logged by then.

    Raises:
        InputError: it lies ahead.
    """
    now = datetime.now(UTC)
    if as_of is not None and as_of > now:
        raise InputError(
            f"as_of = {as_of.isoformat()}: lies ahead, as it is {now.isoformat(timespec='seconds')}; "
            "what will be logged by then is not known yet"
        )


def pinned(config: LoopConfig, path: Path | None) -> LoopConfig:
    """The configuration with the moment as of which its log is read, so that the same run can be had again.

    An endpoint's log grows while it is read, so without a moment its last row's counts. Files are told apart by their
    digests.

    Raises:
        InputError: `as_of` lies ahead, the source needs a path and got none, or there is no interaction log.
        LogUnavailableError: the database cannot be reached.
    """
    require_past(config.as_of)
    if config.as_of is not None or not isinstance(config.source, interaction_log.Config):
        return config
    end = InteractionLog(interaction_database(source_path(config, path))).end(config.loop)
    return config.model_copy(update={"as_of": end})
