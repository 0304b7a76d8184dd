"""The data of an objective, loaded once by the process that slots are then forked from, whose memory they share."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from tuner.forks import fork
from tuner.spec import Spec, TrainingSpec

if TYPE_CHECKING:
    from tuner.data import Data
    from tuner.objective import Objective
    from tuner.study.registry import FunctionObjective


class DataSource(BaseModel):
    """What a study's data come from: equal ones give the same data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: str
    options: dict[str, Any]
    seed: int
    training: TrainingSpec
    data_dir: Path

    @classmethod
    def of(cls, spec: Spec, objective: str, data_dir: Path) -> DataSource:
        """Return that of a study, whose objective is found here by that name."""
        options, seed, training = spec.objective.options, spec.seed, spec.training
        return cls(objective=objective, options=options, seed=seed, training=training, data_dir=data_dir)


_FORKABLE = {"jemalloc_bg_thd"}
"""Threads that begin anew in a process that is forked, by their names. OpenBLAS's end with each fork."""

_loaded: list[tuple[DataSource, Objective, Data]] = []


def load(source: DataSource) -> str | None:
    """Load the data into this process, with one thread, as a process that is forked would lack the others.

    Returns why such a process could not use them; None if it can. Raises TunerError if there are none.
    """
    import torch

    from tuner.errors import TunerError
    from tuner.objective import Objective
    from tuner.seeds import set_deterministic
    from tuner.slot.attempt import load_data

    objective = _built(source)
    if not isinstance(objective, Objective):
        raise TunerError("a plain function loads its data itself")
    n_threads, opened = torch.get_num_threads(), _descriptors()
    torch.set_num_threads(1)
    set_deterministic(source.training.deterministic)
    data = load_data(objective, source.data_dir, source.training)
    torch.set_num_threads(n_threads)
    _loaded.append((source, objective, data))
    if _are_open(_descriptors() - opened):
        return "they keep files open, in which processes would share a place"
    if _keeps_threads():
        return "loading them starts threads, which a process that is forked would lack"
    return None


def with_data(spec: Spec, objective: str, data_dir: Path) -> tuple[Objective | FunctionObjective, Data | None]:
    """Return a study's objective, with its data if the process that this one was forked from has loaded them.

    Raises TunerError if it cannot be imported or made.
    """
    source = DataSource.of(spec, objective, data_dir)
    found = next(((made, data) for its, made, data in _loaded if its == source), None)
    return found or (_built(source), None)


def _built(source: DataSource) -> Objective | FunctionObjective:
    from tuner.study.registry import build_objective, find_objective, is_objective_class

    kind = find_objective(source.objective).load()
    return build_objective(kind, source.options, source.seed) if is_objective_class(kind) else kind


def _descriptors() -> set[tuple[str, str]]:
    """Return the descriptors that are open, and what each is of."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.add((descriptor.name, os.readlink(descriptor)))
        except FileNotFoundError:  # the one that lists them
            continue
    return found


def _are_open(descriptors: Iterable[tuple[str, str]]) -> bool:
    """Whether any is more than what keeps a file in memory to be read, as `numpy.memmap` does, one for each time.

    One that is written to in memory may hold what is of one process, such as LMDB's locks.
    """
    opened = Counter(name for _, name in descriptors)
    mapped = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    read = Counter(name for _, how, *_, name in mapped if how != "rw-s")
    written = {name for _, how, *_, name in mapped if how == "rw-s"}
    return any(name in written or number > read[name] for name, number in opened.items())


def _keeps_threads() -> bool:
    """Whether there are threads of libraries that neither end with a fork nor begin anew after it."""
    forked = fork()
    if not forked:
        os._exit(0)
    os.waitpid(forked, 0)
    names = {int(task.name): (task / "comm").read_text().rstrip("\n") for task in Path("/proc/self/task").iterdir()}
    del names[os.getpid()]
    return bool(set(names.values()) - _FORKABLE)
