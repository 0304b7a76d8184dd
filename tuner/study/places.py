"""Where in the user's own code something was raised."""

from __future__ import annotations

import re
import site
import sysconfig
import traceback
from functools import cache
from pathlib import Path
from typing import TypeAlias

import storage

Place: TypeAlias = tuple[str, int]
"""A file and a line of it."""
_FRAME = re.compile(r'^ *File "(.+)", line (\d+)', re.M)


def own_place(error: BaseException, objective: str) -> Place | None:
    """Return the deepest line of the user's own files that the error passed, if it passed any.

    `objective` is the objective's file. Its neighbours are the user's own too, and so is all that is neither of
    Python, nor installed, nor tuner's. What a process of a DataLoader raised is among it.
    """
    there = [(file, int(line)) for file, line in _FRAME.findall(str(error))] if original(error) else []
    own = [place for place in [*_places(error), *there] if _is_own(place[0], objective)]
    return own[-1] if own else None


def last_place(error: BaseException) -> Place:
    """Return the line that raised the error."""
    return _places(error)[-1]


def original(error: BaseException) -> str | None:
    """Return the last line of what a process of torch's DataLoader raised, None for another error.

    It comes with its traceback as text, after a line that says no more than that there was one.
    """
    text = str(error)
    is_of_another = text.startswith("Caught ") and "\nOriginal Traceback" in text
    return text.strip().rpartition("\n")[2] if is_of_another else None


def _places(error: BaseException) -> list[Place]:
    return [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]


def _is_own(file: str, objective: str) -> bool:
    if file == objective:
        return True
    if file.startswith("<"):  # such as the import system's
        return False
    folder = Path(file).parent
    if folder == Path(objective).parent:
        return folder not in _installed()
    return not any(place in folder.parents or place == folder for place in _others())


@cache
def _installed() -> frozenset[Path]:
    """Return the directories that packages are installed in."""
    paths = sysconfig.get_paths()
    return frozenset(map(Path, (paths["purelib"], paths["platlib"], site.getusersitepackages())))


@cache
def _others() -> frozenset[Path]:
    """Return the directories of what others have written, in which the user's own may be installed as well."""
    paths = sysconfig.get_paths()
    of_python = map(Path, (paths["stdlib"], paths["platstdlib"]))
    return _installed() | {*of_python, Path(__file__).parents[1], Path(storage.__file__).parent}
