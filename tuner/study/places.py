"""Where in the user's own code something was raised."""

from __future__ import annotations

import site
import sysconfig
import traceback
from functools import cache
from pathlib import Path

import storage


def own_place(error: BaseException, objective: str) -> tuple[str, int] | None:
    """Return file and line of the deepest frame of the user's own files that the error passed, if it passed any.

    `objective` is the objective's file. Its neighbours are the user's own too, and so is all that is neither of
    Python, nor installed, nor tuner's.
    """
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [place for place in frames if _is_own(place[0], objective)]
    return own[-1] if own else None


def last_place(error: BaseException) -> tuple[str, int]:
    """Return file and line that raised the error."""
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    return frame.f_code.co_filename, line


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
