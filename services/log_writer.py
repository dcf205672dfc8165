"""The one writer of a worker's interaction log: rows that wait are written together, and each is told when it is safe.

A commit costs about the same for one row as for a hundred, so while one group is written the next one gathers.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple

from components.errors import InputError
from components.interactions.log import Heard, InteractionLog, LogUnavailableError, Recommended

GROUP = 500

Answer = Recommended | InputError | None | LogUnavailableError


class _Waiting(NamedTuple):
    row: Recommended | Heard
    tell: Callable[[Answer], None]


class LogWriter:
    """Writes rows from an event loop by a thread of its own."""

    def __init__(self, log: InteractionLog, *, longest_wait: float, longest_queue: int) -> None:
        self._log = log
        self._longest_wait = longest_wait
        self._longest_queue = longest_queue
        self._queue: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write_groups, name="interaction-log", daemon=True)
        self._thread.start()

    async def recommended(self, rows: Sequence[Recommended]) -> list[Recommended | InputError]:
        """Log recommendations; those that stand, as `InteractionLog.write` has them.

        Raises:
            LogUnavailableError: they could not be written, or not in time.
        """
        return await self._write(rows)  # type: ignore[return-value]

    async def heard(self, rows: Sequence[Heard]) -> list[InputError | None]:
        """Log feedback; an error for each that fits no recommendation.

        Raises:
            LogUnavailableError: it could not be written, or not in time.
        """
        return await self._write(rows)  # type: ignore[return-value]

    async def _write(self, rows: Sequence[Recommended | Heard]) -> list[Answer]:
        if self._queue.qsize() + len(rows) > self._longest_queue:
            raise LogUnavailableError(f"the interaction log is {self._queue.qsize()} rows behind; try again later")
        loop = asyncio.get_running_loop()
        answers = [loop.create_future() for _ in rows]
        for row, answer in zip(rows, answers, strict=True):
            self._queue.put(_Waiting(row, _teller(loop, answer)))
        try:
            told: list[Answer] = await asyncio.wait_for(asyncio.gather(*answers), self._longest_wait)
        except TimeoutError:
            raise LogUnavailableError(
                f"the interaction log did not answer within {self._longest_wait:g} seconds; try again later"
            ) from None
        for one in told:
            if isinstance(one, LogUnavailableError):
                raise one
        return told

    def close(self) -> None:
        """Write what waits, then end."""
        self._queue.put(None)
        self._thread.join(timeout=2 * self._longest_wait)
        self._log.engine.dispose()

    def _write_groups(self) -> None:
        open_ = True
        while open_:
            first = self._queue.get()
            group = [] if first is None else [first]
            open_ = first is not None
            while open_ and len(group) < GROUP and not self._queue.empty():
                waiting = self._queue.get()
                open_ = waiting is not None
                if waiting is not None:
                    group.append(waiting)
            if group:
                self._write_group(group)

    def _write_group(self, group: list[_Waiting]) -> None:
        shown = [waiting for waiting in group if isinstance(waiting.row, Recommended)]
        heard = [waiting for waiting in group if isinstance(waiting.row, Heard)]
        try:
            standing, errors = self._log.write(
                [waiting.row for waiting in shown if isinstance(waiting.row, Recommended)],
                [waiting.row for waiting in heard if isinstance(waiting.row, Heard)],
            )
        except Exception as error:  # whatever it is, nobody may be left waiting
            failure = (
                error
                if isinstance(error, LogUnavailableError)
                else LogUnavailableError(f"the interaction log cannot be written: {type(error).__name__}")
            )
            for waiting in group:
                waiting.tell(failure)
            return
        for waiting, answer in zip([*shown, *heard], [*standing, *errors], strict=True):
            waiting.tell(answer)


def _teller(loop: asyncio.AbstractEventLoop, answer: "asyncio.Future[Answer]") -> Callable[[Answer], None]:
    def tell(value: Answer) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: None if answer.done() else answer.set_result(value))

    return tell
