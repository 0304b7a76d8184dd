"""A trial's reports, written by a thread of their own so that training goes on while the database is away."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from sqlalchemy.exc import SQLAlchemyError

from storage.database.engine import is_outage
from storage.database.errors import StorageError
from storage.trials.curves import CurvePoint

PATIENCE_S = 1.0
"""How long a report waits to be written before training goes on without."""
PAUSE_S = 1.0
LOOK_S = 0.2


class Reports:
    """Writes reports in order, each as soon as the database takes it. A context manager for one attempt."""

    def __init__(self, write: Callable[[CurvePoint], None], written: Callable[[CurvePoint], None]) -> None:
        """`write` writes one report, and may wait for the database; `written` is told of each that is written."""
        self._write = write
        self._written = written
        self._changed = threading.Condition()
        self._waiting: deque[CurvePoint] = deque()
        self._error: BaseException | None = None
        self._is_behind = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed.set()
            self._changed.notify_all()

    @property
    def is_behind(self) -> bool:
        """Whether the database has not taken all reports yet."""
        with self._changed:
            return bool(self._waiting)

    def put(self, point: CurvePoint) -> None:
        """Have a report written, and wait for it unless the database is away.

        Raises what writing it, or an earlier one, met with: that the trial is somebody else's, or the study halted.
        """
        with self._changed:
            self._waiting.append(point)
            self._changed.notify_all()
            if not self._is_behind:
                self._changed.wait_for(lambda: not self._waiting or self._error is not None, PATIENCE_S)
                self._is_behind = bool(self._waiting)
        self.check()

    def check(self) -> None:
        """Raise what ended the writing, if anything did."""
        if self._error is not None:
            raise self._error

    def flush(self, timeout_s: float, stop: threading.Event) -> list[CurvePoint]:
        """Wait until all is written, and return what could not be, in time or soon after `stop` was set."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._waiting and self._error is None and time.monotonic() < deadline:
                if stop.is_set():
                    deadline = min(deadline, time.monotonic() + PATIENCE_S)
                self._changed.wait(LOOK_S)
            left = list(self._waiting)
        self.check()
        return left

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closed.is_set())
                if self._closed.is_set():
                    return
                point = self._waiting[0]
            try:
                self._write(point)
                self._written(point)
            except (StorageError, SQLAlchemyError) as error:
                if is_outage(error):
                    self._closed.wait(PAUSE_S)
                    continue
                self._end(error)
                return
            except (KeyError, ValueError, RuntimeError) as error:  # the study was deleted, the trial has ended
                self._end(error)
                return
            with self._changed:
                self._waiting.popleft()
                self._is_behind = bool(self._waiting)
                self._changed.notify_all()

    def _end(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
