"""What people have handed to tools of this kind, and what became of it: files, processes, paths and streams.

The inputs lie in tests/inputs, a folder for each.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

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
