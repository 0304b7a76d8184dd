"""What people have handed to tools of this kind, and what became of it: files, processes, paths and streams.

The inputs lie in tests/inputs, a folder for each.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import pytest
from command import Finished, Running

from storage import open_storage, parse_url

if TYPE_CHECKING:
    from command import Tuner

INPUTS = Path(__file__).parents[1] / "inputs"


def placed(tuner: Tuner, folder: str) -> Tuner:
    """The command line in a copy of the folder."""
    return replace(tuner, directory=Path(shutil.copytree(INPUTS / folder, tuner.directory / folder)))


@pytest.mark.parametrize(
    ("folder", "objective", "value"),
    [("13-loader-of-its-own", "squares.py:total", 55), ("14-names-of-ours", "tuner.py:objective", 1.5)],
)
def test_a_search_runs(tuner: Tuner, folder: str, objective: str, value: float) -> None:
    here = placed(tuner, folder)
    done = here("run", objective, "--trials", "1", "--workers", "1", "--max-failures", "0", "--json")
    assert done.code == 0, done.stderr
    assert done.json()["value"] == value


@pytest.mark.parametrize(
    ("folder", "objectives"),
    [
        ("15-arguments-at-import", ["script.py:objective"]),
        ("16-relative-import", ["parts/search.py:objective", "parts.search:objective"]),
    ],
)
def test_a_study_is_created_and_joined_by_its_other_name(tuner: Tuner, folder: str, objectives: list[str]) -> None:
    here = placed(tuner, folder)
    for objective in objectives:
        done = here("create", objective, "--direction", "minimize")
        assert (done.code, done.stderr) == (0, "")
        assert objectives[0].rpartition("/")[2] in done.stdout


@pytest.mark.parametrize(
    ("folder", "objective", "told"),
    [
        ("14-names-of-ours", "beside.py:objective", "beside.py, line 1: 'import storage' gives tuner's own package"),
        ("15-arguments-at-import", "needs.py:objective", "needs.py, line 5); on import it gets no arguments"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(tuner: Tuner, folder: str, objective: str, told: str) -> None:
    done = placed(tuner, folder)("create", objective)
    assert (done.code, done.stdout) == (1, "")
    assert told in done.error()


def test_paths_are_those_of_the_directory_in_which_the_command_was_started(tuner: Tuner, database: str) -> None:
    """Inputs 17 and 18: the data directory is made, and is one and the same wherever the objective goes."""
    here = replace(placed(tuner, "17-data-directory-missing"), environment={})
    secret = parse_url(database).password
    (here.directory / "password").write_text(secret or "none")
    (here.directory / "password").chmod(0o600)
    url = parse_url(database)._replace(password=None).render_as_string()
    given = ["--storage", url, "--data-dir", "new/data", "--storage-password-file", "password"]
    search = ["run", "downloads.py:Signs", "--trials", "1", "--workers", "1"]
    done = here(*given, *search, "--output", "model")
    assert done.code == 0, done.stderr
    assert {path.name for path in here.directory.iterdir()} >= {"new", "model"}
    assert (here.directory / "new" / "data" / "mirror.txt").exists()
    assert (here.directory / "model" / "manifest.json").exists()
    # The model goes below the data directory, which a machine that only exports has to make as well.
    given[3] = "another"
    done = here("export", "downloads", "--objective", "downloads.py:Signs", *given)
    assert done.code == 0, done.stderr
    (model,) = (here.directory / "another" / "models").glob("study-*")
    assert f"{model}\n" in done.stdout
    assert done.stdout.rstrip().endswith(f"--data-dir {here.directory / 'another'}")


def shell(tuner: Tuner, line: str, **environment: str) -> Finished:
    """Run a line of the shell, in which `tuner` is the command."""
    with started_by_shell(tuner, line, **environment) as process:
        stdout, stderr = process.communicate()
    return Finished(process.returncode, stdout, stderr)


def started_by_shell(tuner: Tuner, line: str, **environment: str) -> subprocess.Popen[str]:
    command = str(Path(sys.executable).with_name("tuner"))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TUNER_", "PG"))}
    return subprocess.Popen(
        ["bash", "-c", line.replace("tuner ", f"{command} ")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, **tuner.environment, **environment},
        cwd=tuner.directory,
    )


def test_streams_that_are_closed_full_or_in_ascii(tuner: Tuner) -> None:
    """Input 28: all that is lost is what cannot be written, and the exit code is the command's."""
    here = placed(tuner, "28-streams-and-terminals")
    search = "tuner run colours.py:objective --trials 1 --workers 1 --max-failures 0"
    done = shell(here, f"{search} <&- >&-", PYTHONIOENCODING="ascii")
    assert (done.code, done.stdout) == (0, ""), done.stderr
    assert "slot 0, trial 0: pr\\xfcft 0" in done.stderr
    done = shell(here, "tuner best colours; tuner best colours --json", PYTHONIOENCODING="ascii")
    assert (done.code, done.stderr) == (0, "")
    assert "stra\\xdfe = wei\\xdf" in done.stdout
    for closed in ("2>&-", "<&- >&- 2>&-"):
        done = shell(here, f"tuner best colours {closed}")
        assert (done.code, done.stderr) == (0, "")
        assert ("stra" in done.stdout) == (closed == "2>&-")
        assert shell(here, f"tuner nothing {closed}").code == 2
    assert shell(here, "tuner worker colours --objective colours.py:objective >&-").code == 0
    for full in (">/dev/full", "2>&1 | true; exit ${PIPESTATUS[0]}"):
        done = shell(here, f"tuner trials colours {full}")
        assert done.code == 1
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
    running = Running(started_by_shell(here, "exec tuner dashboard --port 0 <&- >&-"))
    with closing(running):
        running.wait_for_line("dashboard on http")
        running.process.send_signal(signal.SIGINT)
        assert running.finish().code == 0
    assert shell(here, "tuner status $'\\xff'").error().endswith("give text in UTF-8")


def test_a_log_that_is_a_file_tells_of_trials_now_and_then_and_of_what_fails_with_its_traceback(tuner: Tuner) -> None:
    here = placed(tuner, "28-streams-and-terminals")
    done = here("run", "long.py:objective", "--trials", "1", "--workers", "1", "--pruner", "none", "--debug")
    assert done.code == 0, done.stderr
    assert "slot 0, trial 0: about to fail" in done.stderr
    assert "slot 0, trial 0: Traceback (most recent call last):" in done.stderr
    file = here.directory / "long.py"
    assert f'slot 0, trial 0:   File "{file}", line 9, in fails' in done.stderr
    assert f"trial 0 fail: IndexError: list index out of range ({file}, line 9)" in done.stderr
    (told,) = re.findall(r"^trial 1, step (\d+): value (\S+) \(slot 0\)$", done.stderr, re.M)
    assert float(told[1]) == int(told[0]) / 4


MANY = "[" * 5000


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["create", "digits", "--set", f"max_units={MANY}"], 2, "input should be a valid integer"),
        (["create", "digits", "--sampler", f'tpe:{{"a": {MANY}'], 2, "settings of 'tpe' need to be JSON"),
        (["create", "digits", "--sampler", 'grid:{"search_space": {"lr": ["\\u0000"]}}'], 2, "0.03, log; got"),
        (["create", "digits", "--sampler", "grid:points=99999999999"], 2, "points to be a whole number in 1..1000"),
        (["create", "digits", "--trials", "9" * 30], 2, "--trials needs a whole number above 0 and at most 2147483647"),
        (["create", "digits", "--max-failures", "9" * 30], 2, "--max-failures needs a whole number from 0 to"),
        (["create", "digits", "--timeout", "9" * 400], 2, "--timeout needs a time of at most 10000 days"),
        (["create", "raises.py:Raises", "--sampler", "grid"], 2, "raises.py, line 11)"),
        (["create", "raises.py:Titled", "--set", 'title="\\ud800"'], 1, "the database refused it"),
        (["dashboard", "--host", "x" * 300], 2, "it is no name of a machine"),
    ],
    ids=lambda value: None if isinstance(value, int) else str(value[1:4])[:60],
)
def test_nothing_that_a_user_can_say_is_a_bug_in_tuner(
    tuner: Tuner, arguments: list[str], code: int, told: str
) -> None:
    done = placed(tuner, "05-nobody-has-thought-of")(*arguments)
    assert told in done.error()
    assert "bug" not in done.error()
    assert done.code == code


def test_an_objective_s_file_is_given_to_an_export_as_to_a_worker(tuner: Tuner, database: str) -> None:
    """A file of that name lies here, and is not taken because the database names it."""
    here = placed(tuner, "15-arguments-at-import")
    assert here("create", "script.py:objective").code == 0
    optuna.load_study(study_name="script", storage=open_storage(database)).optimize(lambda trial: 1.0, n_trials=1)
    refused = [here(command, "script") for command in ("export", "worker")]
    assert [done.code for done in refused] == [2, 2]
    assert refused[0].error() == refused[1].error()
    assert "give yours: --objective path/to/script.py:objective" in refused[0].error()
