"""Each benchmark at its smallest size: it runs and prints its figures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_main_job_prints_its_phases_and_accuracy_beside_another_checkouts() -> None:
    arguments = ["--runs", "1", "--trials", "2", "--epochs", "1", "--against", BENCHMARKS.parent]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "main_job.py", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = {name: float(value) for name, value in re.findall(r"^  (\D+?) +(\d+\.\d+)", done.stdout, re.M)}
    phases = [found[name] for name in ("first trial", "search", "export")]
    assert min(phases) > 0
    assert sum(phases) == pytest.approx(found["seconds"], abs=0.01)
    assert 0 < found["test accuracy, there"] <= 1
    assert found["seconds, ratio"] == pytest.approx(found["seconds"] / found["seconds, there"], abs=0.01)


def test_storage_scale_prints_both_sides_and_their_ratio(database: str) -> None:
    arguments = ["--storage", database, "--sizes", "30", "--repeats", "2", "--firsts", "1"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "storage_scale.py", *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    for what in ("first claim", "first read of all trials", "report", "should_prune", "tell", "TPE's first suggest"):
        assert re.search(rf"{what}( +\d+\.\d+){{7}}", done.stdout), what
    assert re.search(r"curves add to report: [+-]\d+\.\d%, .*tell: [+-]\d+\.\d%\n", done.stdout)


def test_reading_prints_both_sides_and_their_ratio(database: str) -> None:
    arguments = ["--storage", database, "--sizes", "30", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "reading.py", *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    for what in ("tuner best", "tuner status", "tuner studies", "page, first", "page, again", "first read by a worker"):
        assert re.search(rf"{what}( +\d+\.\d+){{7}}", done.stdout), what
    assert re.search(r"its memory, MB( +\d+\.\d+){6}", done.stdout)  # too little, at this size, for a ratio


def test_worker_load_prints_both_sides_and_their_ratio(database: str) -> None:
    arguments = ["--storage", database, "--workers", "2", "--seconds", "0.5", "--rounds", "1", "--history", "10"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "worker_load.py", *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    for side in ("stock", "ours"):
        assert re.search(rf" 2 {side}( +\d+\.\d+){{3}}( +(\d+\.\d+ / \d+\.\d+|-)){{4}} +0\n", done.stdout), done.stdout
    assert re.search(r" 2 ratio( +\d+\.\d+){3}", done.stdout)


def test_report_load_prints_percentiles_connections_and_errors(database: str) -> None:
    arguments = ["--storage", database, "--workers", "2", "--history", "10", "--seconds", "2", "--every", "0.1"]
    arguments += ["--reports", "3", "--watch", "0.5"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "report_load.py", *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "  2 of 2 workers ready after" in done.stdout
    for call in ("report", "should_prune", "claim", "params", "tell", "watch"):
        assert re.search(rf"{call}( +\d+\.\d+){{3}} +\d+\n", done.stdout), done.stdout
    assert re.search(r"connections +[2-8] at most\n", done.stdout), done.stdout
    assert re.search(r"waits +0\n +gave up +0, never got in 0\n", done.stdout), done.stdout


def test_training_speed_prints_three_sides_and_their_ratios(database: str) -> None:
    arguments = ["--storage", database, "--rows", "64", "--repeats", "1", "--batch-sizes", "32", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "training_speed.py", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for side in ("plain", "ours", "bare"):
        assert re.search(rf"batch +32 {side} +\d+\.\d+ s \(", done.stdout)
    assert re.search(r"ratio: ours \d+\.\d+ \(.*\) x plain, \d+\.\d+ \(.*\) of the bare step", done.stdout)
    for where in ("in memory", "in PostgreSQL"):
        assert re.search(rf"an epoch of an empty model with report and pruning {where}: \d+\.\d+ ms", done.stdout)


def test_compile_speed_prints_three_sides_and_seconds_of_compiling() -> None:
    arguments = ["--models", "mlp", "--repeats", "1", "--steps", "2", "--backend", "aot_eager", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "compile_speed.py", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"mlp +eager +\d+\.\d+ ms \(.*\) +x 1\.00\n", done.stdout), done.stdout
    for side in ("model", "whole"):
        assert re.search(rf"mlp +{side} +\d+\.\d+ ms \(.*\) .* compiled in \d+\.\d s, again \d+\.\d s\n", done.stdout)


def test_search_speed_prints_both_sides_and_their_ratio(database: str, tmp_path: Path) -> None:
    arguments = ["--storage", database, "--repeats", "1", "--trials", "2", "--epochs", "1", "--data-dir", tmp_path]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "search_speed.py", *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "random images" in done.stdout
    for side in ("plain", "ours"):
        assert re.search(rf"run 0 {side} +\d+\.\d s +2 completed +0 pruned +2 epochs", done.stdout), done.stdout
        assert re.search(rf"{side} +seconds \d+\.\d \(.*\), best accuracy 0\.\d+ \(.*\)", done.stdout)
    assert re.search(r"ratio: ours \d+\.\d+ \(.*\) x faster, best accuracy -?0\.\d+ \(.*\) better", done.stdout)


def test_threads_prints_what_was_chosen_and_its_ratio_to_what_is_best_by_hand(database: str) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "threads.py", "--smallest", "--storage", database],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for side in ("chosen", "1 x 1"):
        assert re.search(rf"mlp-32 +quiet +{side} +\d+\.\d+ s \(.*\) +\d at once, threads {{.+}}\n", done.stdout), side
    assert re.search(r"ratio: best by hand, 1 x 1, to chosen \d+\.\d+ \(.*\)\n", done.stdout), done.stdout


def test_on_gpu_does_each_part_on_a_cpu_too_and_writes_its_tables(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--smallest", "--out", tmp_path / "out", "--minutes", "20"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "on_gpu.py", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "on_gpu.json").read_text())
    assert set(found) == {"machine", "tests", "main", "speed", "slots"}
    (its_tests,) = found["tests"].values()
    assert its_tests["code"] == 0
    assert "skipped" in its_tests["closing"]
    assert found["main"]["tuner run digits"]["test"]["accuracy"] > 0.5
    assert [row["side"] for row in found["speed"]["rows"]] == ["bare", "ours"]
    (slots,) = found["slots"]["rows"]
    assert slots["ended"] == 12
    assert slots["trials_an_hour"] > 0
    table = (tmp_path / "out" / "on_gpu.md").read_text()
    assert re.search(r"digits-mlp \| ours \| [\d.]+ \| [\d.]+ \.\. [\d.]+ \|", table), table


def test_retraining_prints_both_ways_and_the_gain(tmp_path: Path) -> None:
    arguments = ["--data-dir", tmp_path, "--data-sets", "digits", "--seeds", "2", "--trials", "1", "--epochs", "2"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "retraining.py", *arguments, "--rows", "200"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"digits +accuracy +[12],[12]( +0\.\d{4}){2} +[+-]0\.\d{4} \+- 0\.\d{4}   \d/\d/\d\n", done.stdout)


def test_recording_goes_on_where_it_was_and_is_packed(tmp_path: Path) -> None:
    def record(*arguments: str | Path) -> str:
        command = [sys.executable, "-m", "benchmarks.search_replay.record", "--data-dir", tmp_path, "--tasks", "digits"]
        done = subprocess.run(
            [*command, "--out", tmp_path / "curves", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=BENCHMARKS.parent,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    record("--points", "1")
    (first,) = (tmp_path / "curves").iterdir()
    kept = first.read_text()
    first.write_text(f'{kept}{{"point": 1, "rep')  # it was killed as it wrote
    record("--points", "2")
    assert first.read_text().startswith(kept)
    assert "6 trainings of 20 epochs" in record("--pack", tmp_path)
    with np.load(tmp_path / "digits.npz") as packed:
        assert packed["metric"].shape == packed["seconds"].shape == (6, 20)
        assert packed["point"].tolist() == [0, 1] * 3
        assert packed["repeat"].tolist() == [0, 0, 1, 1, 2, 2]
        assert 0.5 < packed["test"].max() <= 1


def test_a_replay_is_compared_and_our_median_decides_as_stock_does(tmp_path: Path) -> None:
    def run(module: str, *arguments: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.search_replay.{module}", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=BENCHMARKS.parent,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    stock, ours = "random + stock median", "random + median, asked last"
    searches = ["--tasks", "digits", "--workers", "4", "--seeds", "3", "--trainings", "16", "--recorded-points"]
    traces = tmp_path / "traces"
    run("run", "--out", traces, *searches, "--methods", stock)
    kept = traces.read_text()
    run("run", "--out", traces, *searches, "--methods", stock, ours, "random + rungs")
    assert traces.read_text().startswith(kept)
    lines = [json.loads(line) for line in traces.read_text().splitlines()]
    found = {(line["method"], line["seed"]): (line["value"], line["started"], line["completed"]) for line in lines}
    assert len(found) == len(lines) == 9
    for seed in range(3):
        assert found[stock, seed] == found[ours, seed]
        assert found[stock, seed] != found["random + rungs", seed]
        _, started, completed = found[stock, seed]
        assert completed < started
    # In one process, as each takes seconds to begin.
    drawing = ["--out", str(tmp_path / "search.svg"), "--methods", stock, "random + rungs"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from benchmarks.search_replay import analysis, noise, plots\n"
            f"analysis.main([{str(traces)!r}, '--against', {stock!r}])\n"
            f"plots.main([{str(traces)!r}, *{drawing!r}])\n"
            "noise.main(['--tasks', 'digits'])\n",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=BENCHMARKS.parent,
    )
    assert (done.returncode, done.stderr) == (0, "")
    told = done.stdout
    assert re.search(r"digits, 4 workers: regret", told)
    drawn = re.findall(r'<polyline points="([^"]*)"', (tmp_path / "search.svg").read_text())
    assert [len(line.split()) for line in drawn] == [60, 60]
    shares = re.findall(r"(\d\.\d\d) \( *(\d+)\)", told)
    assert len(shares) == 2 * 4 * 4, "of all points and the best third: tops by seeds"
    assert ("0.38", "8") in shares, "two finalists on five seeds, of all points"
    assert len(re.findall(r"\n  random \+ rungs( +-?\d+\.\d{3}){5}  \d\.\d\d \(", told)) == 1, told
