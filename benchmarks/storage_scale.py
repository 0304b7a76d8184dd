"""What a worker's calls cost on studies of different sizes: Optuna's RDBStorage and ours, side by side.

    python benchmarks/storage_scale.py [--storage URL] [--sizes 1000 10000 50000] [--repeats 20] [--firsts 3]

Fills each study by bulk SQL with finished trials of 5 params and up to 20 steps, and then times, in turns, a storage
object that has read the study before: ask, report, should_prune with the median pruner, 5 suggests by the random
sampler, tell. The first reading by a new storage object is timed apart. Prints median, minimum and maximum in
milliseconds, and stock's median over ours. Without --storage, starts an embedded PostgreSQL for the time of the run.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections import defaultdict
from collections.abc import Callable

import optuna
from filling import N_PARAMS, fill
from measuring import Times, database, print_machine, print_sides, stock, timed
from optuna.storages import BaseStorage

from storage import PostgresStorage, open_engine


def run_trial(study: optuna.Study, times: Times) -> None:
    """Run one trial of one report, as study.ask and study.tell do."""
    with timed(times, "ask"):
        trial = study.ask()
    with timed(times, f"{N_PARAMS} suggests"):
        for number in range(1, N_PARAMS + 1):
            trial.suggest_float(f"x{number}", 0, 1)
    for step in range(6, 9):
        with timed(times, "report"):
            trial.report(0.5, step)
        with timed(times, "should_prune"):
            trial.should_prune()
    with timed(times, "tell"):
        study.tell(trial, 0.5)


def first_read(make: Callable[[], BaseStorage], study_id: int, times: Times, *, whole: bool) -> None:
    storage = make()
    name = "first read, values of steps too" if whole else "first read"
    with timed(times, name):
        trials = storage.get_all_trials(study_id, deepcopy=False)
        if whole:
            assert trials[0].intermediate_values
    assert trials


def measure(url: str, n_trials: int, repeats: int, firsts: int) -> None:
    name = f"scale-{n_trials}-{os.getpid()}"
    sides: dict[str, Callable[[], BaseStorage]] = {"stock": lambda: stock(url), "ours": lambda: PostgresStorage(url)}
    measured: dict[str, Times] = {side: defaultdict(list) for side in sides}
    engine = open_engine(url)
    study = optuna.create_study(storage=PostgresStorage(url), study_name=name)
    fill(engine, study._study_id, n_trials)
    for _ in range(firsts):
        for side, make in sides.items():
            for whole in (False, True):
                first_read(make, study._study_id, measured[side], whole=whole)
    studies = {
        side: optuna.load_study(
            study_name=name,
            storage=make(),
            sampler=optuna.samplers.RandomSampler(),
            pruner=optuna.pruners.MedianPruner(),
        )
        for side, make in sides.items()
    }
    for warm in studies.values():
        run_trial(warm, defaultdict(list))
    for _ in range(repeats):
        for side, optuna_study in studies.items():
            run_trial(optuna_study, measured[side])
    print_sides(f"{n_trials} finished trials, ms", measured["stock"], measured["ours"])
    optuna.delete_study(study_name=name, storage=PostgresStorage(url))
    engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", default=os.environ.get("TUNER_STORAGE"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--firsts", type=int, default=3, help="how often a new storage object reads the study")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", message="Heartbeat of storage")  # of asking without optimize, as tuner does
    with database(options.storage) as url:
        print_machine(url)
        for n_trials in options.sizes:
            measure(url, n_trials, options.repeats, options.firsts)


if __name__ == "__main__":
    main()
