"""What many workers get done at once on one PostgreSQL: Optuna's RDBStorage and ours, side by side.

    python benchmarks/worker_load.py [--storage URL] [--workers 8 32 64] [--seconds 10] [--rounds 3] [--history 10000]

Each worker is a process that runs trials which train nothing: claim (stock: ask), 20 times report and should_prune with
the median pruner, whose answer is not followed, and tell. All have connected and run a trial before they start
together, in a study that has finished trials already; what they do after `--seconds` does not count. The sides take
turns, each in a study of its own. Prints trials a second - reports over 20, so that begun trials count - as median,
minimum and maximum of the rounds; the percentiles of all calls in milliseconds; and errors, after each of which a
worker goes on with its next trial. Without --storage, starts an embedded PostgreSQL for the time of the run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import threading
import time
import warnings
from collections import defaultdict
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

import optuna
from filling import fill
from measuring import Ratios, Times, argument_parser, database, print_machine, timed, write_ratios
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.samplers import RandomSampler
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from workers import SIDES, Side

from storage import PostgresStorage, StorageError, open_engine
from storage.coordination import studies

N_REPORTS = 20
ERRORS = (StorageError, StorageInternalError, SQLAlchemyError, UpdateFinishedTrialError)
CALLS = ("claim", "report", "should_prune", "tell")
Outcome = tuple[Times, list[str]]  # the times of each call in milliseconds, and errors


def run_trial(side: Side, times: Times, until: float) -> None:
    """Run a trial; past `until`, a moment of time.monotonic, it is left as it is."""
    with timed(times, "claim"):
        trial = side.claim()
    for step in range(N_REPORTS):
        if time.monotonic() > until:
            return
        with timed(times, "report"):
            trial.report(random.random(), step)
        with timed(times, "should_prune"):
            trial.should_prune()
    with timed(times, "tell"):
        side.tell(trial, random.random())


def work(side_name: str, url: str, study: str, seconds: float, start: Barrier, results: Queue[Outcome]) -> None:
    """Be a worker: warm up, wait for the others, run trials for some seconds."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    warnings.filterwarnings("ignore", message="Heartbeat of storage")  # of asking without optimize, as tuner does
    times: Times = defaultdict(list)
    errors: list[str] = []
    side: Side | None = None

    def run_one(until: float) -> None:
        nonlocal side
        try:
            side = side or SIDES[side_name](url, study, RandomSampler())
            run_trial(side, times, until)
        except ERRORS as error:
            errors.append(" ".join(str(error).split()))
            threading.Event().wait(0.1)

    run_one(time.monotonic() + 600)
    times.clear()
    start.wait()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        run_one(until)
    results.put((dict(times), errors))


def run_workers(side: str, url: str, study: str, n_workers: int, seconds: float) -> Outcome:
    """Return the calls and errors of all workers together."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["worker_load"])
    start, results = context.Barrier(n_workers), context.Queue()
    workers = [context.Process(target=work, args=(side, url, study, seconds, start, results)) for _ in range(n_workers)]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    times = {call: [ms for each, _ in found for ms in each.get(call, [])] for call in CALLS}
    return times, [error for _, errors in found for error in errors]


def a_study(engine: Engine, name: str, history: int) -> str:
    found = studies.create_study(engine, name, "minimize", {"version": 1}, {}, "value")
    fill(engine, found.study_id, history)
    return name


def measure(engine: Engine, url: str, n_workers: int, options: argparse.Namespace) -> Ratios:
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    pooled: dict[str, Times] = {side: defaultdict(list) for side in SIDES}
    errors: dict[str, list[str]] = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side in SIDES:
            study = a_study(engine, f"load-{os.getpid()}-{n_workers}-{number}-{side}", options.history)
            times, its_errors = run_workers(side, url, study, n_workers, options.seconds)
            rates[side].append(len(times["report"]) / N_REPORTS / options.seconds)
            for call, its_times in times.items():
                pooled[side][call] += its_times
            errors[side] += its_errors
            optuna.delete_study(study_name=study, storage=PostgresStorage(url))
    for side in SIDES:
        shown = f"{n_workers:>7} {side:<6}{spread(rates[side], 2)}"
        shown += "".join(f"{shown_percentiles(pooled[side][call]):>20}" for call in CALLS)
        print(f"{shown}{len(errors[side]):>8}", flush=True)
    ratios = [ours / stock for stock, ours in zip(rates["stock"], rates["ours"], strict=True) if stock]
    print(f"{n_workers:>7} ratio {spread(ratios, 1) if ratios else '-'}", flush=True)
    for side, its_errors in errors.items():
        for error in sorted(set(its_errors))[:3]:
            print(f"        {side}: {error[:200]}", flush=True)
    return {f"trials a second, {n_workers} workers": ratios} if ratios else {}


def spread(values: list[float], digits: int) -> str:
    return "".join(f"{value:9.{digits}f}" for value in (statistics.median(values), min(values), max(values)))


def shown_percentiles(values: list[float]) -> str:
    if len(values) < 2:
        return "-"
    hundredths = statistics.quantiles(values, n=100, method="inclusive")
    return f"{hundredths[49]:.2f} / {hundredths[98]:.2f}"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--storage", default=os.environ.get("TUNER_STORAGE"))
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--history", type=int, default=10_000, help="finished trials that a study starts with")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ratios: Ratios = {}
    with database(options.storage) as url:
        engine = open_engine(url)
        print_machine(url)
        heads = "".join(f"{call + ' p50 / p99':>20}" for call in CALLS)
        print(f"{'workers':>7} {'':<6}{'trials/s':>9}{'min':>9}{'max':>9}{heads}{'errors':>8}")
        for n_workers in options.workers:
            ratios |= measure(engine, url, n_workers, options)
        engine.dispose()
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
