"""Replay searches over recorded curves, and keep what each had found when.

    python -m benchmarks.search_replay.run --out traces [--tasks digits ..] [--methods "tpe + median" ..]
        [--workers 1 4 16] [--seeds 50] [--trainings 64] [--recorded-points]

Each search has so many seconds of device time as `--trainings` full trainings of the task's median point take, all
workers' together. What --out has already is left as it is, so a run that was stopped goes on by the same command. With
--recorded-points the points are the recorded ones, in an order of each seed's: for methods that learn nothing of the
space, without any surrogate. `python -m benchmarks.search_replay.analysis` compares what was found.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import optuna

from benchmarks.search_replay.curves import TABLES
from benchmarks.search_replay.methods import METHODS, OF_RULES
from benchmarks.search_replay.simulator import Simulation, Trace
from benchmarks.search_replay.tasks import TASKS
from benchmarks.search_replay.world import Recorded, Scale, Smooth, Table, World
from tuner.objective import Objective


@dataclass(frozen=True)
class Search:
    """A search to replay."""

    tables: str
    task: str
    method: str
    workers: int
    seed: int
    trainings: float
    of_points: bool


@cache
def task_of(tables: str, name: str) -> tuple[Objective, Table, Scale]:
    """Return what a process needs of a task, read once."""
    objective = TASKS[name].build()
    table = Table.load(Path(tables), name, objective)
    return objective, table, Scale.of(table)


@cache
def smooth(tables: str, name: str) -> Smooth:
    return Smooth(TASKS[name], task_of(tables, name)[1])


def replay(search: Search) -> dict[str, Any]:
    """Return the search and its trace, times in full trainings, scores as regrets."""
    objective, table, scale = task_of(search.tables, search.task)
    world: World = (
        Recorded(TASKS[search.task], table, search.seed) if search.of_points else smooth(search.tables, search.task)
    )
    simulation = Simulation(world, objective, METHODS[search.method], workers=search.workers, seed=search.seed)
    found = simulation.run(search.trainings * scale.full_s)
    told = {**asdict(search), "scale": asdict(scale), **asdict(found)}
    told["seen"], told["complete"] = (_rounded(trace, scale.full_s) for trace in (found.seen, found.complete))
    del told["tables"]
    return told


def _rounded(trace: Trace, full_s: float) -> dict[str, list[float]]:
    """Return what is written of a trace: to a ten-thousandth of a training, and six digits of each score."""
    scores = {"value": trace.value, "test": trace.test}
    return {
        "at": [round(at / full_s, 4) for at in trace.at],
        **{name: [float(f"{score:.6g}") for score in its] for name, its in scores.items()},
    }


def quiet() -> None:
    optuna.logging.set_verbosity(logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    os.environ["OMP_NUM_THREADS"] = "1"


def missing(options: argparse.Namespace) -> Iterator[Search]:
    there = set()
    if options.out.exists():
        for line in options.out.read_text().splitlines():
            told = json.loads(line)
            there.add(tuple(told[key] for key in ("task", "method", "workers", "seed", "trainings", "of_points")))
    for task in options.tasks:
        for method in options.methods:
            for workers in options.workers:
                for seed in range(options.seeds):
                    key = (task, method, workers, seed, options.trainings, options.recorded_points)
                    if key not in there:
                        yield Search(str(options.tables), *key)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", type=Path, default=TABLES, help="a directory of packed curves")
    parser.add_argument("--out", type=Path, required=True, help="a file for the traces, one line each")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=None, choices=list(METHODS))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--trainings", type=float, default=64.0)
    parser.add_argument("--recorded-points", action="store_true")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    options.methods = options.methods or list(OF_RULES if options.recorded_points else METHODS)
    if options.recorded_points and not set(options.methods) <= set(OF_RULES):
        parser.error("recorded points are for the methods that learn nothing of the space: " + ", ".join(OF_RULES))
    quiet()
    if not options.recorded_points:
        for name in options.tasks:  # before the processes are forked
            world = smooth(str(options.tables), name)
            found, ceiling = world.check()
            print(f"{name}: what is left out is predicted at a rank correlation of {found:.2f}; seeds: {ceiling:.2f}")
    fork = multiprocessing.get_context("fork")
    with options.out.open("a") as file, fork.Pool(options.processes, initializer=quiet) as pool:
        for trace in pool.imap_unordered(replay, missing(options)):
            file.write(json.dumps(trace) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
