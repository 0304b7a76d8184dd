"""What the engines have in common: jobs that are asked for by a study's label, and who of them is here."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from tuner.errors import TunerError
from tuner.placement import Placement

if TYPE_CHECKING:
    from storage.coordination.workers import WorkerNow

ENGINES: Final = {
    "slurm": "tuner.launch.slurm",
    "ray": "tuner.launch.ray_cluster",
    "k8s": "tuner.launch.kubernetes",
}
"""The module of each: its function `engine()` returns the engine, or raises NoEngineError where there is none."""

EVERY_S: Final = 15.0
"""How often an engine is asked while a study is watched: its controller has others to answer as well."""


class NoEngineError(TunerError):
    """The engine is not here; the message says what is missing and how to get it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an engine says of workers that it was asked for: of one, or of some that are all in one state.

    `state` is the engine's own word, `wanted` how many workers they are, `running` how many of these run; `detail` is
    where, or why not.
    """

    engine: str
    id: str
    state: str
    wanted: int
    running: int
    detail: str


class Engine(Protocol):
    """One engine, reached from here. Studies are known to it by their label: `tuner.launch.command.label`."""

    @property
    def name(self) -> str:
        """Its key in `ENGINES`."""

    def jobs(self, label: str) -> list[Job]:
        """Return the jobs of a study that the engine knows of. Raises TunerError if it does not answer."""

    def stop(self, label: str) -> list[Job]:
        """End the jobs of a study, whose workers give their trials back, and return what was told to end."""

    def states(self, placements: Collection[Placement]) -> Mapping[Placement, str]:
        """Return what the engine says now of what it has placed; those that it does not know are left out."""


def engines_here(reasons: list[str] | None = None) -> Iterator[Engine]:
    """Yield the engines that are here, and add to `reasons` why the others are not."""
    for name in ENGINES:
        try:
            yield _engine(name)
        except NoEngineError as error:
            if reasons is not None:
                reasons.append(str(error))


class Words:
    """What engines say of workers, each asked no more often than every `EVERY_S`."""

    def __init__(self) -> None:
        self._asked_at = -math.inf
        self._states: dict[Placement, str] = {}

    def added(self, workers: Sequence[WorkerNow]) -> list[WorkerNow]:
        """Return the workers with the `state` of those that were placed in their `placement`, None if nobody says."""
        placed = {worker.name: Placement.of_fields(worker.placement) for worker in workers if worker.placement}
        if placed and time.monotonic() >= self._asked_at + EVERY_S:
            self._states = _states(set(placed.values()))
            self._asked_at = time.monotonic()
        return [
            replace(worker, placement={**worker.placement, "state": self._states.get(placed[worker.name])})
            if worker.placement
            else worker
            for worker in workers
        ]


def _states(placements: Collection[Placement]) -> dict[Placement, str]:
    """Return what their engines say now, as far as these are here, answer and know them."""
    found: dict[Placement, str] = {}
    for name in {each.engine for each in placements} & ENGINES.keys():
        with suppress(TunerError):
            found |= _engine(name).states([each for each in placements if each.engine == name])
    return found


def imported(name: str) -> Any:
    """Return the engine's module; none is imported before it is asked for. Raises NoEngineError."""
    try:
        return importlib.import_module(ENGINES[name])
    except ModuleNotFoundError as error:
        extra = f"; pip install 'tuner[{name}]'" if error.name == name else ""
        raise NoEngineError(f"no {name} here: Python has no module {error.name!r}{extra}") from error


def _engine(name: str) -> Engine:
    engine: Engine = imported(name).engine()
    return engine
