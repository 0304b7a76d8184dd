"""The end of a slot's process, whatever its trial does."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from typing import NoReturn

from tuner.exits import ExitCode

LAST_S = 10.0
"""How long a slot takes at most to end once it was to stop, should its worker be gone, which would have killed it."""


def exit_again(worker: int) -> NoReturn:
    """End this process at once, to go on in a new one: to free what is left on a device that failed could abort it."""
    if os.getppid() != worker:
        end_group()
    with suppress(OSError, ValueError, AttributeError):  # nobody reads it, or the objective did away with it
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(ExitCode.AGAIN)


def end_in_time(stop: threading.Event) -> None:
    """End this process, whatever its trial does, if it was to stop and nobody has ended it by then."""
    stop.wait()
    threading.Event().wait(LAST_S)
    end_group()


def end_group() -> None:
    """End this process and all that it started at once, as its worker does for one that has ended."""
    with suppress(ProcessLookupError):  # started by hand, and in the group of somebody else
        os.killpg(os.getpid(), signal.SIGKILL)
