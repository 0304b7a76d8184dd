"""What people have handed to tools of this kind, and what became of it: files, processes, paths and streams.

The inputs lie in tests/inputs, a folder for each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command import Finished

from storage import parse_url

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
        done = here("create", objective)
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
    (model,) = (here.directory / "another" / "models").iterdir()
    assert f"{model}\n" in done.stdout
    assert done.stdout.rstrip().endswith(f"--data-dir {here.directory / 'another'}")


def shell(tuner: Tuner, line: str, **environment: str) -> Finished:
    """Run a line of the shell, in which `tuner` is the command."""
    command = str(Path(sys.executable).with_name("tuner"))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TUNER_", "PG"))}
    done = subprocess.run(
        ["bash", "-c", line.replace("tuner ", f"{command} ")],
        capture_output=True,
        text=True,
        check=False,
        env={**clean, **tuner.environment, **environment},
        cwd=tuner.directory,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def test_streams_that_are_closed_full_or_in_ascii(tuner: Tuner) -> None:
    """Input 28: all that is lost is what cannot be written, and the exit code is the command's."""
    here = placed(tuner, "28-streams-and-terminals")
    search = "tuner run colours.py:objective --trials 1 --workers 1 --max-failures 0"
    done = shell(here, f"{search} <&- >&-", PYTHONIOENCODING="ascii")
    assert (done.code, done.stdout) == (0, ""), done.stderr
    assert "pr\\xfcft 0" in done.stderr
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
    done = shell(here, "timeout --preserve-status -s INT 8 tuner dashboard --port 0 <&- >&-")
    assert done.code == 0, done.stderr
    assert "dashboard on http" in done.stderr
    assert shell(here, "tuner status $'\\xff'").error().endswith("give text in UTF-8")
