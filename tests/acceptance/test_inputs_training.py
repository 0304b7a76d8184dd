"""Inputs that trainings have failed on elsewhere, as a user gives them: each folder of tests/inputs has one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from command import Tuner, wait_for

INPUTS = Path(__file__).parents[1] / "inputs"
ONE_TRIAL = ("--trials", "1", "--workers", "1", "--max-failures", "0", "--json")


@pytest.mark.parametrize(
    ("folder", "name", "options"),
    [
        ("08-lbfgs", "ByLbfgs", ()),
        ("22-ignored-label", "Places", ("--allow-leak",)),
        ("23-several-labels", "Several", ()),
        ("24-label-types", "Int16", ()),
    ],
)
def test_a_search_with_it_ends_with_a_model(tuner: Tuner, folder: str, name: str, options: tuple[str, ...]) -> None:
    done = tuner("run", f"{INPUTS / folder / 'search.py'}:{name}", *ONE_TRIAL, *options)
    assert done.code == 0, done.stderr
    best = done.json()
    assert best["value"] > 0.9, done.stderr
    assert (Path(best["model"]) / "model.pt2").exists()


def test_a_trial_with_lazy_layers_goes_on_where_it_was_given_back(tuner: Tuner) -> None:
    objective = f"{INPUTS / '07-lazy-resume' / 'search.py'}:Lazy"
    assert tuner("create", objective, "--study", "s", "--trials", "1", "--max-failures", "0").code == 0
    worker = ("worker", "s", "--objective", objective, "--slots", "1")
    with tuner.start(*worker, "--log-format", "json") as running:
        wait_for(lambda: len(running.events("report")) >= 2, "it trains", 120)
        running.process.terminate()
        assert running.finish().code == 143
    done = tuner(*worker)
    assert done.code == 0, done.stderr
    assert "resumed after epoch" in done.stderr
    [trial] = tuner("trials", "s", "--json").json()
    assert trial["state"] == "COMPLETE"


def test_an_evaluation_takes_no_more_memory_than_its_outputs_may(tuner: Tuner) -> None:
    limited = replace(tuner, within=("prlimit", f"--data={3 * 2**30}"))
    objective = f"{INPUTS / '12-evaluation-memory' / 'search.py'}:Wide"
    done = limited("run", objective, *ONE_TRIAL, "--no-export")
    assert done.code == 0, done.stderr


@pytest.mark.parametrize("options", [("--readers", "2"), ("--data", "stream", "--readers", "0")])
def test_processes_that_would_share_an_open_file_read_nothing(tuner: Tuner, options: tuple[str, ...]) -> None:
    objective = f"{INPUTS / '11-shared-file-handle' / 'search.py'}:FromFile"
    assert tuner("create", objective, "--study", "s", "--trials", "1", "--max-failures", "0", *options).code == 0
    done = tuner("worker", "s", "--objective", objective, "--slots", "1")
    assert done.code == 0, done.stderr
    told = "processes would share the open file"
    assert (told in done.stderr) == ("2" in options)
