"""Inputs on params, options and metrics that searches have gone wrong by, as a user gives them: tests/inputs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import optuna
import pytest
from command import Tuner
from terminal import on_terminal

from storage import open_storage

INPUTS = Path(__file__).parents[1] / "inputs"


def at(folder: str, name: str = "Space") -> str:
    """The objective in an input's folder."""
    return f"{INPUTS / folder / 'search.py'}:{name}"


@pytest.mark.parametrize(
    ("folder", "name", "told"),
    [
        ("10-tuple-choice", "Space", "Space.suggest failed: kernel: choices need to be text, numbers, True, False or"),
        ("37-integers-beyond-floats", "Space", "key: whole numbers need to be within 2^53 (9007199254740992) of 0"),
        ("39-space-that-cannot-be", "Space", "Space.suggest failed: ValueError: "),
        ("33-metric-names-of-ours", "Searched", "Searched.metric: 'epochs' is recorded of each trial anyway"),
    ],
)
def test_what_cannot_be_searched_is_told_when_the_study_is_made(
    tuner: Tuner, folder: str, name: str, told: str
) -> None:
    done = tuner("create", at(folder, name))
    assert (done.code, done.stdout) == (2, "")
    assert told in done.error()
    assert tuner("studies", "--json").json() == []


@pytest.mark.parametrize(
    ("folder", "name", "options", "part", "wanted"),
    [
        ("38-option-that-looks-like-a-number", "Space", ("--set", "release=2024"), "objective", {"release": "2024"}),
        ("09-hyperband-function", "curve", ("--pruner", "hyperband"), "pruner", {"max_resource": "auto"}),
        ("25-grid-of-conditional-space", "Space", ("--sampler", "grid"), "budget", 2 * 4),
    ],
)
def test_a_study_is_made_as_it_is_meant(
    tuner: Tuner, folder: str, name: str, options: tuple[str, ...], part: str, wanted: Any
) -> None:
    made = tuner("create", at(folder, name), *options, "--json")
    assert wanted in made.json()["spec"][part].values()
    assert ("minimizing what search.py:curve returns; --direction" in made.stderr) == (name == "curve")


def test_on_a_terminal_the_direction_of_a_plain_function_is_asked_for(tuner: Tuner) -> None:
    with on_terminal(tuner, "create", at("09-hyperband-function", "curve")) as terminal:
        terminal.wait_for("minimized or maximized? [minimize]:")
        terminal.type("maximize\r")
        terminal.wait_for("created study search: objective search.py:curve, maximize value")
        assert terminal.exit_code() == 0


def test_queued_values_become_what_their_params_are(tuner: Tuner, database: str) -> None:
    assert tuner("create", at("01-enqueue-text-number", "Typed"), "--study", "s", "--trials", "2").code == 0
    refused = tuner("enqueue", "s", "drop=1e400")  # before a trial has told what params there are
    assert (refused.code, "drop: a study holds finite numbers" in refused.error()) == (2, True)
    for params in (("width=16.0", "drop=.25", "release=2024"), ("width=12.7",)):
        assert tuner("enqueue", "s", *params).code == 0
    optuna.load_study(study_name="s", storage=open_storage(database)).enqueue_trial({"width": "8", "drop": 0})
    done = tuner("worker", "s", "--objective", at("01-enqueue-text-number", "Typed"))
    assert done.code == 0, done.stderr
    first, failed, last = tuner("trials", "s", "--json").json()
    assert first["params"] == {"width": 16, "drop": 0.25, "release": "2024"}
    assert json.dumps(first["params"]["width"]) == "16"
    assert "width: 4 to 32, whole numbers; got 12.7" in failed["user_attrs"]["failure_message"]
    assert (last["state"], last["params"]["width"], last["params"]["drop"]) == ("COMPLETE", 8, 0.0)

    for params, told in (
        (("width=12.7",), "width: 4 to 32, whole numbers; got 12.7"),
        (("drop=.75",), "drop: 0 to 0.5; got 0.75"),
        (("release=2025",), "release: 2023 or 2024; got 2025"),
        (("widht=8",), "has had a param 'widht'; did you mean 'width'?"),
    ):
        refused = tuner("enqueue", "s", *params)
        assert refused.code == 2
        assert told in refused.error()
    wasted = tuner("enqueue", "s", "width=1e1")
    assert (wasted.code, "'tuner extend s --trials +20' lets it go on" in wasted.error()) == (1, True)
    assert tuner("extend", "s", "--trials", "+2").code == 0
    assert tuner("enqueue", "s", "width=1e1", "drop=.5", "--json").json()["params"] == {"width": 10, "drop": 0.5}
    assert tuner("enqueue", "s", "widht=8", "--force").code == 0


def test_a_function_stops_its_study_and_its_params_go_into_a_shell(tuner: Tuner) -> None:
    done = tuner("run", at("34-study-stop", "enough"), "--trials", "5", "--workers", "1")
    assert done.code == 0, done.stderr
    assert "trial 1 stopped the study" in done.stderr
    assert [trial["state"] for trial in tuner("trials", "search", "--json").json()] == ["COMPLETE"] * 2
    assert tuner("status", "search", "--json").json()["state"] == "stopped"

    lines = tuner("best", "search", "--format", "env").stdout
    path = tuner("best", "search", "--json").json()["params"]["path"]
    shown = subprocess.run(
        ["/bin/sh", "-c", f"{lines}\nenv >/dev/null && echo $TUNER_PARAM_PATH"], capture_output=True, text=True
    )
    assert (float(shown.stdout), shown.stderr) == (path, "")
    named = tuner("best", "search", "--format", "env", "--prefix", "search_").stdout
    assert named == f"search_PATH={path!r}\n"
    for prefix in ("", "LD_", "A B_", "X"):
        assert "--prefix needs letters" in tuner("best", "search", "--format", "env", "--prefix", prefix).error()


@pytest.mark.parametrize(("one", "other"), [("weight.decay", "weight decay"), ("größe", "grüße"), ("lr", "LR")])
def test_params_that_a_shell_cannot_tell_apart_are_refused_there(
    tuner: Tuner, database: str, one: str, other: str
) -> None:
    study = optuna.create_study(study_name="s", storage=open_storage(database))
    study.optimize(lambda trial: trial.suggest_float(one, 0, 1) + trial.suggest_float(other, 0, 1), n_trials=1)
    refused = tuner("best", "s", "--format", "env")
    assert (refused.code, refused.stdout) == (2, "")
    assert f"the params {one!r} and {other!r} would both be TUNER_PARAM_" in refused.error()
    assert tuner("best", "s", "--format", "flags").code == 0


def test_a_metric_named_as_the_record_s_own_is_refused_and_not_lost(tuner: Tuner) -> None:
    done = tuner("run", at("33-metric-names-of-ours", "Renamed"), "--workers", "1", "--max-failures", "0")
    assert done.code == 1
    assert "a metric cannot be named 'seconds', which is recorded of each trial anyway" in done.error()
