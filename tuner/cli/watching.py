"""`tuner status --watch`: the display on a terminal, blocks of lines elsewhere, lines of JSON for programs."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from storage.database.engine import is_outage
from storage.database.errors import StorageError
from storage.database.outages import Told
from tuner.cli.status_view import lines, show
from tuner.errors import first_line
from tuner.log import Log
from tuner.text import duration, printable

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

    from tuner.study.status import Status

REDRAW_S = 1.0
"""How often a display that waits for the database is drawn anew."""


def follow(look: Callable[[], Status], log: Log, *, as_json: bool, interval_s: float) -> None:
    """Show what `look` returns every `interval_s` seconds until the study is finished, or Ctrl-C.

    While the database is away, what it said last stays. Raises what the first `look` does, and of later ones what is
    no outage.
    """
    found = look()
    with _view(log, as_json=as_json, interval_s=interval_s) as view:
        view.show(found)
        if _is_over(found):
            return
        reader = _Reader(look, interval_s)
        reader.start()
        while not _is_over(found):
            answer = reader.answer()
            if isinstance(answer, Exception):
                if not is_outage(answer):
                    raise answer
                view.show_outage(answer)
            elif answer is not None:
                found = answer
                view.show(found)
            else:
                view.show_waiting()


def _is_over(found: Status) -> bool:
    return found.state == "finished"


class _Reader(threading.Thread):
    """Looks again and again on a thread of its own.

    A network that swallows everything keeps a query for half a minute, through which the main thread goes on drawing
    and listens to Ctrl-C.
    """

    def __init__(self, look: Callable[[], Status], interval_s: float) -> None:
        super().__init__(name="reader of the status", daemon=True)
        self._look = look
        self._interval_s = interval_s
        self._answers: queue.SimpleQueue[Status | Exception] = queue.SimpleQueue()

    def run(self) -> None:
        pause = threading.Event()
        while not pause.wait(self._interval_s):
            try:
                self._answers.put(self._look())
            except (StorageError, SQLAlchemyError) as error:
                self._answers.put(error)

    def answer(self) -> Status | Exception | None:
        """Return the next answer, None if none comes for REDRAW_S."""
        try:
            return self._answers.get(timeout=REDRAW_S)
        except queue.Empty:
            if not self.is_alive():
                raise RuntimeError("the thread that reads the status has ended; see its error above") from None
            return None


class _Lines:
    """Shows each status by lines of its own, and outages as events of the log."""

    def __init__(self, log: Log, *, as_json: bool) -> None:
        self._log = log
        self._as_json = as_json
        self._is_first, self._told = True, Told()

    def show(self, found: Status) -> None:
        if self._told:
            self._log.event("database_back", "the database is back")
            self._told.over()
        if not self._as_json and not self._is_first:
            print()
        self._is_first = False
        show(found, as_json=self._as_json)
        sys.stdout.flush()

    def show_outage(self, error: Exception) -> None:
        if self._told.is_news(error):
            self._log.event("database_away", f"{first_line(error)}; trying again")

    def show_waiting(self) -> None:
        pass


class _Display:
    """Keeps the last status in its place on a terminal, with a line below that tells of outages."""

    def __init__(self, live: Live, interval_s: float) -> None:
        self._live = live
        self._interval_s = interval_s
        self._lines: list[str] = []
        self._error: str | None = None
        self._shown_at = 0.0

    def show(self, found: Status) -> None:
        self._lines, self._error, self._shown_at = list(lines(found)), None, time.monotonic()
        self._draw(None if _is_over(found) else f"every {self._interval_s:g} s; Ctrl-C ends this")

    def show_outage(self, error: Exception) -> None:
        self._error = first_line(error)
        self.show_waiting()

    def show_waiting(self) -> None:
        """Tell for how long there was no answer, if that is longer than one may take."""
        old_s = time.monotonic() - self._shown_at
        if self._error is not None:
            self._draw(f"this was {duration(old_s)} ago; trying again: {self._error}")
        elif old_s > self._interval_s + 2 * REDRAW_S:
            self._draw(f"this was {duration(old_s)} ago; waiting for the database")

    def _draw(self, below: str | None) -> None:
        self._live.update(_cut(self._lines if below is None else [*self._lines, "", printable(below)]), refresh=True)


@contextmanager
def _view(log: Log, *, as_json: bool, interval_s: float) -> Iterator[_Lines | _Display]:
    if as_json or not sys.stdout.isatty():
        yield _Lines(log, as_json=as_json)
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        yield _Lines(log, as_json=False)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield _Display(live, interval_s)


def _cut(shown: list[str]) -> Text:
    """Return lines that do not wrap: markup in them stays text."""
    from rich.text import Text

    return Text("\n".join(shown), no_wrap=True, overflow="ellipsis")
