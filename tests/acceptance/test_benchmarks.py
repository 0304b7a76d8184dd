"""Each benchmark at its smallest size: it runs and prints its figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_main_job_prints_seconds_and_accuracy() -> None:
    arguments = ["--runs", "1", "--trials", "2", "--epochs", "1"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "main_job.py", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"seconds +\d+\.\d+ +\d+\.\d+ +\d+\.\d+", done.stdout)
    assert re.search(r"test accuracy +0\.\d+", done.stdout)


def test_storage_scale_prints_both_sides_and_their_ratio(database: str) -> None:
    arguments = ["--storage", database, "--sizes", "30", "--repeats", "2", "--firsts", "1"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "storage_scale.py", *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    for what in ("first read", "report", "should_prune", "tell"):
        assert re.search(rf"{what}( +\d+\.\d+){{7}}", done.stdout), what


def test_prune_scale_prints_both_sides_and_their_ratio() -> None:
    arguments = ["--sizes", "50", "--steps", "3", "--trials", "1"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "prune_scale.py", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for side in ("stock", "indexed"):
        assert re.search(rf" 50 {side} +(\d+\.\d+ \( *\d+\.\d+ \.\. +\d+\.\d+\) +){{3}}\d+\.\d+", done.stdout)
    assert re.search(r"ratio: should_prune \d+\.\d x, both \d+\.\d x", done.stdout)


def test_training_speed_prints_three_sides_and_their_ratios() -> None:
    arguments = ["--rows", "64", "--repeats", "1", "--batch-sizes", "32", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "training_speed.py", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for side in ("plain", "ours", "bare"):
        assert re.search(rf"batch +32 {side} +\d+\.\d+ s \(", done.stdout)
    assert re.search(r"ratio: ours \d+\.\d+ \(.*\) x plain, \d+\.\d+ \(.*\) of the bare step", done.stdout)
    assert re.search(r"an epoch of an empty model with report and pruning: \d+\.\d+ ms", done.stdout)
