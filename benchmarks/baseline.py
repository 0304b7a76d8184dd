"""The ratios that the benchmarks had, kept in `baseline.json`, and whether one fell since."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Verdict = Literal["same", "rose", "fell", "new", "gone"]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The median of a ratio's turns, and how far the farthest of them lie apart."""

    median: float
    spread: float

    @classmethod
    def of(cls, turns: Sequence[float]) -> Ratio:
        """Return that of some turns, to what is worth keeping of it."""
        return cls(median=_rounded(statistics.median(turns)), spread=_rounded(max(turns) - min(turns)))


def verdict(now: Ratio | None, before: Ratio | None) -> Verdict:
    """Tell whether a ratio has changed by more than its turns differ, now or before.

    One that is measured no more is `gone`: nobody would notice if it fell.
    """
    if now is None:
        return "gone"
    if before is None:
        return "new"
    if abs(now.median - before.median) <= max(now.spread, before.spread):
        return "same"
    return "rose" if now.median > before.median else "fell"


def compared(name: str, now: Mapping[str, Ratio], before: Mapping[str, Ratio]) -> tuple[list[str], bool]:
    """Return a line of the table for each ratio of a benchmark, and whether none fell or is gone."""
    lines, verdicts = [], set()
    for what in {**before, **now}:
        both = (now.get(what), before.get(what))
        verdicts.add(found := verdict(*both))
        medians = ["-" if ratio is None else f"{ratio.median:.3g}" for ratio in both]
        spread = max(ratio.spread for ratio in both if ratio is not None)
        lines.append(line(name, what, *medians, f"{spread:.3g}", found))
    return lines, not verdicts & {"fell", "gone"}


def line(benchmark: str, ratio: str, *figures: str) -> str:
    """Return a line of the table."""
    *numbers, verdict = figures
    return f"{benchmark:<16}{ratio:<52}{''.join(f'{number:>10}' for number in numbers)}  {verdict}"


def read(file: Path) -> dict[str, dict[str, Ratio]]:
    """Return the ratios of each benchmark; none, if the file is not there."""
    if not file.exists():
        return {}
    kept = json.loads(file.read_text())
    return {name: {what: Ratio(**ratio) for what, ratio in its.items()} for name, its in kept.items()}


def write(file: Path, found: Mapping[str, Mapping[str, Ratio]]) -> None:
    """Keep these; those of benchmarks that are not among them stay."""
    kept = {**read(file), **found}
    as_json = {name: {what: asdict(ratio) for what, ratio in its.items()} for name, its in sorted(kept.items())}
    file.write_text(json.dumps(as_json, indent=1) + "\n")


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
