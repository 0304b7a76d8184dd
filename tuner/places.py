"""Where in a user's own files something happened, among the frames of torch, of Python and of tuner."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterable
from functools import cache
from pathlib import Path


def own_place(frames: Iterable[traceback.FrameSummary]) -> str | None:
    """Return file and line of the deepest frame that is the user's; None if none is.

    Packages that were installed count where no file of the user's own is among the frames; torch's never do.
    """
    installed = None
    for frame in reversed(list(frames)):
        kind = kind_of(frame.filename)
        if kind == "own":
            return f"{frame.filename}, line {frame.lineno}"
        if kind == "installed" and installed is None:
            installed = f"{frame.filename}, line {frame.lineno}"
    return installed


def place_of(error: BaseException) -> str | None:
    """Return where in the user's files the error passed last, None if it passed none."""
    return own_place(traceback.extract_tb(error.__traceback__))


_PACKAGES = ("/site-packages/", "/dist-packages/")  # those of the user and of the system as well


@cache
def kind_of(file: str) -> str:
    """Return whose a file of code is: `own`, `installed`, `ours` or `python`."""
    if file.startswith("<") or not Path(file).is_absolute():
        return "python"
    installed, ours, python = _places()
    if any(file.startswith(place) for place in ours):
        return "ours"
    if any(file.startswith(place) for place in installed) or any(name in file for name in _PACKAGES):
        return "installed"
    return "python" if any(file.startswith(place) for place in python) else "own"


@cache
def _places() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the directories of installed packages, those whose frames never count, and Python's own."""
    paths = sysconfig.get_paths()
    installed = tuple({f"{paths[name]}/" for name in ("purelib", "platlib")})
    here = Path(__file__).parents[1]
    ours = (f"{here}/tuner/", f"{here}/storage/", *(f"{place}torch/" for place in installed))
    return installed, ours, tuple({f"{paths[name]}/" for name in ("stdlib", "platstdlib")})
