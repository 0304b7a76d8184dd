"""How long the main job takes as a user runs it, and how good its model is.

    python benchmarks/main_job.py [--runs 5] [--trials 30] [--epochs 20]

Each run is `tuner run digits` in a data directory of its own, with another seed: starting PostgreSQL for the first
time, the search, retraining and export. Prints seconds and test accuracy: minimum, median and maximum.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from storage import EmbeddedServer


def run_once(seed: int, trials: int, epochs: int) -> tuple[float, float]:
    """Return the seconds and the test accuracy of one main job."""
    with tempfile.TemporaryDirectory() as directory:
        data_dir = Path(directory) / "data"
        arguments = ["--trials", trials, "--epochs", epochs, "--seed", seed, "--data-dir", data_dir, "--json"]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "tuner", "run", "digits", *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=True,
            )
        finally:
            EmbeddedServer(data_dir).destroy()
        return time.perf_counter() - start, json.loads(done.stdout)["test"]["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    results = [run_once(seed, options.trials, options.epochs) for seed in range(options.runs)]
    print(f"tuner run digits, {options.trials} trials, {options.epochs} epochs, {options.runs} runs: min, median, max")
    for name, values in zip(("seconds", "test accuracy"), zip(*results, strict=True), strict=True):
        print(f"  {name:<14}{min(values):8.3f}{statistics.median(values):8.3f}{max(values):8.3f}")


if __name__ == "__main__":
    main()
