"""Making sure of a study: it is created, joined, or replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tuner.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from tuner.log import Log
    from tuner.study.joining import Study, Wanted


def make_sure(
    engine: Engine,
    settings: Settings,
    name: str,
    wanted: Wanted,
    *,
    again: str,
    allow_code_change: bool | None = None,
    with_direction: Callable[[Wanted], Wanted],
) -> tuple[Study, bool]:
    """Return the study of that name and whether it was created now; tell in a line of one that this replaced.

    `again` is the command that joins it as it is. `with_direction` has the direction of a plain function decided if
    the study is a new one.
    """
    from storage import StudyNotFoundError
    from tuner.slot.shared_checkpoints import delete_checkpoints
    from tuner.study.joining import create_or_join, find_study

    try:
        find_study(engine, name)
    except StudyNotFoundError:
        wanted = with_direction(wanted)
    notes: list[str] = []
    joined = create_or_join(
        engine,
        name,
        wanted,
        command=again,
        allow_code_change=allow_code_change,
        history=_history(engine, wanted, notes),
    )
    for note in notes if joined.created else []:
        settings.log().event("history", note)
    if joined.replaced is not None:
        why = f": {joined.why}" if joined.why else ""
        log = settings.log(study=name)
        log.event("replaced", f"study {name}, of which nothing was complete, is deleted and created anew{why}")
        for line in delete_checkpoints(joined.replaced, settings.data_dir):
            log.event("note", line)
    return joined.study, joined.created


def _history(engine: Engine, wanted: Wanted, notes: list[str]) -> Callable[[], list[dict[str, Any]] | None]:
    """Return what reads the trials that a new study is to learn from, None without any, and notes what to tell."""

    def read() -> list[dict[str, Any]] | None:
        from tuner.study.history import history_of

        name = wanted.spec.history
        if name is None:
            return None
        found = history_of(engine, name, wanted.spec, wanted.objective)
        notes[:] = found.notes
        return found.trials

    return read


def tell_random_start(log: Log, study: Study) -> None:
    from tuner.study.sampling import random_start

    spec = study.spec
    if spec.sampler.name == "tpe" and (drawn := random_start(spec.sampler)) >= spec.budget.trials:
        log.event(
            "random_start",
            f"all {spec.budget.trials} trials are drawn at random, as tpe looks at others only after {drawn} of them:"
            " more --trials, or --sampler tpe:n_startup_trials=N with a smaller one, would search",
        )


def outline(study: Study) -> str:
    spec = study.spec
    return (
        f"objective {spec.objective.name}, {spec.direction} {spec.metric}, {spec.budget.trials} trials,"
        f" sampler {spec.sampler.name}, pruner {spec.pruner.name}, seed {spec.seed}"
    )
