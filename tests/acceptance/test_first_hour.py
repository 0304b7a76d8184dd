"""The first hour of a new user: a bug, its correction, the same command again, and a look at what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from command import Tuner

BUG = """
def loss(trial):
    width = trial.suggest_int("width", 1, 1000)
    return missing[width]
"""
FIXED = """
def loss(trial):
    width = trial.suggest_int("width", 1, 1000)
    trial.report(width, 4)
    return width
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(BUG)
    return path


def test_a_bug_costs_a_few_trials_and_once_mended_the_same_command_goes_on(tuner: Tuner, mine: Path) -> None:
    search = ("run", "mine.py:loss", "--trials", "4", "--workers", "1", "--seed", "5", "--direction", "maximize")
    failed = tuner(*search)
    assert failed.code == 5
    assert "study 'mine' ended: 3 trials failed alike, and none is complete: NameError: " in failed.error()
    assert f"({mine}, line 4)" in failed.error()
    (status,) = [line for line in tuner("status", "mine").stdout.splitlines() if line.startswith("state")]
    assert "finished: 3 trials failed alike" in status
    assert tuner("status", "mine", "--json").json()["trials"]["failed"] == 3

    mine.write_text(FIXED)
    elsewhere = tuner("worker", "mine", "--objective", "mine.py:loss").error()
    assert "replaces the study" in elsewhere
    assert "--allow-code-change" not in elsewhere
    done = tuner(*search)
    assert done.code == 0, done.stderr
    (told,) = [line for line in done.stderr.splitlines() if "deleted and created anew" in line]
    assert "objective.code_hash: the study has" in told
    assert all(len(word.rstrip(",")) <= 40 for word in told.split())
    assert "all 4 trials are drawn at random" in done.stderr

    # What is complete is never replaced, and nothing that was said has to be said again.
    again = tuner("run", "mine.py:loss", "--study", "mine")
    assert again.code == 0
    assert (
        "joined study mine: objective mine.py:loss, maximize value, 4 trials, sampler tpe, pruner median, seed 5"
        in (again.stderr)
    )
    assert tuner("create", "mine.py:loss", "--json").json()["created"] is False
    told = tuner("create", "mine.py:loss", TUNER_CREATE_SEED="6").error()
    assert "(seed: the study has 5, this command says 6); 'tuner create mine.py:loss' joins it as it is" in told
    mine.write_text(FIXED + "\n")
    told = tuner("create", "mine.py:loss").error()
    assert "it has changed from" in told
    assert "--allow-code-change" not in told  # create has no such option
    assert "--allow-code-change goes on with this one" in tuner("run", "mine.py:loss").error()

    assert tuner("create", "mine.py:loss", "--study", "other", "--sampler", "random", "--trials", "9").code == 0
    assert tuner("enqueue", "other", "width=3").code == 0
    (waiting,) = tuner("trials", "other").stdout.splitlines()[1:]
    assert waiting.split() == ["0", "waiting", "-", "-", "-", "width=3"]
    best_first = tuner("trials", "mine", "--sort", "value", "--json").json()
    values = [trial["value"] for trial in best_first]
    assert values == sorted(values, reverse=True)

    shown = tuner("show", "other", "--json").json()["spec"]
    assert (shown["sampler"]["name"], shown["budget"]["trials"], shown["objective"]["name"]) == (
        "random",
        9,
        "mine.py:loss",
    )
    assert "sampler.name            random" in tuner("show", "other").stdout
    compared = tuner("compare", "mine", "other", "--json").json()
    assert [study["spec"]["seed"] for study in compared["studies"]] == [5, 0]
    assert compared["by_budget"][-1] == {"share": 1.0, "best": [values[0], None]}
    assert compared["by_device_s"][-1]["best"] == [values[0], None]
    (line,) = [line for line in tuner("compare", "mine", "other").stdout.splitlines() if line.startswith("sampler")]
    assert line.split() == ["sampler", "tpe", "random"]
