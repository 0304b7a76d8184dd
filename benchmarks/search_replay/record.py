"""Record learning curves of the tasks, for the replay.

    python -m benchmarks.search_replay.record --data-dir DIRECTORY --out curves [--tasks digits ..] [--share 0/2]

Each point of a task's space is trained once for all its epochs, and the first 100 with two more seeds. Of each epoch
are kept: the metric and the loss on the validation split, the metric on test, and the seconds of CPU that one thread
took for training and validation. What there is in --out already, or in --tables, is left as it is, so a recording that
was stopped goes on by the same command; with --share I/N each of N machines records its own points, and their files lie
side by side in the end. With --pack all of it becomes one compressed file a task in --tables (`search_replay.curves`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.search_replay.curves import TABLES, Curves, Recorded, pack
from benchmarks.search_replay.tasks import TASKS, Task, Values, points
from tuner import training
from tuner.data import Data
from tuner.objective import Objective
from tuner.seeds import derive_seed, seed_everything

N_POINTS, N_REPEATED, N_SEEDS = 1000, 100, 3


def recorded(objective: Objective, data: Data, params: Values, epochs: int, seed: int) -> dict[str, list[float]]:
    """Return the curves of a training, by their names; what diverged has fewer epochs than asked for."""
    seed_everything(seed)
    model = objective.build_model(params)
    metrics = objective.build_metrics(data)
    curves: dict[str, list[float]] = {"metric": [], "loss": [], "test": [], "seconds": []}
    started = time.process_time()

    def on_epoch(epoch: training.Epoch) -> None:
        nonlocal started
        curves["seconds"].append(time.process_time() - started)
        curves["metric"].append(epoch.metrics[objective.metric])
        curves["loss"].append(epoch.train_loss)
        on_test = training.evaluate(model, data.test, objective.build_metrics(data), objective.prediction)
        curves["test"].append(on_test[objective.metric])
        started = time.process_time()

    with suppress(training.DivergedError):
        objective.fit(
            model, data.train, data.valid, params, metrics=metrics, epochs=epochs, seed=seed, on_epoch=on_epoch
        )
    return curves


def recorded_so_far(out: Path, tables: Path, name: str) -> list[Recorded]:
    """Return what the files of a task and its table hold."""
    table = tables / f"{name}.npz"
    return [*(Curves.load(table).recorded() if table.exists() else []), *Recorded.read(out, name)]


def missing(so_far: Sequence[Recorded], n_points: int, share: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the points, and which of their seeds, that are not there yet: every point once, then the repeated ones."""
    there = {(each.point, each.repeat) for each in so_far}
    repeated = [(point, repeat) for repeat in range(1, N_SEEDS) for point in range(min(N_REPEATED, n_points))]
    for point, repeat in [*((point, 0) for point in range(n_points)), *repeated]:
        if point % share[1] == share[0] and (point, repeat) not in there:
            yield point, repeat


def record(
    out: Path, tables: Path, name: str, task: Task, data_dir: Path, n_points: int, share: tuple[int, int]
) -> None:
    objective = task.build()
    data = task.load(objective, data_dir)
    of_space = points(task, objective, n_points)
    path = out / f"{name}.{share[0]}-{share[1]}.jsonl"
    with path.open("a") as file:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            file.write("\n")  # after a line that was cut short
        for point, repeat in missing(recorded_so_far(out, tables, name), n_points, share):
            seed = derive_seed(repeat, "trial", point)
            curves = recorded(objective, data, of_space[point].params, task.epochs, seed)
            file.write(json.dumps({"point": point, "repeat": repeat, **curves}) + "\n")
            file.flush()


def share_of(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not 0 <= int(index) < int(count):
        raise argparse.ArgumentTypeError(f"a share is I/N with I from 0 to N - 1, got {text}")
    return int(index), int(count)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="where the data sets are, or are downloaded to")
    parser.add_argument("--out", type=Path, required=True, help="a directory for what is recorded")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--points", type=int, default=N_POINTS)
    parser.add_argument("--share", type=share_of, default=(0, 1), metavar="I/N")
    parser.add_argument("--tables", type=Path, default=TABLES, help="a directory of packed curves")
    parser.add_argument("--pack", action="store_true", help="pack what there is into the tables, and end")
    options: Any = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in options.tasks:
        if options.pack:
            so_far = recorded_so_far(options.out, options.tables, name)
            print(pack(so_far, TASKS[name].epochs, options.tables / f"{name}.npz"))
        else:
            record(options.out, options.tables, name, TASKS[name], options.data_dir, options.points, options.share)


if __name__ == "__main__":
    main()
