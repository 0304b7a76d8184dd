"""Which pruner finds the better model in the same device time, in real studies: the replay's question, live.

    python benchmarks/search_live.py digits --pruners median rungs --seconds 60 --seeds 10
    python benchmarks/search_live.py fashion_mnist --set models=mlp --rows 8000 --data-dir data --seconds 120

For each seed every pruner has a study of its own, one after the other in an order that turns: a worker that claims
trials for so many seconds, and `tuner export`, which retrains the best and tests it. Prints of each study the trials,
the device time of them all, the best value and the test score; and of each pruner against the first, the differences
by seed, the more the better: their mean, its standard error, and Wilcoxon's p. For a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from measuring import argument_parser, database, print_machine, write_ratios
from scipy.stats import wilcoxon
from search_speed import data_directory

from storage import PostgresStorage


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found in its time, the more the better: where the metric is minimized, with the other sign."""

    trials: Counter[str]
    device_s: float
    best: float
    test: float


def tuner(*arguments: object, environment: Mapping[str, str]) -> str:
    """Run a command and return what it printed; ends this program if it fails."""
    command = [sys.executable, "-m", "tuner", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command} ended with exit code {done.returncode}:\n{done.stderr}")
    return done.stdout


def search(url: str, root: Path, study: str, pruner: str, seed: int, options: argparse.Namespace) -> Found:
    environment = {"TUNER_STORAGE": url, "TUNER_DATA_DIR": str(root)}
    settings = [part for each in options.set for part in ("--set", each)]
    if options.epochs is not None:
        settings += ["--epochs", options.epochs]
    wanted = ["--study", study, "--trials", options.trials, "--pruner", pruner, "--seed", seed, *settings]
    tuner("create", options.objective, *wanted, environment=environment)
    tuner("worker", study, "--device", options.device, "--timeout", f"{options.seconds}s", environment=environment)
    exported = json.loads(tuner("export", study, "--device", options.device, "--json", environment=environment))
    storage = PostgresStorage(url)
    trials = optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False)
    storage.engine.dispose()
    sign = 1.0 if exported["direction"] == "maximize" else -1.0
    return Found(
        trials=Counter(trial.state.name for trial in trials),
        device_s=sum(trial.duration.total_seconds() for trial in trials if trial.duration is not None),
        best=sign * exported["value"],
        test=sign * exported["test"][exported["metric"]],
    )


def compared(differences: Sequence[float]) -> str:
    """Return their mean, its standard error and Wilcoxon's p."""
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    p = wilcoxon(differences).pvalue if any(differences) else 1.0
    n_better = sum(difference > 0 for difference in differences)
    return f"{statistics.mean(differences):+.5f} +- {error:.5f}, better in {n_better} of {len(differences)}, p {p:.3f}"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("objective", nargs="?", default="digits")
    parser.add_argument("--storage", default=os.environ.get("TUNER_STORAGE"))
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("TUNER_TEST_DATA"))
    parser.add_argument("--pruners", nargs="+", default=["median", "rungs"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=60, help="in which a worker claims trials")
    parser.add_argument("--trials", type=int, default=1_000_000, help="at most, in a study")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the objective")
    parser.add_argument("--rows", type=int, help="of Fashion-MNIST's images, to train and validate")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found: dict[str, list[Found]] = {pruner: [] for pruner in options.pruners}
    data_dir = None if options.data_dir is None else Path(options.data_dir)
    with database(options.storage) as url, data_directory(data_dir, options.rows) as (root, what):
        print_machine(url)
        print(f"{options.objective} {' '.join(options.set)}, {options.seconds} s each; images: {what}", flush=True)
        for seed in range(options.seeds):
            turn = seed % len(options.pruners)
            for pruner in options.pruners[turn:] + options.pruners[:turn]:
                its = search(url, root, f"live-{os.getpid()}-{seed}-{pruner}", pruner, seed, options)
                found[pruner].append(its)
                trials = ", ".join(f"{number} {state.lower()}" for state, number in sorted(its.trials.items()))
                print(
                    f"  seed {seed} {pruner:<10} {its.device_s:7.1f} s of trials: {trials};"
                    f" best {its.best:.5f}, test {its.test:.5f}",
                    flush=True,
                )
    first, *others = options.pruners
    ratios: dict[str, list[float]] = {}
    for pruner in others:
        pairs = list(zip(found[pruner], found[first], strict=True))
        print(f"  {pruner} against {first}, best: {compared([one.best - other.best for one, other in pairs])}")
        print(f"  {pruner} against {first}, test: {compared([one.test - other.test for one, other in pairs])}")
        ratios[f"{pruner} over {first}, test"] = [
            one.test / other.test if one.test > 0 else other.test / one.test for one, other in pairs
        ]
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
