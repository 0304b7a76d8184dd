"""The signals that ask a worker to stop, as messages to it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tuner.exits import OF_SIGNAL, TOGETHER_S
from tuner.worker.slot_process import Inbox, Message


@contextmanager
def signals_into(inbox: Inbox) -> Iterator[None]:
    """Put the signals of `OF_SIGNAL` into `inbox` for a while, then put the handlers back.

    One that is ignored, as SIGHUP is under nohup, stays so, but for SIGINT and SIGTERM. In another thread than the
    main one there are none: Python lets only that one have handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken_at = -TOGETHER_S

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal taken_at
        if time.monotonic() - taken_at >= TOGETHER_S:
            taken_at = time.monotonic()
            inbox.put(Message(kind="signal", text=signal.Signals(number).name))

    always = (signal.SIGINT, signal.SIGTERM)
    numbers = [number for number in OF_SIGNAL if number in always or signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
