"""How many of a machine's cores are ours: those that we may run on, as far as the limit of the container or of SLURM's
job goes, less what the other workers of this user have of them.

A worker keeps a file locked while it lives, its seat, which says how many slots it has at work and on which cores.
Seats are in the data directory, by the machine's name as others may share that, for containers with one volume; and in
the directory for temporary files, for workers with several data directories. Where neither can be written to, or
locked, workers do not know of one another.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from storage.files import new_file, open_lock, own_directory, require_own

VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""What users say it by, the first that is a number."""
WAITING: Final = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}
"""See `waiting`."""

_OWN_GROUPS: Final = Path("/proc/self/cgroup")
_GROUPS: Final = Path("/sys/fs/cgroup")
_SUFFIX: Final = ".seat"
_OF_OTHERS_S: Final = 7 * 86400.0


@dataclass(frozen=True, kw_only=True)
class _Allowed:
    """The cores that a process may run on; of their time it has no more than `limit` cores', with all of `group`."""

    cores: tuple[int, ...]
    limit: float = math.inf
    group: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Seated:
    slots: int
    cores: tuple[int, ...]
    group: str | None


class Seat:
    """A worker's seat on this machine, taken from when it is made until it is closed, or the process ends."""

    def __init__(self, worker: str, n_slots: int, data_dir: Path) -> None:
        """`worker` is a name that no other worker has."""
        allowed = _allowed()
        self._told = {"cores": allowed.cores, "group": allowed.group}
        self._taken: list[tuple[Path, int]] = []
        for place in _places(data_dir):
            path = place / f"{_machine()}.{worker}{_SUFFIX}"
            with suppress(OSError):  # a full disk, a file system without locks, a directory that is not ours
                self._taken.append((path, _locked(path, self._text(n_slots))))

    def tell(self, n_slots: int) -> None:
        """Have others see so many slots: those that have nothing to do leave their cores to them."""
        for _, descriptor in self._taken:
            with suppress(OSError):
                os.pwrite(descriptor, self._text(n_slots), 0)

    def close(self) -> None:
        """Leave the cores to the others."""
        while self._taken:
            path, descriptor = self._taken.pop()
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)

    def _text(self, n_slots: int) -> bytes:
        """Return what the file holds, of one length whatever the number of slots: it is written over at once."""
        return f'{{"slots": {n_slots:4}, {json.dumps(self._told)[1:]}'.encode()


def count() -> int:
    """Return how many cores there are for this process, whoever else uses them: at least one."""
    allowed = _allowed()
    return max(1, int(min(len(allowed.cores), allowed.limit)))


def named() -> int | None:
    """Return how many threads the environment wants, None if it does not say."""
    return next((found for name in VARIABLES if (found := number_of(os.environ.get(name, ""))) is not None), None)


def number_of(text: str) -> int | None:
    """Return the number that OpenMP reads in such a variable; None for none, which it passes over."""
    first = text.partition(",")[0].strip()  # the others are for threads of threads
    return int(first) if first.isascii() and first.isdecimal() and int(first) > 0 else None


def waiting() -> dict[str, str]:
    """Return the variables by which threads that wait for one another soon sleep; none if the environment says how.

    By libgomp's default they spin for some ms, on cores that others want: a step with two threads beside busy processes
    took 10 to 100 times as long as with one. Those that sleep at once must be woken for each operation: on a quiet
    machine an MLP's step took 3 to 4 times as long as with one. A few us of spinning, the second variable, take 1.3
    times there, and beside busy processes 2 to 3 times, asleep 1.5 to 2 (2 cores, torch 2.14, 2026-11). The first alone
    is for other libraries of OpenMP. To be set before torch is imported.
    """
    return {} if WAITING.keys() & os.environ.keys() else dict(WAITING)


def share(worker: str, n_slots: int, data_dir: Path, *, counts_idle: bool = False) -> int:
    """Return for how many threads each of a worker's slots has cores now, beside all workers that there are.

    Of its `n_slots` those count that its seat tells of, or all if it `counts_idle` ones.
    """
    ours, seats = _allowed(), _seats(data_dir)
    others = [seated for name, seated in seats.items() if name != worker]
    if worker in seats and not counts_idle:
        n_slots = min(n_slots, seats[worker].slots)
    on = Counter(dict.fromkeys(ours.cores, 0))
    for other in others:
        on.update(dict.fromkeys(other.cores, other.slots))
    part = sum(1 / (n_slots + on[core]) for core in ours.cores)
    in_group = n_slots + sum(other.slots for other in others if other.group == ours.group)
    return max(1, int(min(part, ours.limit / in_group) + 1e-6))  # three thirds may be a little less than one


def _seats(data_dir: Path) -> dict[str, _Seated]:
    """Return the workers of this machine by their names, and remove the seats of those that are gone.

    Another machine's stay for some days, as not every file system of a network tells here what is locked there.
    """
    found = {}
    for place in _places(data_dir):
        for path in _files(place):
            machine, _, worker = path.name.removesuffix(_SUFFIX).partition(".")
            is_here = machine == _machine()
            with suppress(OSError, ValueError, KeyError, TypeError):  # it has just gone; or is no seat
                if not is_here and time.time() - path.stat().st_mtime < _OF_OTHERS_S:
                    continue
                if not _is_taken(path):
                    path.unlink()
                elif is_here and worker not in found:
                    told = json.loads(path.read_bytes())
                    found[worker] = _Seated(slots=told["slots"], cores=tuple(told["cores"]), group=told["group"])
    return found


def _files(place: Path) -> list[Path]:
    with suppress(OSError):
        require_own(place)
        return [path for path in place.iterdir() if path.name.endswith(_SUFFIX)]
    return []


def _locked(path: Path, told: bytes) -> int:
    """Make a file that is locked from when others see it, and return its descriptor. Raises OSError."""
    own_directory(path.parent)
    aside = path.with_suffix(".new")
    descriptor = new_file(aside)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, told)
        aside.rename(path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        os.close(descriptor)
        raise
    return descriptor


def _is_taken(path: Path) -> bool:
    descriptor = open_lock(path, create=False)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _places(data_dir: Path) -> Iterator[Path]:
    yield data_dir / "cores"
    with suppress(FileNotFoundError):  # there is no directory for temporary files
        yield Path(tempfile.gettempdir(), f"tuner-cores-{os.geteuid()}")


@cache
def _machine() -> str:
    """Return what the containers of a machine have in common, and no other machine has."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname().replace(".", "-")


def _allowed() -> _Allowed:
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cores = tuple(sorted(affinity(0))) if affinity is not None else tuple(range(os.cpu_count() or 1))
    limits = [(limit, group) for group in _groups() if (limit := _limit(group)) is not None]
    found = []
    if limits:
        limit, group = min(limits)
        at = group.stat()  # the same group has other names in other containers
        found.append((limit, f"{at.st_dev}:{at.st_ino}"))
    # Not every cluster holds its jobs to what it gave them of a node.
    given = number_of(os.environ.get("SLURM_CPUS_ON_NODE", ""))
    if given is not None:
        found.append((given, f"slurm {os.environ.get('SLURM_JOB_ID')}"))
    if not found:
        return _Allowed(cores=cores)
    least, shared = min(found)
    return _Allowed(cores=cores, limit=least, group=shared)


def _groups() -> Iterator[Path]:
    """Return the control groups of this process, and those that they are in, as far as they can be seen from here."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:  # not on Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in (_GROUPS, _GROUPS / "unified") if not controllers else (_GROUPS / "cpu", _GROUPS / controllers):
            inner = root if ".." in path else root / path.lstrip("/")
            # The path may be the machine's, and the root what this container sees of it.
            yield from {root, *(place for place in (inner, *inner.parents) if place.is_relative_to(root))}


def _limit(group: Path) -> float | None:
    """Return how many cores' time a control group has at most, None without a limit."""
    with suppress(OSError, ValueError):
        most, period = (group / "cpu.max").read_text().split()
        return None if most == "max" else int(most) / int(period)
    with suppress(OSError, ValueError):
        most_us = int((group / "cpu.cfs_quota_us").read_text())
        return None if most_us <= 0 else most_us / int((group / "cpu.cfs_period_us").read_text())
    return None
