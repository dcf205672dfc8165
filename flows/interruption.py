"""Ctrl-C that is heeded even where Python cannot raise it.

A signal's exception is lost where it lands in a finaliser, a weak reference's callback, or a library that swallows it:
the run would go on to its end, and Python prints a traceback that helps nobody. What was asked for is therefore
remembered, and raised again at the next step, or at the end.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Whether an interrupt came; and whether Python is known to have dropped it.
_asked, _lost = threading.Event(), threading.Event()


@contextmanager
def remembered_interrupts() -> Iterator[None]:
    """Remember an interrupt that comes inside the block, beside raising it as ever.

    Raises:
        KeyboardInterrupt: at the block's end, where Python dropped one and no step inside has heeded it.
    """
    # Signals are the main thread's; and who started this process in the background had them ignored for a reason.
    in_charge = threading.current_thread() is threading.main_thread()
    if not in_charge or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        _asked.set()
        raise KeyboardInterrupt

    tell_of_lost = sys.unraisablehook

    def tell_of_others(lost: "sys.UnraisableHookArgs") -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            _lost.set()
        else:
            tell_of_lost(lost)

    _asked.clear()
    _lost.clear()
    sys.unraisablehook = tell_of_others
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
        if _lost.is_set():
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = tell_of_lost
        _asked.clear()
        _lost.clear()


def heed_interrupt() -> None:
    """Stop here when an interrupt came and was lost.

    Raises:
        KeyboardInterrupt: it did.
    """
    if _asked.is_set():
        _lost.clear()
        raise KeyboardInterrupt
