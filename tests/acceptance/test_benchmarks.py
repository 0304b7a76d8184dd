"""Each benchmark at its smallest size, by the one command that runs them: it prints its figures and gives ratios.

Nothing is said here of the ratios themselves: the machine has other things to do.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import baseline
import numpy as np
import pytest
from baseline import Ratio

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Runs(Protocol):
    """Runs one benchmark with more arguments; returns what it printed, and which ratios became its baseline."""

    def __call__(self, name: str, *arguments: str | Path, quiet: bool = True) -> tuple[str, set[str]]: ...


@pytest.fixture
def run(tmp_path: Path) -> Runs:
    def run(name: str, *arguments: str | Path, quiet: bool = True) -> tuple[str, set[str]]:
        kept = tmp_path / "baseline.json"
        command = ["-m", "benchmarks", "--only", name, "--turns", "1", "--out", tmp_path, "--baseline", kept, "--write"]
        done = subprocess.run(
            [sys.executable, *command, "--", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=BENCHMARKS.parent,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == "" or not quiet
        (ratios,) = baseline.read(kept).values()
        lines = re.findall(rf"^{name} +(.*?) +\d\S* +- +\S+  new$", done.stdout, re.M)
        assert lines == list(ratios), done.stdout  # each has its line
        return (tmp_path / f"{name}.txt").read_text(), set(ratios)

    return run


@pytest.mark.parametrize(
    ("now", "before", "verdict"),
    [
        (Ratio(median=2.0, spread=0.1), Ratio(median=2.4, spread=0.5), "same"),  # no more than it differed before
        (Ratio(median=2.0, spread=0.5), Ratio(median=2.4, spread=0.1), "same"),  # no more than it differs now
        (Ratio(median=2.0, spread=0.1), Ratio(median=2.4, spread=0.2), "fell"),
        (Ratio(median=2.4, spread=0.1), Ratio(median=2.0, spread=0.2), "rose"),
        (Ratio(median=2.0, spread=0.0), None, "new"),
        (None, Ratio(median=2.0, spread=9.0), "gone"),
    ],
)
def test_a_ratio_fell_if_by_more_than_its_spread(now: Ratio | None, before: Ratio | None, verdict: str) -> None:
    assert baseline.verdict(now, before) == verdict


def test_a_baseline_keeps_medians_and_spreads_and_what_was_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    assert baseline.read(file) == {}
    one, other = Ratio.of([3.0, 1.0, 1.5]), Ratio.of([0.123456])
    assert one == Ratio(median=1.5, spread=2.0)
    assert other == Ratio(median=0.123, spread=0.0)
    baseline.write(file, {"a": {"x": one}, "b": {"x": one}})
    baseline.write(file, {"b": {"y": other}})
    assert baseline.read(file) == {"a": {"x": one}, "b": {"y": other}}


def test_each_ratio_has_a_line_and_one_that_fell_or_is_gone_is_told() -> None:
    low, high = Ratio(median=1.0, spread=0.1), Ratio(median=2.0, spread=0.2)
    lines, is_good = baseline.compared("a", {"x": high, "y": low}, {"x": low, "y": low})
    assert [line.split() for line in lines] == [
        ["a", "x", "2", "1", "0.2", "rose"],
        ["a", "y", "1", "1", "0.1", "same"],
    ]
    assert is_good
    assert not baseline.compared("a", {"x": low, "y": low}, {"x": high, "y": low})[1]
    assert not baseline.compared("a", {"y": low}, {"x": high, "y": low})[1]


def test_the_baseline_has_ratios_of_benchmarks_that_there_are() -> None:
    benchmarks = {path.stem for path in BENCHMARKS.glob("*.py") if "= argument_parser(__doc__)" in path.read_text()}
    kept = baseline.read(BENCHMARKS / "baseline.json")
    assert "startup" in kept
    assert set(kept) <= benchmarks
    assert all(kept.values())


def test_startup_prints_seconds_beside_those_wanted(database: str, run: Runs) -> None:
    printed, ratios = run("startup", "--storage", database)
    for what in ("import tuner", "tuner --help", "tuner objectives", "tuner studies", "tuner best", "tuner status"):
        assert re.search(rf"{what}( +\d+\.\d\d){{3}} +0\.60 +\d+\.\d\d\n", printed), what
        assert f"import optuna over {what}" in ratios


def test_main_job_prints_its_phases_and_accuracy_beside_another_checkouts(run: Runs) -> None:
    printed, ratios = run("main_job", "--against", BENCHMARKS.parent)
    found = {name: float(value) for name, value in re.findall(r"^  (\D+?) +(\d+\.\d+)", printed, re.M)}
    phases = [found[name] for name in ("first trial", "search", "export")]
    assert min(phases) > 0
    assert sum(phases) == pytest.approx(found["seconds"], abs=0.01)
    assert 0 < found["test accuracy, there"] <= 1
    assert "bare imports over export" in ratios
    assert found["seconds, ratio"] == pytest.approx(found["seconds"] / found["seconds, there"], abs=0.01)


def test_storage_scale_prints_both_sides_and_their_ratio(database: str, run: Runs) -> None:
    printed, _ = run("storage_scale", "--storage", database, "--sizes", "30")
    for what in ("first claim", "first read of all trials", "report", "should_prune", "tell", "TPE's first suggest"):
        assert re.search(rf"{what}( +\d+\.\d+){{7}}", printed), what
    assert re.search(r"curves add to report: [+-]\d+\.\d%, .*tell: [+-]\d+\.\d%\n", printed)


def test_reading_prints_both_sides_and_their_ratio(database: str, run: Runs) -> None:
    printed, _ = run("reading", "--storage", database, "--sizes", "30")
    for what in ("tuner best", "tuner status", "tuner studies", "page, first", "page, again", "first read by a worker"):
        assert re.search(rf"{what}( +\d+\.\d+){{7}}", printed), what
    assert re.search(r"its memory, MB( +\d+\.\d+){6}", printed)  # too little, at this size, for a ratio


def test_worker_load_prints_both_sides_and_their_ratio(database: str, run: Runs) -> None:
    printed, _ = run("worker_load", "--storage", database, "--seconds", "0.5")
    for side in ("stock", "ours"):
        assert re.search(rf" 2 {side}( +\d+\.\d+){{3}}( +(\d+\.\d+ / \d+\.\d+|-)){{4}} +0\n", printed), printed
    assert re.search(r" 2 ratio(( +\d+\.\d+){3}| -)", printed)


def test_report_load_prints_percentiles_connections_and_errors(database: str, run: Runs) -> None:
    printed, _ = run("report_load", "--storage", database)
    assert "  2 of 2 workers ready after" in printed
    for call in ("report", "should_prune", "claim", "params", "tell", "watch"):
        assert re.search(rf"{call}( +\d+\.\d+){{3}} +\d+\n", printed), printed
    assert re.search(r"connections +[2-8] at most\n", printed), printed
    assert re.search(r"waits +0\n +gave up +0, never got in 0\n", printed), printed


def test_training_speed_prints_three_sides_and_their_ratios(database: str, run: Runs) -> None:
    printed, _ = run("training_speed", "--storage", database, quiet=False)
    for side in ("plain", "ours", "bare"):
        assert re.search(rf"batch +32 {side} +\d+\.\d+ s \(", printed)
    assert re.search(r"ratio: ours \d+\.\d+ \(.*\) x plain, \d+\.\d+ \(.*\) of the bare step", printed)
    for where in ("in memory", "in PostgreSQL"):
        assert re.search(rf"an epoch of an empty model with report and pruning {where}: \d+\.\d+ ms", printed)


def test_compile_speed_prints_three_sides_and_seconds_of_compiling(run: Runs) -> None:
    printed, _ = run("compile_speed", quiet=False)
    assert re.search(r"mlp +eager +\d+\.\d+ ms \(.*\) +x 1\.00\n", printed), printed
    for side in ("model", "whole"):
        assert re.search(rf"mlp +{side} +\d+\.\d+ ms \(.*\) .* compiled in \d+\.\d s, again \d+\.\d s\n", printed)


def test_search_speed_prints_both_sides_and_their_ratio(database: str, run: Runs) -> None:
    printed, _ = run("search_speed", "--storage", database)
    assert "random images" in printed
    for side in ("plain", "ours"):
        assert re.search(rf"run 0 {side} +\d+\.\d s +2 completed +0 pruned +2 epochs", printed), printed
        assert re.search(rf"{side} +seconds \d+\.\d \(.*\), best accuracy 0\.\d+ \(.*\)", printed)
    assert re.search(r"ratio: ours \d+\.\d+ \(.*\) x faster, best accuracy -?0\.\d+ \(.*\) better", printed)


def test_search_live_prints_each_study_and_the_differences_of_pruners(database: str, run: Runs) -> None:
    printed, ratios = run("search_live", "--storage", database)
    for pruner in ("median", "rungs"):
        assert re.search(rf"seed 0 {pruner} +\d+\.\d s of trials: 2 complete; best 0\.\d+, test 0\.\d+", printed), (
            printed
        )
    # In one epoch nothing is pruned, and the studies are of one seed.
    for which in ("best", "test"):
        assert re.search(rf"rungs against median, {which}: \+0\.00000 \+- nan, better in 0 of 1, p 1\.000", printed), (
            which
        )
    assert ratios == {"rungs over median, test"}


def test_threads_prints_what_was_chosen_and_its_ratio_to_what_is_best_by_hand(database: str, run: Runs) -> None:
    printed, _ = run("threads", "--storage", database)
    for side in ("chosen", "1 x 1"):
        assert re.search(rf"mlp-32 +quiet +{side} +\d+\.\d+ s \(.*\) +\d at once, threads {{.+}}\n", printed), side
    assert re.search(r"ratio: best by hand, 1 x 1, to chosen \d+\.\d+ \(.*\)\n", printed), printed


def test_on_gpu_does_each_part_on_a_cpu_too_and_writes_its_tables(tmp_path: Path, run: Runs) -> None:
    run("on_gpu", quiet=False)
    found = json.loads((tmp_path / "on_gpu" / "on_gpu.json").read_text())
    assert set(found) == {"machine", "tests", "main", "steps", "speed", "slots"}
    assert [one["code"] for one in found["steps"].values()] == [0, 0]
    (its_tests,) = found["tests"].values()
    assert its_tests["code"] == 0
    assert "skipped" in its_tests["closing"]
    assert found["main"]["tuner run digits"]["test"]["accuracy"] > 0.5
    assert [row["side"] for row in found["speed"]["rows"]] == ["bare", "ours"]
    (slots,) = found["slots"]["rows"]
    assert slots["ended"] == 12
    assert slots["trials_an_hour"] > 0
    table = (tmp_path / "on_gpu" / "on_gpu.md").read_text()
    assert re.search(r"digits-mlp \| ours \| [\d.]+ \| [\d.]+ \.\. [\d.]+ \|", table), table


def test_retraining_prints_both_ways_and_the_gain(tmp_path: Path, run: Runs) -> None:
    printed, _ = run("retraining", "--seeds", "2")
    assert re.search(r"digits +accuracy +[12],[12]( +0\.\d{4}){2} +[+-]0\.\d{4} \+- 0\.\d{4}   \d/\d/\d\n", printed)


def test_recording_goes_on_where_it_was_and_is_packed(tmp_path: Path) -> None:
    def record(*arguments: str | Path) -> str:
        command = [sys.executable, "-m", "benchmarks.search_replay.record", "--data-dir", tmp_path, "--tasks", "digits"]
        done = subprocess.run(
            [*command, "--out", tmp_path / "curves", "--tables", tmp_path, *arguments],
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
    assert "6 trainings of 20 epochs" in record("--pack")
    with np.load(tmp_path / "digits.npz") as packed:
        assert packed["metric"].shape == packed["seconds"].shape == (6, 20)
        assert packed["point"].tolist() == [0, 1] * 3
        assert packed["repeat"].tolist() == [0, 0, 1, 1, 2, 2]
        assert 0.5 < packed["test"].max() <= 1
    table = (tmp_path / "digits.npz").read_bytes()
    first.unlink()
    record("--points", "2")
    assert first.read_text() == ""
    record("--pack")
    assert (tmp_path / "digits.npz").read_bytes() == table


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
    found = {
        (line["method"], line["seed"]): (line["seen"]["value"], line["started"], line["completed"]) for line in lines
    }
    assert len(found) == len(lines) == 9
    for line in lines:
        assert line["complete"]["value"][-1] >= line["seen"]["value"][-1]
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
            f"analysis.main([{str(traces)!r}, '--against', {stock!r}, '--complete'])\n"
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
    seen, complete = re.findall(r"\n  random \+ rungs((?: +-?\d+\.\d{3}){5})  \d\.\d\d \(", told)
    assert float(seen.split()[-1]) <= float(complete.split()[-1]) < 1


# Two trainings of one point, twice from the same generator; and tables of which a machine's share alone is whole.
_WORLD = """
import sys
from pathlib import Path

directory = sys.argv[1]  # an objective that is imported finds no arguments

import numpy as np
from benchmarks.search_replay.curves import TABLES, Recorded, pack
from benchmarks.search_replay.run import smooth, task_of
from benchmarks.search_replay.tasks import TASKS, points

world = smooth(str(TABLES), "digits")
(point,) = points(TASKS["digits"], TASKS["digits"].build(), 1)
for _ in range(2):
    noise = np.random.default_rng(0)
    one, other = (world.training(point.params, point.distributions, noise).value for _ in range(2))
    print(one.min(), other.min())

curves = dict(metric=[0.5], loss=[0.5], test=[0.5], seconds=[1.0])
share = [Recorded(point, repeat, **curves) for point in (0, 2) for repeat in range(3)]
pack(share, 1, Path(directory) / "digits.npz")
task_of(directory, "digits")
"""


def test_chance_is_drawn_anew_for_each_training_and_a_table_of_one_share_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WORLD, tmp_path], capture_output=True, text=True, check=False, cwd=BENCHMARKS.parent
    )
    first, again = done.stdout.splitlines()
    assert first == again
    one, other = first.split()
    assert one != other
    assert done.stderr.endswith(
        "ValueError: digits was not recorded to its end: none of its points is there on several seeds\n"
    )
