"""The processes of a worker, as the kernel tells of them."""

from __future__ import annotations

import os
from pathlib import Path


def children(pid: int) -> list[int]:
    """The processes that this one has started and not waited for."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def forks() -> list[int]:
    """The processes that this one's main thread has forked and that have not ended, and not those it has started."""
    own = Path("/proc/self/cmdline").read_bytes()
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    running = [child for child in children(os.getpid()) if os.waitid(os.P_PID, child, look) is None]
    # One that is about to end has no memory left to tell it from.
    return [child for child in running if Path(f"/proc/{child}/cmdline").read_bytes() in (own, b"")]


def slots_of(worker: int) -> list[int]:
    """The processes of a worker's slots: those forked from its nursery, or its own where there is none."""
    started = children(worker)
    return [slot for nursery in started for slot in children(nursery)] or started


def all_of(worker: int) -> set[int]:
    """The processes of a worker, its own among them."""
    return {worker, *children(worker), *slots_of(worker)}
