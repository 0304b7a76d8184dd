"""Compare replayed searches: regret over device time, and the device time to another method's regret.

    python -m benchmarks.search_replay.analysis [traces] [--against "tpe + stock median"] [--complete]
        [--tasks digits ..]

Without `traces` those that docs/search.md tells of. For each task and number of workers: the interquartile mean over
seeds of the regret of what validation chose, and of its regret on test, after so many full trainings of device time;
the ratio of the device time that a method needs to the regret that the other has after 10, 20, 40 trainings (the median
of the seeds' ratios, with a bootstrap interval of 95 %; a search that never comes there counts as its whole time);
Wilcoxon's test of the paired regrets after all of the time, corrected by Holm over the methods of a task. A method that
was run with fewer seeds is compared by those.

With --complete a search has the best of its complete trials, which can be exported, and not of all that was reported.

Over the tasks: the geometric mean of the ratios, the median and the worst of them, and whether the mean may be chance,
by the mixed model `log ratio = mean + task + seed`: with as many seeds a task, Student's test of the tasks' means.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import trim_mean, ttest_1samp, wilcoxon

TRACES = Path(__file__).parent / "traces"
AT = (1, 2, 4, 8, 16, 24, 40, 64)
"""Device time at which regrets are shown, in full trainings."""
AFTER = (10, 20, 40)
"""Device time of the method that is compared against, whose regret the others are to reach."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Traces:
    """One method's searches on a task: by seed, when the incumbent changed, and its regrets since then."""

    at: Mapping[int, list[float]]
    value: Mapping[int, list[float]]
    test: Mapping[int, list[float]]
    trainings: float

    @property
    def seeds(self) -> list[int]:
        return sorted(self.at)

    def of_seeds(self, seeds: Sequence[int]) -> Traces:
        """Return those of some seeds."""
        at, value, test = ({seed: its[seed] for seed in seeds} for its in (self.at, self.value, self.test))
        return Traces(at, value, test, self.trainings)

    def regrets(self, which: Mapping[int, list[float]], after: float) -> Floats:
        """Return those after so much device time, by seed; until there is any, that of the median point."""
        found = []
        for seed in self.seeds:
            n_changes = bisect_right(self.at[seed], after)
            found.append(which[seed][n_changes - 1] if n_changes else 1.0)
        return np.array(found)

    def times_to(self, regrets: Floats) -> Floats:
        """Return the device time to a regret each, by seed; all of it where it is not reached."""
        found = []
        for seed, wanted in zip(self.seeds, regrets, strict=True):
            times = (at for at, value in zip(self.at[seed], self.value[seed], strict=True) if value <= wanted)
            found.append(next(times, self.trainings))
        return np.array(found)


def read(path: Path, which: str = "seen") -> dict[tuple[str, int], dict[str, Traces]]:
    """Return the traces by task and number of workers, and by method; of what was `seen`, or is `complete`.

    `path` is a file of them, or a directory of packed ones.
    """
    lines = []
    for part in sorted(path.glob("*.jsonl.xz")) if path.is_dir() else [path]:
        with lzma.open(part, "rt") if part.suffix == ".xz" else part.open() as file:
            lines += [json.loads(line) for line in file]
    grouped: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        grouped[line["task"], line["workers"]][line["method"]].append(line)
    return {
        key: {method: _traces(found, which) for method, found in methods.items()}
        for key, methods in sorted(grouped.items())
    }


def _traces(lines: Sequence[dict[str, Any]], which: str) -> Traces:
    def regrets(of: str) -> dict[int, list[float]]:
        found = {}
        for line in lines:
            best, median = line["scale"]["best"], line["scale"]["median"]
            found[line["seed"]] = [(value - best) / (median - best) for value in line[which][of]]
        return found

    at = {line["seed"]: line[which]["at"] for line in lines}
    return Traces(at, regrets("value"), regrets("test"), lines[0]["trainings"])


@dataclass(frozen=True)
class Ratio:
    """The device time of a method over another's, to the same regret: median over seeds, and its 95 % interval."""

    median: float
    low: float
    high: float
    mean_log: float
    """The mean over seeds of the ratios' logarithms."""

    @classmethod
    def of(cls, mine: Traces, theirs: Traces, after: float) -> Ratio:
        goal = float(np.median(theirs.regrets(theirs.value, after)))
        goals = np.full(len(mine.seeds), goal)
        logs = np.log(mine.times_to(goals)) - np.log(theirs.times_to(np.full(len(theirs.seeds), goal)))
        draws = np.random.default_rng(0).integers(len(logs), size=(1000, len(logs)))
        medians = np.exp(np.median(logs[draws], axis=1))
        low, high = np.quantile(medians, (0.025, 0.975))
        return cls(float(np.exp(np.median(logs))), float(low), float(high), float(logs.mean()))


def iqm(values: Floats) -> float:
    """Return the interquartile mean."""
    return float(trim_mean(values, 0.25))


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for their number."""
    corrected: dict[str, float] = {}
    highest = 0.0
    for rank, (name, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, p * (len(ps) - rank)))
        corrected[name] = highest
    return corrected


def paired_p(mine: Traces, theirs: Traces) -> float:
    """Return Wilcoxon's p of the regrets after all of the time, by seed; 1 where none differs."""
    differences = mine.regrets(mine.value, mine.trainings) - theirs.regrets(theirs.value, theirs.trainings)
    return 1.0 if not differences.any() else float(wilcoxon(differences).pvalue)


def compared(methods: Mapping[str, Traces], against: str) -> dict[str, dict[str, Any]]:
    """Return what is told of each method of a task."""
    paired = {}
    for name, its in methods.items():
        seeds = sorted(set(its.seeds) & set(methods[against].seeds))
        paired[name] = its.of_seeds(seeds), methods[against].of_seeds(seeds)
    ps = holm({name: paired_p(*both) for name, both in paired.items() if name != against})
    return {
        name: {
            "regret": [iqm(its.regrets(its.value, after)) for after in AT if after <= its.trainings],
            "test": [iqm(its.regrets(its.test, after)) for after in AT if after <= its.trainings],
            "ratio": {after: Ratio.of(its, theirs, after) for after in AFTER if after <= its.trainings},
            "p": ps.get(name),
            "seeds": len(its.seeds),
            "trainings": its.trainings,
        }
        for name, (its, theirs) in paired.items()
    }


def overall(found: Mapping[tuple[str, int], Mapping[str, Mapping[str, Any]]], workers: int) -> dict[str, Any]:
    """Return, by method and goal, the geometric mean of the tasks' ratios, their median and the worst of them, and the
    p of their logarithms' means (NaN of a single task)."""
    tasks = [methods for (_, of), methods in found.items() if of == workers]
    names = set.intersection(*(set(methods) for methods in tasks)) if tasks else set()
    result: dict[str, Any] = {}
    for name in names:
        for after in tasks[0][name]["ratio"]:
            of_tasks = [methods[name]["ratio"][after] for methods in tasks]
            ratios, logs = [of.median for of in of_tasks], [of.mean_log for of in of_tasks]
            result.setdefault(name, {})[after] = {
                "mean": math.exp(float(np.mean(np.log(ratios)))),
                "median": float(np.median(ratios)),
                "worst": max(ratios),
                "p": float(ttest_1samp(logs, 0.0).pvalue) if len(set(logs)) > 1 else math.nan,
            }
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("traces", type=Path, nargs="?", default=TRACES)
    parser.add_argument("--against", default="tpe + stock median")
    parser.add_argument("--complete", action="store_true", help="what complete trials came to, not what was reported")
    parser.add_argument("--tasks", nargs="+", help="those of the traces to compare; all by default")
    options = parser.parse_args(arguments)
    found = {
        key: compared(methods, options.against)
        for key, methods in read(options.traces, "complete" if options.complete else "seen").items()
        if options.against in methods and (options.tasks is None or key[0] in options.tasks)
    }
    for (task, workers), methods in found.items():
        shown = ", ".join(str(after) for after in AT if after <= methods[options.against]["trainings"])
        print(f"\n{task}, {workers} workers: regret after {shown} trainings; device time, p")
        for name, told in sorted(methods.items(), key=lambda item: item[1]["regret"][-1]):
            regrets = " ".join(f"{value:6.3f}" for value in told["regret"])
            ratios = "  ".join(
                f"{ratio.median:.2f} ({ratio.low:.2f} .. {ratio.high:.2f})" for ratio in told["ratio"].values()
            )
            p = "" if told["p"] is None else f"{told['p']:.3f}"
            print(f"  {name:<46} {regrets}  {ratios}  {p}  test {told['test'][-1]:.3f}")
    for workers in sorted({of for _, of in found}):
        print(f"\nall tasks, {workers} workers: device time to the regret after {', '.join(map(str, AFTER))} trainings")
        for name, told in sorted(overall(found, workers).items(), key=lambda item: item[1][max(item[1])]["mean"]):
            shown = "  ".join(
                f"{its['mean']:.2f}, median {its['median']:.2f}, worst {its['worst']:.2f}, p {its['p']:.3f}"
                for its in told.values()
            )
            print(f"  {name:<46} {shown}")


if __name__ == "__main__":
    main()
