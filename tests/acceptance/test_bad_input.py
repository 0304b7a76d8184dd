"""Whatever is wrong with a command: one line that says what was wanted, found and to be done, and its exit code."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from storage import parse_url

if TYPE_CHECKING:
    from command import Tuner

SYNTAX_ERROR = "def objective(trial:\n    return 1\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["status", "nope"], 1, "no study named 'nope'"),
        (["best", "nope"], 1, "'tuner studies' lists them"),
        (["worker", "nope"], 1, "no study named 'nope'"),
        (["export", "nope"], 1, "no study named 'nope'"),
        (["run", "nope"], 1, "no objective named 'nope' is installed; there are: california_housing, "),
        (["run", "nope.py:objective"], 1, "no file nope.py"),
        (["run", "nope.py"], 2, "say nope.py:NAME"),
        (["run", "digits", "--trials", "0"], 2, "--trials needs a whole number above 0, got 0"),
        (["run", "digits", "--trials", "-3"], 2, "--trials needs a whole number above 0, got -3"),
        (["run", "digits", "--trials", "many"], 2, "Invalid value for '--trials'"),
        (["run", "digits", "--epochs", "0"], 2, "--epochs needs a whole number above 0"),
        (["run", "digits", "--workers", "0"], 2, "--workers needs a whole number above 0"),
        (["run", "digits", "--timeout", "soon"], 2, "--timeout needs a time above 0 such as 90s"),
        (["run", "digits", "--seed", "-1"], 2, "--seed needs a whole number from 0"),
        (["run", "digits", "--sampler", "best"], 2, "--sampler needs one of tpe, random, gp, cmaes, qmc, grid"),
        (["run", "digits", "--pruner", "median:n_startup=1"], 2, "--pruner median has no setting 'n_startup'"),
        (["run", "digits", "--set", "depth=2"], 2, "Digits has no option 'depth'; it has: max_layers, max_units"),
        (["run", "digits", "--set", "max_units=wide"], 2, "max_units: input should be a valid integer"),
        (["run", "digits", "--set", "max_units"], 2, "--set needs KEY=VALUE"),
        (["run", "digits", "--patience", "0"], 2, "--patience needs a whole number above 0, got 0"),
        (["create", "digits", "--precision", "fp8"], 2, "--precision needs fp32, tf32, bf16 or fp16, got 'fp8'"),
        (["run", "digits", "--data", "disk"], 2, "--data needs auto, resident or stream, got 'disk'"),
        (["run", "digits", "--nope"], 2, "No such option: --nope"),
        (["run", "digits", "--sampler", "gp:n_startup_trials=abc"], 2, "n_startup_trials needs to be int, got 'abc'"),
        (["run", "digits", "--study", ""], 2, "a study's name needs 1 to 512 characters"),
        (["nope"], 2, "No such command 'nope'"),
        (["run"], 2, "Missing argument"),
        (["best", "digits", "--format", "yaml"], 2, "--format needs text, json, env or flags, got 'yaml'"),
        (["studies", "--log-format", "xml"], 2, "--log-format needs text or json, got 'xml'"),
        (["studies", "--storage", "postgresql//host"], 2, "postgresql://user@host/database"),
        (["studies", "--storage", "sqlite:///x.db"], 2, "tuner stores studies in PostgreSQL only"),
        (["studies", "--storage", "postgresql://u@h:port/d"], 2, "postgresql://user@host/database"),
        (["dashboard", "--host", "0.0.0.0", "--port", "0"], 2, "token"),
        (["dashboard", "--port", "70000"], 2, "less than or equal to 65535"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_one_line_and_the_right_exit_code(tuner: Tuner, arguments: list[str], code: int, said: str) -> None:
    done = tuner(*arguments)
    assert said in done.error()
    assert done.code == code
    assert done.stdout == ""


def test_a_study_that_was_not_created_by_a_bad_command_does_not_exist(tuner: Tuner) -> None:
    assert tuner("run", "digits", "--set", "depth=2").code == 2
    assert tuner("studies", "--json").json() == []


def test_best_of_a_study_without_a_complete_trial(tuner: Tuner) -> None:
    assert tuner("create", "digits").code == 0
    done = tuner("best", "digits")
    assert done.code == 1
    assert "study 'digits' has no complete trial yet" in done.error()
    done = tuner("export", "digits")
    assert done.code == 1
    assert "study 'digits' has no complete trial yet" in done.error()


def test_no_server_is_exit_code_3(tuner: Tuner) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = tuner("studies", "--storage", f"postgresql://tuner@127.0.0.1:{port}/tuner")
    assert done.code == 3
    assert f"127.0.0.1:{port}" in done.error()


def test_a_role_that_may_not_connect_is_exit_code_4_and_its_password_is_not_repeated(
    tuner: Tuner, database: str
) -> None:
    url = parse_url(database).set(username="stranger", password="hunter2")
    done = tuner("studies", TUNER_STORAGE=url.render_as_string(hide_password=False))
    assert done.code == 4
    assert "hunter2" not in done.stderr
    assert "stranger" in done.error()


def test_a_file_with_a_syntax_error_is_named_with_its_line(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(SYNTAX_ERROR)
    done = tuner("run", "broken.py:objective")
    assert done.code == 1
    assert "broken.py, line 1" in done.error()


def test_a_file_that_cannot_be_imported_says_where(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = 1\nimport does_not_exist\n")
    done = tuner("run", "broken.py:objective")
    assert done.code == 1
    assert "ModuleNotFoundError: No module named 'does_not_exist'" in done.error()
    assert "line 2" in done.error()


def test_a_name_that_the_file_lacks_shows_those_it_has(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "fine.py").write_text("def objective(trial):\n    return 1.0\n")
    done = tuner("run", "fine.py:objectiv")
    assert done.code == 1
    assert "it defines: objective" in done.error()


def test_an_output_that_is_a_file_is_refused_before_the_search(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    done = tuner("run", "digits", "--output", "taken")
    assert done.code == 1
    assert "taken is a file; choose another --output" in done.error()
    assert (tmp_path / "taken").read_text() == "mine"
    assert tuner("studies", "--json").json() == []


def test_an_output_that_cannot_be_written_is_refused_before_the_search(tuner: Tuner) -> None:
    done = tuner("run", "digits", "--output", "/proc/model")
    assert done.code == 1
    assert "cannot write to /proc" in done.error()


def test_a_port_in_use_is_named(tuner: Tuner) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = tuner("dashboard", "--port", str(port))
    assert done.code == 1
    assert str(port) in done.error()
    assert "--port" in done.error()


def test_debug_shows_the_traceback(tuner: Tuner) -> None:
    done = tuner("status", "nope", "--debug")
    assert done.code == 1
    assert "Traceback" in done.stderr
    assert "StudyNotFoundError" in done.stderr


@pytest.mark.parametrize("code", ["import sys\nsys.exit()\n", "raise SystemExit(0)\n"])
def test_a_file_that_exits_when_imported_is_an_error(tuner: Tuner, tmp_path: Path, code: str) -> None:
    (tmp_path / "exits.py").write_text(code)
    done = tuner("create", "exits.py:objective")
    assert done.code == 1
    assert "cannot import" in done.error()


def test_an_objective_without_its_methods_is_told_which(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text("from tuner import Objective\nclass Half(Objective):\n    pass\n")
    done = tuner("create", "half.py:Half")
    assert done.code == 1
    assert "Half needs the methods build_model, load_data, suggest" in done.error()


def test_errors_are_json_where_logs_are(tuner: Tuner) -> None:
    done = tuner("status", "nope", "--log-format", "json")
    assert done.code == 1
    line = json.loads(done.stderr)
    assert (line["event"], line["exit_code"]) == ("failed", 1)
    assert "no study named 'nope'" in line["message"]


@pytest.mark.parametrize("command", [[], ["db"]])
def test_tuner_alone_shows_its_help(tuner: Tuner, command: list[str]) -> None:
    done = tuner(*command)
    assert "Usage:" in done.stdout
    assert done.stderr == ""


def test_options_have_variables_and_the_command_line_wins(tuner: Tuner) -> None:
    assert tuner("create", "digits", TUNER_CREATE_TRIALS="7", TUNER_CREATE_SET="max_units=99").code == 0
    assert tuner("status", "digits", "--json").json()["budget"]["trials"] == 7
    assert tuner("studies", TUNER_STUDIES_JSON="1", TUNER_VERSION="1.2.3").json()[0]["study"] == "digits"
    assert tuner("best", "digits", TUNER_BEST_FORMAT="yaml").code == 2
    elsewhere = tuner("--storage", tuner.environment["TUNER_STORAGE"], "studies", "--json", TUNER_STORAGE="sqlite://")
    assert elsewhere.json()[0]["study"] == "digits"


def test_names_from_the_database_cannot_drive_the_terminal(tuner: Tuner) -> None:
    assert tuner("create", "digits", "--study", "a\x1b[2Jb\nc").code == 0
    assert "a\\x1b[2Jb\\nc" in tuner("studies").stdout
    assert tuner("status", "a\x1b[2Jb\nc").code == 0


def test_each_option_of_training_is_kept_in_the_spec(tuner: Tuner) -> None:
    flags = ["--precision", "bf16", "--compile", "--cuda-graphs", "--deterministic", "--train-metrics"]
    flags += ["--compile-mode", "max-autotune"]
    done = tuner("create", "digits", *flags, "--patience", "3", "--data", "stream", "--json")
    assert done.json()["spec"]["training"] == {
        "precision": "bf16",
        "compile": True,
        "compile_mode": "max-autotune",
        "cuda_graphs": True,
        "deterministic": True,
        "patience": 3,
        "data": "stream",
        "readers": None,
        "prefetch": None,
        "train_metrics": True,
    }
