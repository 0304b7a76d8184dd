"""Where the threads of a slot's processes are, written when asked from outside: what hangs may let no thread run."""

from __future__ import annotations

import faulthandler
import os
import signal
from contextlib import suppress
from pathlib import Path

_NAME = "tuner-stacks"


def write_on_request() -> None:
    """Have this process, and each that it forks, as for reading samples, write its stacks at SIGQUIT."""
    _write_on_request()
    os.register_at_fork(after_in_child=_write_on_request)


def request(group: int) -> list[Path]:
    """Ask all processes of a group, by its number, that would write their stacks; return where each writes them.

    Off Linux only the leader is asked, which writes to its stderr.
    """
    if not hasattr(os, "memfd_create"):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(group, signal.SIGQUIT)
        return []
    asked = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended since
            if os.getpgid(int(process.name)) == group and (file := _file_of(process)) is not None:
                os.kill(int(process.name), signal.SIGQUIT)
                asked.append(file)
    return asked


def _file_of(process: Path) -> Path | None:
    """Return where a process writes its stacks; None if it would not, and the signal would end it."""
    for file in (process / "fd").iterdir():
        with suppress(OSError):  # it was closed since
            if _NAME in os.readlink(file):
                return file
    return None


def _write_on_request() -> None:
    # To a file of its own in memory, as stacks are written in pieces, which those of other processes would mix with;
    # and as an objective may close stderr.
    number = os.memfd_create(_NAME) if hasattr(os, "memfd_create") else os.dup(2)
    faulthandler.register(signal.SIGQUIT, file=os.fdopen(number, "w"), all_threads=True)
