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

Answer = Recommended | InputError | None


class _Waiting(NamedTuple):
    rows: Sequence[Recommended | Heard]
    tell: Callable[[list[Answer] | LogUnavailableError], None]


class LogWriter:
    """Writes rows from an event loop by a thread of its own."""

    def __init__(self, log: InteractionLog, *, longest_wait: float, longest_queue: int) -> None:
        self._log = log
        self._longest_wait = longest_wait
        self._longest_queue = longest_queue
        self._n_waiting = 0
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
        if self._n_waiting + len(rows) > self._longest_queue:
            raise LogUnavailableError(f"the interaction log is {self._n_waiting} rows behind; try again later")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Answer] | LogUnavailableError] = loop.create_future()
        self._queue.put(_Waiting(rows, _teller(loop, future)))
        self._n_waiting += len(rows)
        try:
            async with asyncio.timeout(self._longest_wait):
                answers = await future
        except TimeoutError:
            raise LogUnavailableError(
                f"the interaction log did not answer within {self._longest_wait:g} seconds; try again later"
            ) from None
        finally:
            self._n_waiting -= len(rows)
        if isinstance(answers, LogUnavailableError):
            raise answers
        return answers

    def close(self) -> None:
        """Write what waits, then end."""
        self._queue.put(None)
        self._thread.join(timeout=2 * self._longest_wait)
        self._log.engine.dispose()

    def _write_groups(self) -> None:
        open_ = True
        while open_:
            waiting = self._queue.get()
            group: list[_Waiting] = []
            n_rows = 0
            while waiting is not None:
                group.append(waiting)
                n_rows += len(waiting.rows)
                if n_rows >= GROUP or self._queue.empty():
                    break
                waiting = self._queue.get()
            open_ = waiting is not None
            if group:
                self._write_group(group)

    def _write_group(self, group: list[_Waiting]) -> None:
        rows = [row for waiting in group for row in waiting.rows]
        shown = [row for row in rows if isinstance(row, Recommended)]
        heard = [row for row in rows if isinstance(row, Heard)]
        try:
            standing, errors = self._log.write(shown, heard)
        except Exception as error:  # whatever it is, nobody may be left waiting
            failure = (
                error
                if isinstance(error, LogUnavailableError)
                else LogUnavailableError(f"the interaction log cannot be written: {type(error).__name__}")
            )
            for waiting in group:
                waiting.tell(failure)
            return
        answers_of_shown, answers_of_heard = iter(standing), iter(errors)
        for waiting in group:
            waiting.tell(
                [next(answers_of_shown if isinstance(row, Recommended) else answers_of_heard) for row in waiting.rows]
            )


def _teller(
    loop: asyncio.AbstractEventLoop, future: "asyncio.Future[list[Answer] | LogUnavailableError]"
) -> Callable[[list[Answer] | LogUnavailableError], None]:
    def tell(answers: list[Answer] | LogUnavailableError) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: None if future.done() else future.set_result(answers))

    return tell
