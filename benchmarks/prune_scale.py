"""What a report and the question whether to prune cost in studies of many finished trials.

    python benchmarks/prune_scale.py [--sizes 1000 10000 50000] [--steps 20] [--trials 5]

Fills one study a size by SQL, with trials without params on a PostgreSQL of its own, and then runs trials in it that
report a random value and ask at each step: in turn one with Optuna's MedianPruner and one with ours, both through
Optuna's storage as `optuna.storages.get_storage` opens it. Each trial ends COMPLETE, so that both sides have to keep
up. Prints milliseconds: the median of all calls, and between which the middle 80 % of them lie.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import optuna
from sqlalchemy import Engine, text

from storage import EmbeddedServer, ensure_schema, open_engine
from storage.pruning import IndexedPercentilePruner

FILL = (
    """INSERT INTO trials (study_id, number, state, datetime_start, datetime_complete)
        SELECT :study_id, number, 'COMPLETE', now(), now() FROM generate_series(0, :size - 1) AS number""",
    """INSERT INTO trial_values (trial_id, objective, value, value_type)
        SELECT trial_id, 0, random(), 'FINITE' FROM trials WHERE study_id = :study_id""",
    """INSERT INTO trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
        SELECT trial_id, step, random(), 'FINITE'
        FROM trials, generate_series(0, :steps - 1) AS step WHERE study_id = :study_id""",
)


class Timings(list[float]):
    """Milliseconds of each call."""

    def call(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        self.append((time.perf_counter() - start) * 1e3)
        return self[-1]

    def __str__(self) -> str:
        tenths = statistics.quantiles(self, n=10)
        return f"{statistics.median(self):9.2f} ({tenths[0]:6.2f} .. {tenths[-1]:6.2f})"


class Side:
    """A study with one of the pruners, and the timings of its trials."""

    def __init__(self, name: str, study: optuna.Study) -> None:
        self.name, self.study = name, study
        self.first_ms = 0.0
        self.report, self.should_prune, self.both = Timings(), Timings(), Timings()

    def run_trial(self, steps: int) -> None:
        trial = self.study.ask()
        for step in range(steps):
            value = random.random()
            report_ms = self.report.call(lambda: trial.report(value, step))  # noqa: B023 - called at once
            self.both.append(report_ms + self.should_prune.call(trial.should_prune))
        self.study.tell(trial, random.random())

    def warm_up(self, steps: int) -> None:
        """Run two trials, and keep of their timings that of the first decision, which reads the history."""
        self.run_trial(steps)
        self.first_ms = self.should_prune[0]
        self.run_trial(steps)
        for timings in (self.report, self.should_prune, self.both):
            timings.clear()


def fill(engine: Engine, study_id: int, size: int, steps: int) -> None:
    with engine.begin() as conn:
        conn.execute(text("SET LOCAL statement_timeout = 0"))
        for statement in FILL:
            conn.execute(text(statement), {"study_id": study_id, "size": size, "steps": steps})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(text("VACUUM ANALYZE"))


def measure(engine: Engine, size: int, steps: int, trials: int) -> tuple[Side, Side]:
    storage = optuna.storages.get_storage(engine.url.render_as_string(hide_password=False))
    name = f"{size} trials"
    stock = optuna.create_study(study_name=name, storage=storage, pruner=optuna.pruners.MedianPruner())
    fill(engine, stock._study_id, size, steps)
    ours = IndexedPercentilePruner(engine, stock._study_id, 50.0)
    sides = (
        Side("stock", stock),
        Side("indexed", optuna.load_study(study_name=name, storage=storage, pruner=ours)),
    )
    for side in sides:
        side.warm_up(steps)
    for _ in range(trials):
        for side in sides:
            side.run_trial(steps)
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 50_000])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trials", type=int, default=5)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as directory:
        server = EmbeddedServer(Path(directory) / "data")
        try:
            server.start()
            engine = open_engine(server.url())
            ensure_schema(engine)
            with engine.connect() as conn:
                version = conn.scalar(text("SHOW server_version"))
            machine = platform.processor() or platform.machine()
            print(f"{machine}, {os.cpu_count()} cores, Python {platform.python_version()}, PostgreSQL {version}")
            print(f"{'trials':>7} {'':<8}{'report':>27}{'should_prune':>27}{'both':>27}{'first decision':>16}")
            for size in options.sizes:
                stock, indexed = measure(engine, size, options.steps, options.trials)
                for side in (stock, indexed):
                    calls = f"{side.report}{side.should_prune}{side.both}"
                    print(f"{size:>7} {side.name:<8}{calls}{side.first_ms:16.2f}")
                ratios = [
                    statistics.median(of_stock) / statistics.median(of_ours)
                    for of_stock, of_ours in ((stock.should_prune, indexed.should_prune), (stock.both, indexed.both))
                ]
                print(f"{size:>7} ratio: should_prune {ratios[0]:.1f} x, both {ratios[1]:.1f} x", flush=True)
            engine.dispose()
        finally:
            server.destroy()


if __name__ == "__main__":
    main()
