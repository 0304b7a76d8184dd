"""How far a study is: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import html
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from storage.coordination.records import TrialRecord
from storage.coordination.studies import StateCounts
from tuner.log import PLAIN_INTERVAL_S, Log
from tuner.text import duration


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A study at one moment. `left_s` is None while there is nothing to reckon it from."""

    counts: StateCounts
    trials: int
    best: TrialRecord | None
    left_s: float | None

    def text(self) -> str:
        """Say it in one line."""
        counts = self.counts
        parts = [
            f"{counts.done}/{self.trials} done",
            f"{counts.running} running",
            f"{counts.pruned} pruned",
            f"{counts.failed} failed",
        ]
        if self.best is not None and self.best.value is not None:
            parts.append(f"best {self.best.value:.6g} (trial {self.best.number})")
        if self.left_s is not None:
            parts.append(f"about {duration(self.left_s)} left")
        return ", ".join(parts)


class Progress:
    """Shows the snapshots that it is given, as a context manager."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._live = Live(console=log.console, auto_refresh=False) if _is_live(log) else None
        self._shown: str | None = None
        self._shown_at = -PLAIN_INTERVAL_S

    @property
    def is_live(self) -> bool:
        """Whether there is a display on a terminal."""
        return self._live is not None

    def __enter__(self) -> Self:
        if self._live is not None:
            with self._log.writing():
                self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            with self._log.writing():
                self._live.stop()

    def show(self, snapshot: Snapshot, *, last: bool = False) -> None:
        """Show the snapshot: at once on a terminal; as a line, not too often, elsewhere (`last`: in any case)."""
        text = snapshot.text()
        if self._live is not None:
            with self._log.writing():
                self._live.update(_display(snapshot, text), refresh=True)
            return
        now = time.monotonic()
        without_time = text.partition(", about")[0]
        if without_time == self._shown or (not last and now - self._shown_at < PLAIN_INTERVAL_S):
            return
        self._shown, self._shown_at = without_time, now
        counts = snapshot.counts
        self._log.event(
            "progress",
            text,
            done=counts.done,
            trials=snapshot.trials,
            running=counts.running,
            pruned=counts.pruned,
            failed=counts.failed,
            left_s=snapshot.left_s,
        )


class NotebookProgress(Progress):
    """Shows them below a notebook's cell, each in the place of the one before."""

    def __init__(self, log: Log) -> None:
        super().__init__(log)
        self._handle: Any = None

    @property
    def is_live(self) -> bool:
        """Whether there is a display that follows: always."""
        return True

    def show(self, snapshot: Snapshot, *, last: bool = False) -> None:  # noqa: ARG002 - none is left out
        """Show the snapshot at once."""
        import IPython.display

        display: Any = IPython.display.display

        text = snapshot.text()
        bar = f'<progress value="{snapshot.counts.done}" max="{snapshot.trials}" style="width: 100%"></progress>'
        shown = {"text/plain": text, "text/html": f"<div>{bar}<br>{html.escape(text)}</div>"}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)


class NoProgress(Progress):
    """Shows none."""

    @property
    def is_live(self) -> bool:
        """Whether there is a display that follows: never."""
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, snapshot: Snapshot, *, last: bool = False) -> None:
        """Show nothing."""


def _is_live(log: Log) -> bool:
    return log.format == "text" and log.console.is_terminal


def _display(snapshot: Snapshot, text: str) -> Table:
    # Two lines: side by side they need more than 80 columns.
    grid = Table.grid(expand=True)
    grid.add_row(ProgressBar(total=snapshot.trials, completed=snapshot.counts.done))
    grid.add_row(Text(text))
    return grid
