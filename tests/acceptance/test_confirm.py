"""`tuner run --confirm` to a model, and `tuner confirm` of a plain function, interrupted: by real workers."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import optuna
from command import Tuner
from exporting import code
from optuna.distributions import IntDistribution
from optuna.trial import create_trial

from storage import open_storage

NOISY = """
import random
import threading
from pathlib import Path

GATE = Path(__file__).with_name("gate")

def noisy(trial):
    x = trial.suggest_int("x", 0, 100)
    step = 0
    while trial.number == 1 and not GATE.exists():
        threading.Event().wait(0.05)
        trial.report(x, step)
        step += 1
    return x + random.random()
"""


def test_the_confirmed_trial_is_exported_and_the_manifest_tells_by_what(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "signs.py").write_text(code())
    run = tuner(
        *("run", "signs.py:Signs", "--trials", "3", "--epochs", "2", "--workers", "1", "--device", "cpu"),
        *("--no-preflight", "--confirm", "2x2", "--output", "model", "--json"),
    )
    assert run.code == 0, run.stderr
    found, manifest = run.json(), json.loads((tmp_path / "model" / "manifest.json").read_text())
    confirmation = found["confirmation"]
    assert (confirmation["confirmation"], confirmation["runs"], confirmation["unfinished"]) == ("signs/confirm", 4, 0)
    choice, other = confirmation["trials"]
    assert choice["number"] == confirmation["choice"] == found["number"] == manifest["trial"]
    assert choice["parameters"] == found["parameters"] == manifest["parameters"]
    assert manifest["confirmed"] == found["confirmed"]
    assert manifest["confirmed"] == {
        "study": "signs/confirm",
        "runs": 2,
        "mean": sum(choice["values"]) / 2,
        "std": choice["std"],
        "alike": [number for number in confirmation["alike"] if number != choice["number"]],
        "gap": other["gap"]["value"],
        "gap_interval": [other["gap"]["low"], other["gap"]["high"]],
    }
    assert "| validation accuracy, mean of 2 runs on fresh seeds |" in (tmp_path / "model" / "README.md").read_text()

    trials = tuner("trials", "signs/confirm", "--json").json()
    assert len({trial["user_attrs"]["seed"] for trial in trials}) == 4
    assert [trial["params"] for trial in trials if trial["user_attrs"]["confirms"] == choice["number"]] == (
        [choice["params"]] * 2
    )

    report = tuner("report", "signs", "-o", "report.html", "--model", "model", "--json").json()
    repeated = report["confirmation"]["repeated"]
    assert report["confirmation"]["study"] == "signs/confirm"
    assert [(its["params"], sorted(its["values"])) for its in repeated] == (
        [(its["params"], sorted(its["values"])) for its in (choice, other)]
    )
    assert repeated[0]["mean"] == manifest["confirmed"]["mean"]
    assert report["model"] == manifest
    page = (tmp_path / "report.html").read_text()
    assert "signs/confirm" in page
    rows = manifest["test_details"]
    for heading, its in (("Where it errs", rows["wrong"][""]), ("Some rows that it got right", rows["right"][""])):
        assert (f"<h3>{heading}</h3>" in page) == bool(its)
    assert rows["right"][""] or rows["wrong"][""]
    other_study = tuner("report", "signs/confirm", "-o", "other.html", "--model", "model")
    assert (other_study.code, "--model needs an export of 'signs/confirm'" in other_study.error()) == (2, True)

    deleted = tuner("delete", "signs", "--yes")
    assert "its confirmation signs/confirm stays: 'tuner delete signs/confirm' deletes it, too" in deleted.stderr


def test_a_confirmation_that_was_interrupted_goes_on_and_a_plain_function_has_one(
    tuner: Tuner, database: str, tmp_path: Path
) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    assert tuner("create", "noisy.py:noisy", "--trials", "3", "--direction", "maximize").code == 0
    search = optuna.load_study(study_name="noisy", storage=open_storage(database))
    for x in (20, 60, 40):
        space = {"x": IntDistribution(0, 100)}
        search.add_trial(create_trial(params={"x": x}, distributions=space, value=float(x)))
    confirm = ("confirm", "noisy", "--objective", "noisy.py:noisy", "--workers", "1", "--top", "2", "--seeds", "2")

    with tuner.start(*confirm) as running:
        running.wait_for_line("trial 0 complete: value 60.")  # the next one waits for the gate
        running.process.send_signal(signal.SIGTERM)
        assert running.finish().code == 143
    assert tuner("status", "noisy/confirm", "--json").json()["trials"]["waiting"] == 3
    (tmp_path / "gate").touch()
    found = tuner(*confirm, "--json").json()
    assert (found["runs"], found["unfinished"], found["search_trials"]) == (4, 0, 3)
    assert [(trial["number"], {int(value) for value in trial["values"]}) for trial in found["trials"]] == (
        [(1, {60}), (2, {40})]
    )
    assert len({value % 1 for trial in found["trials"] for value in trial["values"]}) == 4, "each has its own seed"
    again = tuner(*confirm)
    assert f"the choice is trial {found['choice']}, value " in again.stdout
    assert again.stderr == "", "nothing is started where nothing is to be done"
