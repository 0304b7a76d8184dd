"""What people have handed to tools of this kind, and what became of it: files, processes, paths and streams.

The inputs lie in tests/inputs, a folder for each.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

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
