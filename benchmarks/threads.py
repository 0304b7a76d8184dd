"""How many slots and threads a worker on a CPU has by itself, beside those that one would set by hand.

    python benchmarks/threads.py --repeats 3          # on a machine that does nothing else; --kinds cnn for a part

For each kind of model (`threads_objective.py`), on a quiet machine and beside `--busy` processes that compute without
an end, `tuner worker` runs a study with every setting by hand (1 slot or as many as cores, each with 1 thread or as
many as cores) and with none, one after the other, `--repeats` times in an order that turns. Its seconds are those from
the first trial's start to the last one's end: imports and data are the same for all. Each repeat gives a ratio of the
best setting by hand, by its median, to what the worker chose; above 1 the worker was faster. `before` is what a worker
did by itself once: one slot with all cores, whose threads spin while they wait for one another.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from measuring import argument_parser, database, paired, print_machine, write_ratios
from threads_objective import KINDS

import tuner
from storage import PostgresStorage
from tuner import cores

HERE = Path(__file__).parent
CHOSEN, BEFORE = "chosen", "before"


def settings() -> dict[str, tuple[list[str], dict[str, str]]]:
    """Return the options and variables of each setting by its name."""
    n_cores = cores.count()
    numbers = sorted({1, n_cores})
    by_hand = {
        f"{slots} x {threads}": (["--slots", f"cpu*{slots}", "--threads", f"{threads}"], {})
        for slots in numbers
        for threads in numbers
    }
    spinning = {"GOMP_SPINCOUNT": "300000"}  # libgomp's own number, which comes before OMP_WAIT_POLICY
    before = (["--slots", "cpu", "--threads", f"{n_cores}"], spinning)
    return {**by_hand, CHOSEN: (["--device", "cpu"], {}), BEFORE: before}


@contextmanager
def beside(n_processes: int) -> Iterator[None]:
    """Have processes that compute without an end, until the block ends."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_processes)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(url: str, study: str, kind: str, setting: str, options: argparse.Namespace) -> tuple[float, str]:
    """Run a study; return the seconds of its trials, and what threads and how many trials at once they had."""
    arguments, variables = settings()[setting]
    objective = f"{HERE / 'threads_objective.py'}:OfAKind"
    with tempfile.TemporaryDirectory() as directory:
        tuner.create_study(
            objective,
            name=study,
            trials=options.trials,
            epochs=options.epochs,
            options={"kind": kind, "part": options.part},
            sampler="random",
            pruner="none",
            storage=url,
            data_dir=directory,
        )
        unset = (*cores.VARIABLES, *cores.WAITING)
        environ = {name: value for name, value in os.environ.items() if name not in unset}
        environ |= {"TUNER_STORAGE": url, "TUNER_DATA_DIR": directory, **variables}
        command = [sys.executable, "-m", "tuner", "worker", study, "--objective", objective, "--no-preflight"]
        done = subprocess.run([*command, *arguments], env=environ, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{command} ended with exit code {done.returncode}:\n{done.stderr}")
    storage = PostgresStorage(url)
    trials = optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False)
    storage.engine.dispose()
    spans = [(trial.datetime_start, trial.datetime_complete) for trial in trials]
    at_once = max(sum(start <= other < end for start, end in spans) for other, _ in spans)  # type: ignore[operator]
    had = Counter(trial.user_attrs["threads"] for trial in trials)
    seconds = (max(end for _, end in spans) - min(start for start, _ in spans)).total_seconds()  # type: ignore[type-var]
    return seconds, f"{at_once} at once, threads {dict(had)}"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--storage", default=os.environ.get("TUNER_STORAGE"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--part", type=float, default=1.0, help="of the rows")
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--smallest", action="store_true", help="see that it runs, and no more")
    options = parser.parse_args()
    if options.smallest:
        options.kinds, options.trials, options.epochs, options.part = ["mlp-32"], 2, 1, 0.0
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ratios: dict[str, list[float]] = {}
    with database(options.storage) as url:
        print_machine(url)
        print(f"{options.trials} trials x {options.epochs} epochs; load {os.getloadavg()[0]:.1f} before", flush=True)
        for kind in options.kinds:
            for n_busy in (0,) if options.smallest else sorted({0, options.busy}):
                with beside(n_busy):
                    where = f"beside {n_busy} busy processes" if n_busy else "quiet"
                    ratios[f"{kind}, {where}, best by hand over chosen"] = compare(url, kind, n_busy, options, where)
    write_ratios(options.ratios, ratios)


def compare(url: str, kind: str, n_busy: int, options: argparse.Namespace, where: str) -> list[float]:
    """Measure all settings with one kind of model, and print them; returns the ratios, one a repeat."""
    names = [CHOSEN, "1 x 1"] if options.smallest else list(settings())
    found: dict[str, list[float]] = {name: [] for name in names}
    told: dict[str, str] = {}
    for repeat in range(options.repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            study = f"threads-{os.getpid()}-{kind}-{n_busy}-{name}-{repeat}"
            seconds, told[name] = run(url, study, kind, name, options)
            found[name].append(seconds)
    for name, its in found.items():
        shown = f"{statistics.median(its):8.2f} s ({min(its):.2f} .. {max(its):.2f})"
        print(f"  {kind:<8} {where:<24} {name:<8}{shown}   {told[name]}", flush=True)
    by_hand = [name for name in names if name not in (CHOSEN, BEFORE)]
    best = min(by_hand, key=lambda name: statistics.median(found[name]))
    ratios = paired(found[best], found[CHOSEN])
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
    print(f"  {kind:<8} {where:<24} ratio: best by hand, {best}, to chosen {spread}", flush=True)
    return ratios


if __name__ == "__main__":
    main()
