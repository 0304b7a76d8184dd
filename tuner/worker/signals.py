"""The signals that ask a worker to stop, as messages to it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tuner.worker.slot_process import Inbox, Message

TOGETHER_S = 0.1
"""Signals that come so soon after one another are one request: `timeout`, for one, signals the worker and then its
whole process group."""


@contextmanager
def signals_into(inbox: Inbox) -> Iterator[None]:
    """Put SIGINT, SIGTERM and SIGHUP into `inbox` for a while, then put the handlers back.

    Where SIGHUP is ignored, as under nohup, it stays so.
    """
    taken_at = -TOGETHER_S

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal taken_at
        if time.monotonic() - taken_at >= TOGETHER_S:
            taken_at = time.monotonic()
            inbox.put(Message(kind="signal", text=signal.Signals(number).name))

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
