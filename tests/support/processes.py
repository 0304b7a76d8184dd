"""The processes of a worker, as the kernel tells of them."""

from pathlib import Path


def children(pid: int) -> list[int]:
    """The processes that this one has started and not waited for."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def slots_of(worker: int) -> list[int]:
    """The processes of a worker's slots: those forked from its nursery, or its own where there is none."""
    started = children(worker)
    return [slot for nursery in started for slot in children(nursery)] or started


def all_of(worker: int) -> set[int]:
    """The processes of a worker, its own among them."""
    return {worker, *children(worker), *slots_of(worker)}
