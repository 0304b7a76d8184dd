"""How long a whole search takes: the plain recipe on Optuna and a DataLoader, and `tuner run`, side by side.

    python benchmarks/search_speed.py [--data-dir data] [--repeats 3] [--trials 20] [--epochs 5] [--workers 2]

Both sides search learning rate and width of an MLP on Fashion-MNIST, batches of 32, with TPE and the median pruner,
each in a study of its own on the same PostgreSQL:

  plain  `search_plain.py` in so many processes: `study.optimize` on Optuna's RDBStorage, a transform for each image,
         `loss.item()` on each batch. Its processes share out the trials beforehand, and the cores (`--plain-threads`)
  ours   `tuner run search_objective.py:FashionMLP --no-export`, with so many workers

The sides take turns. Seconds are from the start of the command to the end of its last process, with imports and
reading the data; as how many trials are pruned differs from run to run, so do the epochs in them. The best accuracy is
that of the best epoch of any trial, on the same fifth of the images. `--data-dir` (or TUNER_TEST_DATA) is torchvision's
root of FashionMNIST; `--rows` repeats its images up to so many, such as the 60,000 of the full set. Without a root, the
images are random ones; without --storage, starts an embedded PostgreSQL for the time of the run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch
from measuring import argument_parser, database, paired, print_machine, write_ratios
from optuna.trial import TrialState
from torch import Tensor
from torchvision.datasets import FashionMNIST

from storage import PostgresStorage, parse_url

HERE = Path(__file__).parent
N_RANDOM_IMAGES = {"train": 1000, "t10k": 200}


@dataclass(frozen=True, kw_only=True)
class Search:
    """What one search took and found; `epochs` is how many all trials had together."""

    seconds: float
    completed: int
    pruned: int
    epochs: int
    best: float


def write_images(root: Path, part: str, images: Tensor, labels: Tensor) -> None:
    """Write images (n, 28, 28) and labels in uint8 as torchvision's FashionMNIST reads them."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, values in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes((0, 0, 8, values.dim())) + b"".join(size.to_bytes(4, "big") for size in values.shape)
        (raw / f"{part}-{name}-ubyte").write_bytes(header + values.to(torch.uint8).numpy().tobytes())


@contextmanager
def data_directory(found: Path | None, rows: int | None) -> Iterator[tuple[Path, str]]:
    """A directory for a search to work in, with the images in it, and what they are."""
    is_there = found is not None and (found / "FashionMNIST").is_dir()
    what = "Fashion-MNIST" if is_there else "random images of the shape of Fashion-MNIST, which was not found"
    what += f", {rows:,} of them" if rows else ""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for part, n_random in N_RANDOM_IMAGES.items():
            if is_there:
                images = FashionMNIST(found, train=part == "train")
                values, labels = images.data, images.targets
            else:
                values, labels = torch.randint(256, (n_random, 28, 28)), torch.randint(10, (n_random,))
            chosen = torch.arange(rows or len(labels) if part == "train" else len(labels)) % len(labels)
            write_images(root, part, values[chosen], labels[chosen])
        yield root, what


def run_together(commands: Sequence[Sequence[str]], environment: dict[str, str]) -> float:
    """Run the commands at the same time; return the seconds until the last has ended, successfully."""
    started_at = time.perf_counter()
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        said = [process.communicate()[1] for process in processes]
    finally:
        for process in processes:
            process.kill()  # where this was interrupted; the others have ended
    seconds = time.perf_counter() - started_at
    for process, text in zip(processes, said, strict=True):
        if process.returncode:
            sys.exit(f"{process.args!r} ended with exit code {process.returncode}:\n{text}")
    return seconds


def plain(url: str, study: str, data_dir: Path, seed: int, options: argparse.Namespace) -> float:
    each, rest = divmod(options.trials, options.workers)
    commands = [
        # With the same seed, all workers would begin with the same params.
        [HERE / "search_plain.py", data_dir, study, each + (number < rest), options.epochs, 1000 * seed + number]
        for number in range(options.workers)
    ]
    stock_url = parse_url(url).render_as_string(hide_password=False)
    threads = {"OMP_NUM_THREADS": str(options.plain_threads)} if options.plain_threads else {}
    return run_together([list(map(str, command)) for command in commands], {"STORAGE": stock_url, **threads})


def ours(url: str, study: str, data_dir: Path, seed: int, options: argparse.Namespace) -> float:
    arguments = ["--study", study, "--trials", options.trials, "--epochs", options.epochs, "--workers", options.workers]
    arguments += ["--seed", seed, "--sampler", "tpe", "--pruner", "median", "--data-dir", data_dir, "--no-export"]
    command = ["-m", "tuner", "run", HERE / "search_objective.py:FashionMLP", *arguments]
    return run_together([list(map(str, command))], {"TUNER_STORAGE": url})


SIDES = {"plain": plain, "ours": ours}


def outcome(url: str, study: str, seconds: float) -> Search:
    """Return what is in the database of a search."""
    storage = PostgresStorage(url)
    trials = optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False)
    storage.engine.dispose()
    states = [trial.state for trial in trials]
    return Search(
        seconds=seconds,
        completed=states.count(TrialState.COMPLETE),
        pruned=states.count(TrialState.PRUNED),
        epochs=sum(len(trial.intermediate_values) for trial in trials),
        best=max(value for trial in trials for value in trial.intermediate_values.values()),
    )


def spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def print_search(repeat: int, side: str, found: Search) -> None:
    print(
        f"  run {repeat} {side:<6}{found.seconds:8.1f} s {found.completed:4} completed {found.pruned:4} pruned"
        f" {found.epochs:5} epochs   best accuracy {found.best:.4f}",
        flush=True,
    )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--storage", default=os.environ.get("TUNER_STORAGE"))
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("TUNER_TEST_DATA"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument(
        "--rows", type=int, help="repeat the images, or leave some out, for so many to train and validate"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the first repeat; the others count on from it")
    parser.add_argument(
        "--plain-threads",
        type=int,
        help="threads of each plain process (default: its share of the cores); 0 for as many as torch takes by itself,"
        " which is what the recipe says nothing about and costs it most of its time",
    )
    options = parser.parse_args()
    if options.plain_threads is None:
        options.plain_threads = max(1, (os.cpu_count() or 1) // options.workers)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found: dict[str, list[Search]] = {side: [] for side in SIDES}
    data_dir = None if options.data_dir is None else Path(options.data_dir)
    with database(options.storage) as url, data_directory(data_dir, options.rows) as (root, what):
        print_machine(url)
        threads = options.plain_threads or "any number of"
        print(f"{options.trials} trials x {options.epochs} epochs, {options.workers} workers, {what};", end=" ")
        print(f"{threads} threads in each plain process", flush=True)
        for repeat in range(options.repeats):
            for name, side in SIDES.items():
                study = f"search-{os.getpid()}-{repeat}-{name}"
                seconds = side(url, study, root, options.seed + repeat, options)
                found[name].append(outcome(url, study, seconds))
                print_search(repeat, name, found[name][-1])
    for name, its in found.items():
        seconds, best = spread([each.seconds for each in its], 1), spread([each.best for each in its], 4)
        print(f"  {name:<6} seconds {seconds}, best accuracy {best}")
    ratios = paired(*([each.seconds for each in found[side]] for side in ("plain", "ours")))
    gains = [other.best - one.best for one, other in zip(found["plain"], found["ours"], strict=True)]
    print(f"  ratio: ours {spread(ratios, 2)} x faster, best accuracy {spread(gains, 4)} better")
    write_ratios(options.ratios, {"a search, x faster than plain": ratios})


if __name__ == "__main__":
    main()
