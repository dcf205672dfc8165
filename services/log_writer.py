"""The one writer of a worker's interaction log: rows that wait are written together, and each is told when it is safe.

A commit costs about the same for one row as for a hundred, so while one group is written the next one gathers.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

from components.errors import InputError
from components.interactions.log import Heard, InteractionLog, KeyReusedError, LogUnavailableError, Recommended, Shown

GROUP = 500


class _Waiting(NamedTuple):
    rows: Sequence[Recommended] | Sequence[Heard]
    tell: Callable[[Any], None]
    given_up: Callable[[], bool]


class LogWriter:
    """Writes rows from an event loop by a thread of its own."""

    def __init__(
        self,
        log: InteractionLog,
        *,
        longest_wait: float,
        longest_queue: int,
        tell_waiting: Callable[[int], None] = lambda n_rows: None,
    ) -> None:
        self._log = log
        self._tell_waiting = tell_waiting
        self._longest_wait = longest_wait
        self._longest_queue = longest_queue
        self._n_waiting = 0
        self._counting = threading.Lock()
        self._queue: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write_groups, name="interaction-log", daemon=True)
        self._thread.start()

    async def recommended(self, rows: Sequence[Recommended]) -> list[Recommended]:
        """Log recommendations that were asked for together; those that stand, as `InteractionLog.write` has them.

        Raises:
            KeyReusedError: one of them uses a key that was used for another question; none is written.
            LogUnavailableError: they could not be written, or not in time.
        """
        standing: list[Recommended] | KeyReusedError = await self._write(rows)
        if isinstance(standing, KeyReusedError):
            raise standing
        return standing

    async def heard(self, rows: Sequence[Heard]) -> list[InputError | Shown]:
        """Log feedback; for each the recommendation that it is about, or an error where it fits none.

        Raises:
            LogUnavailableError: it could not be written, or not in time.
        """
        joined: list[InputError | Shown] = await self._write(rows)
        return joined

    async def _write(self, rows: Sequence[Recommended] | Sequence[Heard]) -> Any:
        with self._counting:
            if self._n_waiting + len(rows) > self._longest_queue:
                raise LogUnavailableError(f"the interaction log is {self._n_waiting} rows behind; try again later")
            self._n_waiting += len(rows)
            self._tell_waiting(self._n_waiting)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._queue.put(_Waiting(rows, _teller(loop, future), future.cancelled))
        try:
            async with asyncio.timeout(self._longest_wait):
                answer = await future
        except TimeoutError:
            raise LogUnavailableError(
                f"the interaction log did not answer within {self._longest_wait:g} seconds; try again later"
            ) from None
        if isinstance(answer, LogUnavailableError):
            raise answer
        return answer

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
                n_rows += len(waiting.rows)
                # What nobody waits for any more was refused: it must not turn up later.
                if not waiting.given_up():
                    group.append(waiting)
                if n_rows >= GROUP or self._queue.empty():
                    break
                waiting = self._queue.get()
            open_ = waiting is not None
            if group:
                self._write_group(group)
            with self._counting:
                self._n_waiting -= n_rows
                self._tell_waiting(self._n_waiting)

    def _write_group(self, group: list[_Waiting]) -> None:
        calls = [waiting for waiting in group if isinstance(waiting.rows[0], Recommended)]
        pieces = [waiting for waiting in group if isinstance(waiting.rows[0], Heard)]
        try:
            standing, joined = self._log.write(
                [[row for row in waiting.rows if isinstance(row, Recommended)] for waiting in calls],
                [row for waiting in pieces for row in waiting.rows if isinstance(row, Heard)],
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
        for waiting, answer in zip(calls, standing, strict=True):
            waiting.tell(answer)
        left = iter(joined)
        for waiting in pieces:
            waiting.tell([next(left) for _ in waiting.rows])


def _teller(loop: asyncio.AbstractEventLoop, future: "asyncio.Future[Any]") -> Callable[[Any], None]:
    def tell(answer: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: None if future.done() else future.set_result(answer))

    return tell
