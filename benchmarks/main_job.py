"""How long the main job takes as a user runs it, and how good its model is.

    python benchmarks/main_job.py [--runs 5] [--trials 30] [--epochs 20] [--against DIRECTORY]

Each run is `tuner run digits` in a data directory of its own, with another seed: starting PostgreSQL for the first
time, the search, retraining and export. Prints the minimum, median and maximum of each: the seconds until the first
trial, from then until the last one ended, and from then to the end, which add up to `seconds`; and the test accuracy.
Beside each run, a process imports what any such program would: `imports`. With --against, another checkout of the
project, each run has one of that beside it, and the ratios of the two are printed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from measuring import argument_parser, paired, write_ratios

from storage import EmbeddedServer

HERE = Path(__file__).parents[1]
PHASES = ("seconds", "first trial", "search", "export")


def run_once(checkout: Path, seed: int, trials: int, epochs: int) -> dict[str, float]:
    """Return the figures of one main job, by their names."""
    with tempfile.TemporaryDirectory() as directory:
        data_dir = Path(directory) / "data"
        arguments = ["--trials", trials, "--epochs", epochs, "--seed", seed, "--data-dir", data_dir, "--json"]
        start = time.time()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "tuner", "run", "digits", *map(str, arguments), "--log-format", "json"],
                capture_output=True,
                check=True,
                cwd=directory,
                env={**os.environ, "PYTHONPATH": str(checkout)},
            )
        finally:
            EmbeddedServer(data_dir).destroy()
        end = time.time()
    at: dict[str, list[float]] = {}
    for event in map(json.loads, done.stderr.splitlines()):
        at.setdefault(event["event"], []).append(datetime.fromisoformat(event["time"]).timestamp())
    first, last = at["trial_started"][0], at["trial_ended"][-1]
    return {
        "seconds": end - start,
        "first trial": first - start,
        "search": last - first,
        "export": end - last,
        "test accuracy": json.loads(done.stdout)["test"]["accuracy"],
    }


def imports_s() -> float:
    """Return the seconds of a process that imports what the digits are read, trained and measured with."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import sklearn.datasets, torch, torchmetrics"], check=True)
    return time.perf_counter() - start


def show(name: str, values: list[float]) -> None:
    print(f"  {name:<20}{min(values):8.3f}{statistics.median(values):8.3f}{max(values):8.3f}")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--against", type=Path, metavar="DIRECTORY", help="another checkout, run in turn with this one")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    sides = {"here": HERE} | ({} if options.against is None else {"there": options.against.resolve()})
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    imports: list[float] = []
    for seed in range(options.runs):
        imports.append(imports_s())
        for side, checkout in sides.items():
            found[side].append(run_once(checkout, seed, options.trials, options.epochs))
    print(f"tuner run digits, {options.trials} trials, {options.epochs} epochs, {options.runs} runs: min, median, max")
    show("imports", imports)
    for side, results in found.items():
        for name in results[0]:
            show(name if side == "here" else f"{name}, {side}", [result[name] for result in results])
    for name in found["here"][0] if options.against is not None else ():
        pairs = zip(found["here"], found["there"], strict=True)
        show(f"{name}, ratio", [ours[name] / theirs[name] for ours, theirs in pairs])
    ratios = {f"bare imports over {name}": paired(imports, [run[name] for run in found["here"]]) for name in PHASES}
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
