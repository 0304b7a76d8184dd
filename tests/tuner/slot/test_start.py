"""The process of a slot before it is configured."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tuner.imports import quick_imports

if TYPE_CHECKING:
    from pathlib import Path

PRINTS = """
import os

print("imported by Python")
os.system("echo imported by a program")

def objective(trial):
    return 0.0
"""


def started(file: Path) -> subprocess.CompletedProcess[str]:
    """A slot whose worker ends before it says what to run."""
    command = [sys.executable, "-m", "tuner.slot.start", f"{file}:objective"]
    return subprocess.run(command, input="", capture_output=True, text=True, check=False, cwd=file.parent)


@pytest.mark.slow
def test_the_objective_is_imported_before_the_slot_is_configured_and_prints_to_stderr(tmp_path: Path) -> None:
    file = tmp_path / "prints.py"
    file.write_text(PRINTS)
    done = started(file)
    assert (done.returncode, done.stdout) == (0, "")
    assert sorted(done.stderr.splitlines()) == ["imported by Python", "imported by a program"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["sys.stdout = open('log.txt', 'w')", "sys.stdout.close()", "sys.stdout = None"])
def test_an_objective_may_do_away_with_its_standard_output(tmp_path: Path, text: str) -> None:
    file = tmp_path / "quiet.py"
    file.write_text(f"import os, sys\n{text}\ndef objective(trial): return 0.0\nos.write(2, b'imported')\n")
    done = started(file)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "imported")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["import does_not_exist", "raise SystemExit(3)", "objective = 1", None])
def test_an_objective_that_cannot_be_imported_is_left_for_later_to_say(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "broken.py"
    if text is not None:
        file.write_text(text)
    done = started(file)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_garbage_is_collected_again_after_importing() -> None:
    with quick_imports():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert not any(each is made for each in gc.get_objects())  # it is looked at no more, also when the process ends
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
