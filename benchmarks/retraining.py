"""How good the retrained model is: by the schedule of the study's epochs, and by one squeezed into the best epoch.

    python benchmarks/retraining.py --data-dir DIRECTORY [--seeds 5] [--trials 3] [--epochs 10] [--rows 4000]

For each data set and seed a small search - random params, each trained for all epochs - gives a best trial and its
best epoch. That is retrained on train and valid both ways, from the same seed, and evaluated on test: `squeezed`, the
schedule of as many epochs as the best one is, as tuner did before; `planned`, the study's schedule, ended after the
best epoch, as it does now. `gain` is what the latter wins for each seed, in the metric's own direction: its mean, its
standard error, and how many seeds won, lost or tied. At most `--rows` rows of train and of valid are taken.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
from pathlib import Path

import optuna
import torch
from measuring import Ratios, argument_parser, paired, write_ratios
from optuna.samplers import RandomSampler

from tuner import training
from tuner.data import Data, Rows, Split, join
from tuner.objective import Objective
from tuner.seeds import derive_seed, seed_everything
from tuner.slot.attempt import load_data
from tuner.study.registry import build_objective, find_objective, is_objective_class

DATA_SETS = ("digits", "california_housing", "fashion_mnist", "covertype")


def trained(
    objective: Objective, data: Data, params: dict[str, object], train: Rows, valid: Rows | None, seed: int, **how: int
) -> tuple[torch.nn.Module, list[training.Epoch]]:
    """Return a model trained for `epochs`, or `until` an earlier one of them, and its epochs."""
    seed_everything(seed)
    model = objective.build_model(params)
    history = objective.fit(
        model,
        train,
        valid,
        params,
        metrics=objective.build_metrics(data),
        epochs=how["epochs"],
        seed=seed,
        run=training.Run(until=how.get("until")),
    )
    return model, history


def searched(objective: Objective, data: Data, trials: int, epochs: int, seed: int) -> tuple[dict[str, object], int]:
    """Return the params and the best epoch of the best of some trials."""
    study = optuna.create_study(direction=objective.direction, sampler=RandomSampler(seed))
    for number in range(trials):
        trial = study.ask()
        objective.suggest(trial)
        seed_of_trial = derive_seed(seed, "trial", number)
        _, history = trained(objective, data, trial.params, data.train, data.valid, seed_of_trial, epochs=epochs)
        best = training.best_epoch(history, objective.metric, objective.direction)
        trial.set_user_attr("epoch", best.number)
        study.tell(trial, best.metrics[objective.metric])
    return study.best_params, study.best_trial.user_attrs["epoch"]


def both_ways(objective: Objective, data: Data, trials: int, epochs: int, seed: int) -> tuple[int, float, float]:
    """Return the best epoch, and the test metric of the model that is retrained squeezed and planned."""
    params, best = searched(objective, data, trials, epochs, seed)
    scores = []
    for how in ({"epochs": best}, {"epochs": epochs, "until": best}):
        rows = join(data.train, data.valid)
        model, _ = trained(objective, data, params, rows, None, derive_seed(seed, "export", 0), **how)
        metrics = objective.build_metrics(data)
        scores.append(training.evaluate(model, data.test, metrics, objective.prediction)[objective.metric])
    return best, scores[0], scores[1]


def loaded(name: str, directory: Path, rows: int, seed: int) -> tuple[Objective, Data]:
    """Return an objective, and the first rows of its data."""
    kind = find_objective(name).load()
    assert is_objective_class(kind)
    objective = build_objective(kind, {}, seed)
    data = load_data(objective, directory)
    assert isinstance(data.train, Split)
    some = slice(0, rows)
    return objective, Data(data.train.rows(some), data.valid.rows(some), data.test, data.class_names)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="where the data sets are, or are downloaded to")
    parser.add_argument("--data-sets", nargs="+", default=DATA_SETS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rows", type=int, default=4000)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    cores = os.cpu_count()
    print(f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"{options.seeds} seeds, {options.trials} trials of {options.epochs} epochs, {options.rows} rows at most\n")
    heads = f"{'data set':<20}{'metric':<10}{'best epochs':<16}{'squeezed':>10}{'planned':>10}{'gain':>10}"
    print(f"  {heads}   won/lost/tied")
    ratios: Ratios = {}
    for name in options.data_sets:
        results = []
        for seed in range(options.seeds):
            objective, data = loaded(name, options.data_dir, options.rows, seed)
            results.append(both_ways(objective, data, options.trials, options.epochs, seed))
        sign = 1 if objective.direction == "maximize" else -1
        gains = [sign * (planned - squeezed) for _, squeezed, planned in results]
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
        epochs = ",".join(str(best) for best, _, _ in results)
        means = [statistics.mean(column) for column in list(zip(*results, strict=True))[1:]]
        counts = [sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains), gains.count(0)]
        print(
            f"  {name:<20}{objective.metric:<10}{epochs:<16}{means[0]:>10.4f}{means[1]:>10.4f}"
            f"{statistics.mean(gains):>+10.4f} +- {error:.4f}   {'/'.join(map(str, counts))}",
            flush=True,
        )
        planned, squeezed = ([result[index] for result in results] for index in (2, 1))
        better = (planned, squeezed) if objective.direction == "maximize" else (squeezed, planned)
        ratios[f"planned over squeezed, {name}"] = paired(*better)
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
