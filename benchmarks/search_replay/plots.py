"""Draw replayed searches: regret over device time, a panel a task, as one SVG file.

    python -m benchmarks.search_replay.plots [traces] --out search.svg [--workers 4] [--test]
        [--methods "tpe + rungs" ..] [--tasks digits ..]

Without `traces` those that docs/search.md tells of. Lines are interquartile means over seeds, of the regret by
validation or with --test of that on test. Both axes are logarithmic: device time in full trainings of the median point,
and what of a panel's regret is still there, from 1 where the highest line begins to where the lowest ends.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from benchmarks.search_replay.analysis import TRACES, Traces, iqm, read

COLOURS = ("#444444", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
PANEL, GAP, COLUMNS = (300, 210), 48, 2
FLOOR = 0.01


class Panel:
    """Where a task's regrets lie on the page."""

    def __init__(self, left: float, top: float, trainings: float) -> None:
        self._left, self._top = left, top
        self._trainings = trainings

    def at(self, after: float, left_of_regret: float) -> tuple[float, float]:
        """Return the point of what is left of the regret after so many trainings."""
        x = math.log(after) / math.log(self._trainings)
        y = math.log(max(left_of_regret, FLOOR)) / math.log(FLOOR)
        return self._left + x * PANEL[0], self._top + y * PANEL[1]

    def frame(self, title: str, trainings: float) -> Iterator[str]:
        width, height = PANEL
        yield f'<path d="M{self._left} {self._top}h{width}v{height}h-{width}z" fill="none" stroke="#bbb"/>'
        yield f'<text x="{self._left}" y="{self._top - 6}" font-weight="bold">{escape(title)}</text>'
        for after in (2**power for power in range(int(math.log2(trainings)) + 1)):
            x, y = self.at(after, FLOOR)
            yield f'<text x="{x:.1f}" y="{y + 14:.1f}" text-anchor="middle" fill="#666">{after}</text>'
        for share in (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, FLOOR):
            x, y = self.at(1, share)
            yield f'<text x="{x - 4:.1f}" y="{y + 4:.1f}" text-anchor="end" fill="#666">{share:g}</text>'
            yield f'<path d="M{x:.1f} {y:.1f}h{width}" stroke="#eee"/>'


def drawn(tasks: Mapping[str, Mapping[str, Traces]], methods: Sequence[str], *, on_test: bool) -> str:
    """Return the page, of the methods in this order that a task has."""
    rows = math.ceil(len(tasks) / COLUMNS)
    width = COLUMNS * (PANEL[0] + GAP) + 16
    height = rows * (PANEL[1] + GAP) + 22 * len(methods) + 24
    parts = []
    for index, (task, of) in enumerate(tasks.items()):
        its = {name: of[name] for name in methods if name in of}
        trainings = min(traces.trainings for traces in its.values())
        times = np.geomspace(1, trainings, 60)
        lines = {
            name: [iqm(traces.regrets(traces.test if on_test else traces.value, after)) for after in times]
            for name, traces in its.items()
        }
        lowest, highest = min(map(min, lines.values())), max(map(max, lines.values()))
        left = GAP + index % COLUMNS * (PANEL[0] + GAP)
        panel = Panel(left, 24 + index // COLUMNS * (PANEL[1] + GAP), trainings)
        parts += panel.frame(task, trainings)
        for name, line in lines.items():
            left_of = [(regret - lowest) / max(highest - lowest, 1e-9) for regret in line]
            points = (panel.at(after, share) for after, share in zip(times, left_of, strict=True))
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            colour = COLOURS[methods.index(name) % len(COLOURS)]
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    for index, name in enumerate(methods):
        y = rows * (PANEL[1] + GAP) + 20 + 22 * index
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<path d="M{GAP} {y}h28" stroke="{colour}" stroke-width="2.4"/>')
        parts.append(f'<text x="{GAP + 36}" y="{y + 4}">{escape(name)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        f' font-size="11"><rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("traces", type=Path, nargs="?", default=TRACES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--methods", nargs="+", help="in the order of their colours; all that there are by default")
    parser.add_argument("--test", action="store_true", help="regret on test, of what validation chose")
    parser.add_argument("--tasks", nargs="+", help="those of the traces to draw; all by default")
    options = parser.parse_args(arguments)
    tasks = {
        task: methods
        for (task, workers), methods in read(options.traces).items()
        if workers == options.workers and (options.tasks is None or task in options.tasks)
    }
    if not tasks:
        parser.error(f"no search of these tasks with {options.workers} workers is in {options.traces}")
    methods = options.methods or sorted({name for its in tasks.values() for name in its})
    options.out.write_text(drawn(tasks, methods, on_test=options.test))


if __name__ == "__main__":
    main()
