"""What a worker's calls cost on studies of different sizes: Optuna's RDBStorage and ours, side by side.

    python benchmarks/storage_scale.py [--storage URL] [--sizes 1000 10000 50000] [--repeats 20] [--firsts 3]

Fills each study by bulk SQL with finished trials of 5 params and up to 20 steps, and then times, in turns, a worker of
each side that has run a trial before: claim (stock: ask), 5 suggests by the random sampler, 20 times report and
should_prune with the median pruner, tell. With them runs a worker of ours whose reports leave out what else is kept of
an epoch, which tells what the curves cost. Apart from these: what a new worker takes from nothing to its first trial,
the first reading of the study by a new storage object, and what a TPE sampler's suggest takes, which grows with the
study by itself, and what a decision by `rungs` takes at a rung, for which the pruner reads all trials of stock's
storage, and an index of ours. Prints median, minimum and maximum in milliseconds, and stock's median over ours.
Without --storage, starts an embedded PostgreSQL for the time of the run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import warnings
from collections import defaultdict

import optuna
from filling import N_PARAMS, N_STEPS, fill
from measuring import (
    Ratios,
    Times,
    argument_parser,
    database,
    print_machine,
    print_sides,
    ratios_of_sides,
    timed,
    write_ratios,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from workers import SIDES, Side, WithoutCurves

from storage import PostgresStorage, open_engine
from storage.coordination import studies
from storage.optuna_storage.rule_pruning import IndexedRulePruner, RulePruner
from storage.optuna_storage.rules import Rungs

KEEPING = ("report", "report + should_prune", "claim", "tell")
"""What is looked at for what the curves cost."""


def run_trial(side: Side, times: Times) -> None:
    """Run one trial to its end."""
    with timed(times, "claim"):
        trial = side.claim()
    with timed(times, f"{N_PARAMS} suggests"):
        for number in range(1, N_PARAMS + 1):
            trial.suggest_float(f"x{number}", 0, 1)
    for step in range(N_STEPS):
        with timed(times, "report"):
            side.report(trial, 0.5, step)
        with timed(times, "should_prune"):
            trial.should_prune()
    with timed(times, "tell"):
        side.tell(trial, 0.5)


def add_sums(times: Times) -> None:
    """Add what a report and a decision take together, and a trial without its decisions."""
    reports, decisions = times["report"], times["should_prune"]
    times["report + should_prune"] = [sum(pair) for pair in zip(reports, decisions, strict=True)]
    all_reports = [sum(reports[start : start + N_STEPS]) for start in range(0, len(reports), N_STEPS)]
    others = zip(times["claim"], times[f"{N_PARAMS} suggests"], all_reports, times["tell"], strict=True)
    times[f"claim, suggests, {N_STEPS} reports, tell"] = [sum(parts) for parts in others]


def measure_first(url: str, name: str, times: dict[str, Times]) -> None:
    """Time a new worker of each side up to its first trial, and its first reading of all trials."""
    for side_name, make in SIDES.items():
        with timed(times[side_name], "new worker's first claim"):
            side = make(url, name, RandomSampler())
            trial = side.claim()
        side.tell(trial, 0.5)
        side.close()
        side = make(url, name, RandomSampler())
        with timed(times[side_name], "first read of all trials"):
            side.study.get_trials(deepcopy=False)
        side.close()


def measure_sampler(url: str, name: str, sampler: BaseSampler, repeats: int, times: dict[str, Times]) -> None:
    """Time the first suggest of a trial, for which a sampler reads the finished trials."""
    sides = {side_name: make(url, name, sampler) for side_name, make in SIDES.items()}
    for turn in range(repeats + 1):
        for side_name, side in sides.items():
            trial = side.claim()
            with timed(times[side_name] if turn else defaultdict(list), "TPE's first suggest"):
                trial.suggest_float("x1", 0, 1)
            side.tell(trial, 0.5)
    for side in sides.values():
        side.close()


def measure_rungs(url: str, name: str, repeats: int, times: dict[str, Times]) -> None:
    """Time the decision on a trial that has come to a rung, with another trial finished since the last one."""
    sides = {side_name: make(url, name, RandomSampler()) for side_name, make in SIDES.items()}
    rule, at = Rungs((1, N_STEPS // 4 - 1)), N_STEPS // 4
    ours = sides["ours"].study
    assert isinstance(ours._storage, PostgresStorage)
    pruners = {"stock": RulePruner(rule), "ours": IndexedRulePruner(ours._storage, ours._study_id, rule)}
    for turn in range(repeats + 1):
        for side_name, side in sides.items():
            trial = side.claim()
            for step in range(1, at + 1):
                side.report(trial, 0.5, step)
            frozen = side.study._storage.get_trial(trial._trial_id)
            with timed(times[side_name] if turn else defaultdict(list), "decision at a rung"):
                pruners[side_name].prune(side.study, frozen)
            side.tell(trial, 0.5)
    for side in sides.values():
        side.close()


def print_curves(ours: Times, without: Times) -> None:
    """Print what keeping the curves adds to a report, a claim and a trial's end."""
    added = {what: statistics.median(ours[what]) / statistics.median(without[what]) - 1 for what in KEEPING}
    print("  curves add to " + ", ".join(f"{what}: {share:+.1%}" for what, share in added.items()), flush=True)


def measure(url: str, n_trials: int, options: argparse.Namespace) -> Ratios:
    name = f"scale-{n_trials}-{os.getpid()}"
    times: dict[str, Times] = {side: defaultdict(list) for side in SIDES}
    engine = open_engine(url)
    study = studies.create_study(engine, name, "minimize", {"version": 1}, {}, "value")
    fill(engine, study.study_id, n_trials)
    for _ in range(options.firsts):
        measure_first(url, name, times)
    sides = {side_name: make(url, name, RandomSampler()) for side_name, make in SIDES.items()}
    sides["ours without curves"] = WithoutCurves(url, name, RandomSampler())
    times["ours without curves"] = defaultdict(list)
    for side in sides.values():
        run_trial(side, defaultdict(list))
    for _ in range(options.repeats):
        for side_name, side in sides.items():
            run_trial(side, times[side_name])
    for side_name, side in sides.items():
        add_sums(times[side_name])
        side.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        measure_sampler(url, name, TPESampler(seed=0, multivariate=False), options.firsts, times)
    measure_rungs(url, name, options.firsts, times)
    print_sides(f"{n_trials} finished trials, ms", times["stock"], times["ours"])
    print_curves(times["ours"], times["ours without curves"])
    optuna.delete_study(study_name=name, storage=SIDES["ours"](url, name, RandomSampler()).study._storage)
    engine.dispose()
    return ratios_of_sides(times["stock"], times["ours"], options.repeats, f"{n_trials} trials")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--storage", default=os.environ.get("TUNER_STORAGE"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--firsts", type=int, default=3, help="how often a new worker joins")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ratios: Ratios = {}
    with database(options.storage) as url:
        print_machine(url)
        for n_trials in options.sizes:
            ratios |= measure(url, n_trials, options)
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
