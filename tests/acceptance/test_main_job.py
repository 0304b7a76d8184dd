"""The README's main job with a smaller budget, and every command after it against the same study."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import chromium
import numpy as np
import pytest
from command import Finished, Tuner
from playwright.sync_api import expect

from objectives.digits import Digits
from storage import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
# In a fresh process: the exported model's accuracy on the study's own test split.
_SERVE = """
import sys, torch, tuner
from objectives.digits import Digits
model = tuner.load_model(sys.argv[1])
test = Digits().load_data(None).test
print((model(test.inputs).argmax(1) == test.targets).float().mean().item(), model.training)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("home")
    yield path
    EmbeddedServer(path / "data").destroy()


@pytest.fixture(scope="module")
def tuner(home: Path) -> Tuner:
    """The command line with nothing running and nothing set up: it starts its own PostgreSQL."""
    return Tuner({"TUNER_DATA_DIR": str(home / "data")}, home)


@pytest.fixture(scope="module")
def job(tuner: Tuner) -> Finished:
    return tuner("run", "digits", "--trials", "12", "--epochs", "8")


def test_the_main_job_searches_retrains_tests_and_exports(job: Finished, home: Path) -> None:
    assert job.code == 0, job.stderr
    told = dict(line.split(maxsplit=1) for line in job.stdout.splitlines())
    assert told["dashboard"] == "tuner dashboard"
    assert Path(told["model"]).parent == home / "data" / "models"
    accuracy = re.search(r"^test accuracy +(\S+) \(95 %: (0\.\d+) to (\d\.?\d*)\)$", job.stdout, re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[2]) < float(accuracy[1]) < float(accuracy[3])
    assert float(accuracy[1]) > 0.9
    assert re.search(r"^validation accuracy +0\.\d+$", job.stdout, re.MULTILINE)
    assert "lr=" in told["params"]


def test_progress_is_plain_lines_where_stderr_is_no_terminal(job: Finished) -> None:
    assert re.search(r"^12/12 done, 0 running, \d+ pruned, 0 failed, best 0\.\d+ \(trial \d+\)", job.stderr, re.M)
    assert "\x1b" not in job.stderr


def test_two_processes_ran_the_trials(job: Finished) -> None:
    assert {line[-6:] for line in job.stderr.splitlines() if line.startswith("trial ")} == {"lot 0)", "lot 1)"}


def test_best_prints_what_the_manifest_holds(job: Finished, tuner: Tuner, home: Path) -> None:
    best = tuner("best", "digits", "--json").json()
    fields = ["study", "number", "value", "metric", "direction", "params", "epoch", "state", "seed"]
    assert list(best) == [*fields, "parameters", "trained_parameters"]
    assert (best["study"], best["metric"], best["direction"]) == ("digits", "accuracy", "maximize")
    assert best["state"] == "COMPLETE"
    (manifest,) = (home / "data" / "models").glob("study-*/manifest.json")
    exported = json.loads(manifest.read_text())
    assert exported["params"] == best["params"]
    assert (exported["trial"], exported["validation"]) == (best["number"], best["value"])
    assert exported["epochs"] == best["epoch"]
    curve = [trial for trial in tuner("trials", "digits", "--json").json() if trial["number"] == best["number"]]
    assert curve[0]["value"] == best["value"]
    shown = tuner("best", "digits").stdout
    assert f"accuracy {best['value']:.6g} (trial {best['number']}" in shown
    weights = {name: best[name] for name in ("parameters", "trained_parameters")}
    assert weights == {name: curve[0][name] for name in weights} == {name: exported[name] for name in weights}
    assert f"{best['parameters']:,} parameters\n" in shown
    assert best["parameters"] > 64 * 10


def test_best_params_paste_into_scripts(job: Finished, tuner: Tuner) -> None:
    params = tuner("best", "digits", "--json").json()["params"]
    environment = tuner("best", "digits", "--format", "env").stdout
    printed = subprocess.run(
        ["/bin/sh", "-c", f"{environment}\necho $TUNER_PARAM_LR $TUNER_PARAM_BATCH_SIZE"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert [float(printed[0]), int(printed[1])] == [params["lr"], params["batch_size"]]
    flags = shlex.split(tuner("best", "digits", "--format", "flags").stdout)
    assert dict(zip(flags[::2], map(json.loads, flags[1::2]), strict=True)) == {f"--{k}": v for k, v in params.items()}


def test_what_the_readme_does_with_the_result_works_as_it_stands(job: Finished, tuner: Tuner, home: Path) -> None:
    section = (ROOT / "README.md").read_text().partition("## Use the result\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^    (tuner .*|eval .*)$", section, re.M)
    assert len(lines) == 4
    (python,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    environment = {**os.environ, **tuner.environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    printed = {}
    for program in (
        ("/bin/sh", "-e", "-c", "\n".join([*lines, "echo lr=$TUNER_PARAM_LR"])),
        (sys.executable, "-c", python),
    ):
        done = subprocess.run(program, cwd=home, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed[program[0]] = done.stdout
    assert re.search(r"^lr=0\.\d+$", printed["/bin/sh"], re.M)
    assert re.fullmatch(r"\[('\d' ){4}'\d'\]\n", printed[sys.executable])


def test_status_studies_and_trials_agree(job: Finished, tuner: Tuner) -> None:
    status = tuner("status", "digits", "--json").json()
    assert status["state"] == "finished"
    assert status["trials"]["complete"] + status["trials"]["pruned"] == 12
    assert status["failures"] == {}
    (study,) = tuner("studies", "--json").json()
    assert (study["study"], study["best"], study["trials"]) == ("digits", status["best"]["value"], status["trials"])
    trials = tuner("trials", "digits", "--json").json()
    assert [trial["number"] for trial in trials] == list(range(12))
    assert "12/12 done" in tuner("status", "digits").stdout
    assert tuner("studies").stdout.splitlines()[1].startswith("digits")
    assert len(tuner("trials", "digits").stdout.splitlines()) == 13
    models = Path(tuner.environment["TUNER_DATA_DIR"]) / "models"
    (directory,) = [path for path in models.iterdir() if not path.is_symlink()]
    assert (models / "digits").resolve() == directory.resolve()


def test_a_worker_on_the_finished_study_runs_nothing(job: Finished, tuner: Tuner) -> None:
    done = tuner("worker", "digits", "--trials", "5")
    assert done.code == 0, done.stderr
    assert "the budget of 12 trials is used up" in done.stderr
    assert len(tuner("trials", "digits", "--json").json()) == 12


def test_the_same_command_again_joins_and_touches_the_test_split_no_more(job: Finished, tuner: Tuner) -> None:
    again = tuner("run", "digits", "--trials", "12", "--epochs", "8", "--json")
    assert again.code == 0, again.stderr
    assert "joined study digits" in again.stderr
    assert again.json()["number"] == tuner("best", "digits", "--json").json()["number"]
    assert "evaluated" not in again.stderr


def test_another_spec_is_refused_and_the_difference_shown(job: Finished, tuner: Tuner) -> None:
    refused = tuner("run", "digits", "--trials", "13", "--epochs", "8")
    assert refused.code == 1
    assert "budget.trials: the study has 12, this command says 13" in refused.error()


def test_the_exported_model_predicts_the_same_in_a_fresh_process(job: Finished, tuner: Tuner, home: Path) -> None:
    exported = tuner("export", "digits", "--output", "model/", "--formats", "pt2,onnx,torchscript", "--json")
    assert exported.code == 0, exported.stderr
    result = exported.json()
    assert list(result["formats"]) == ["safetensors", "pt2", "onnx", "torchscript"]
    assert [its["fresh_process"] for its in result["formats"].values()] == [False, True, True, True]
    assert Path(result["model"]) == home / "model"
    done = subprocess.run(
        [sys.executable, "-c", _SERVE, str(home / "model")], capture_output=True, text=True, check=True, cwd=home
    )
    accuracy, training = done.stdout.split()
    assert float(accuracy) == pytest.approx(result["test"]["accuracy"])
    assert training == "False"
    assert sorted(path.name for path in (home / "model").iterdir()) == [
        "README.md",
        "manifest.json",
        "model.onnx",
        "model.pt2",
        "model.safetensors",
        "model.torchscript.pt",
    ]
    test = Digits().load_data(home).test
    np.save(home / "test.npy", test.inputs.numpy())
    rows = [json.loads(line) for line in tuner("predict", "model/", "test.npy", "--json").stdout.splitlines()]
    assert [row["row"] for row in rows] == list(range(len(test)))
    right = [row["prediction"] == str(target) for row, target in zip(rows, test.targets.tolist(), strict=True)]
    assert sum(right) / len(right) == pytest.approx(result["test"]["accuracy"])
    checked = tuner("verify", "model/", "--metrics", "--json")
    assert checked.code == 0, checked.stderr
    assert {check["name"] for check in checked.json()} >= {"data", "test accuracy"}


def test_the_dashboard_shows_the_study_in_a_browser(job: Finished, tuner: Tuner) -> None:
    if chromium.executable() is None:
        pytest.skip("no Chromium or Chrome is installed")
    with tuner.start("dashboard", "--port", "0") as running:
        running.wait_for_line("dashboard on ")
        url = running.lines[-1].split()[2].rstrip(";")
        with chromium.a_page() as page:
            body = page.locator("body")
            page.goto(f"{url}dashboard")
            expect(body).to_contain_text("digits", use_inner_text=True)
            page.goto(f"{url}dashboard/studies/1")
            expect(page.locator(".plotly, svg.main-svg").first).to_be_visible()
            page.goto(f"{url}dashboard/studies/1/trials")
            expect(body).to_contain_text(re.compile("Pruned|Complete"), use_inner_text=True)
        running.process.terminate()
        assert running.finish().code == 0


def test_objectives_lists_digits_with_its_summary(tuner: Tuner) -> None:
    (digits,) = [row for row in tuner("objectives", "--json").json() if row["name"] == "digits"]
    assert digits["summary"].startswith("Classify a digit")
    assert "digits" in tuner("objectives").stdout


def test_doctor_finds_nothing_wrong(tuner: Tuner, job: Finished) -> None:
    found = tuner("doctor", "--json")
    assert found.code == 0, found.stdout
    assert {check["check"] for check in found.json()} == {
        "python",
        "torch",
        "data",
        "database",
        "clock",
        "records",
        "objectives",
    }


def test_db_says_where_it_is_and_comes_back_with_everything(job: Finished, tuner: Tuner) -> None:
    status = tuner("db", "status", "--json").json()
    assert status["running"] is True
    url = tuner("db", "url").stdout.strip()
    assert url.startswith("postgresql+psycopg2://tuner@/tuner?host=/")
    assert tuner("studies", "--json", "--storage", url).json()[0]["study"] == "digits"
    assert tuner("db", "stop").code == 0
    assert tuner("db", "status", "--json").json()["running"] is False
    assert tuner("best", "digits", "--json").json()["study"] == "digits"
