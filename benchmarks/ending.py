"""An orderly end, whoever asks for it: a signal makes the program take away all it has made."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Have a signal that asks for the end raise ``SystemExit`` in the main thread, which must be the calling one.

    Only the first does, so that the way out is not cut short. Signals ignored from outside (``nohup``) stay so.
    """
    ended: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        if not ended:
            ended.append(number)
            raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in _ENDING}
    heard = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in heard:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let such signals wait until what is done here, such as taking a lab away, is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
