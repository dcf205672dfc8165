"""Whether the interaction log could be written now: asked by one thread, and waited for no longer than told."""

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor

from components.interactions.log import InteractionLog, LogUnavailableError


class Readiness:
    """Asks a log's database, also where it no longer answers."""

    def __init__(self, log: InteractionLog, longest_wait: float) -> None:
        self._log = log
        self._longest_wait = longest_wait
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="readiness")
        self._looking: Future[bool] | None = None

    async def look(self) -> bool:
        """True where rows could be written; False where not, or not known in time."""
        # Probes that come while a look hangs wait for that one: they must not pile up.
        if self._looking is None or self._looking.done():
            self._looking = self._thread.submit(self._look)
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._looking)), self._longest_wait)
        except TimeoutError:
            return False

    def close(self) -> None:
        """End the thread once it is free."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _look(self) -> bool:
        try:
            self._log.check()
        except LogUnavailableError:
            return False
        return True
