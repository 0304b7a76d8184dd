"""Processes that are forked from this one, which may have threads, and that end with it."""

from __future__ import annotations

import os
import signal
import warnings
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def fork() -> int:
    """Fork as `os.fork` does, without its warning of threads."""
    with warnings.catch_warnings():
        # Python counts threads of libraries that end and begin with a fork, as those of OpenBLAS.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        return os.fork()


def end_with(parent: int | None) -> None:
    """Have the kernel kill this process when the thread that forked it ends, in whatever hangs here; None: no longer.

    `parent` is that thread's process. Where the kernel refuses, nothing is different.
    """
    import ctypes

    number = signal.SIGKILL if parent is not None else 0
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, *map(ctypes.c_ulong, (number, 0, 0, 0)))
    if parent is not None and os.getppid() != parent:  # it ended before that was said
        os._exit(1)
