"""Raising the budget of a study, the one part of its spec that may change after its creation."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tuner.errors import UsageError
from tuner.spec import Budget, Spec
from tuner.text import duration

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from storage.coordination.standings import NothingToClaim, Standing
    from tuner.study.joining import Study

_MOST: Final = 2**31 - 1  # PostgreSQL's largest number of a trial


@dataclass(frozen=True, kw_only=True)
class Amount:
    """What a limit is raised by, `+20` on the command line, or unless `is_more`, what it is raised to."""

    value: float
    is_more: bool


@dataclass(frozen=True, kw_only=True)
class Extended:
    """A study's budget before and now, and why no trial is handed out all the same, if none is."""

    before: Budget
    budget: Budget
    running: int
    closed: NothingToClaim | None


def extend_study(
    engine: Engine,
    study: Study,
    *,
    trials: Amount | None = None,
    timeout: Amount | None = None,
    max_failures: Amount | None = None,
) -> Extended:
    """Raise the budget, in one transaction that is done once: running workers go by it from their next claim on.

    Raises UsageError, and changes nothing, for what would be less than there is or no use.
    """
    from storage.coordination import control, standings
    from storage.database.sessions import Sessions

    before: list[Budget] = []

    def decide(standing: Standing) -> dict[str, object]:
        now = Budget.model_validate(standing.budget)
        before.append(now)
        return extended(study.name, study.spec, now, standing, trials, timeout, max_failures).model_dump(mode="json")

    standing = control.extend(Sessions(engine), study.study_id, decide)
    return Extended(
        before=before[-1],
        budget=Budget.model_validate(standing.budget),
        running=standing.running,
        closed=standings.closed(standing, study.budget),
    )


def extended(
    name: str,
    spec: Spec,
    now: Budget,
    standing: Standing,
    trials: Amount | None,
    timeout: Amount | None,
    max_failures: Amount | None,
) -> Budget:
    """Return the budget of study `name` raised from `now`.

    More is more than what there is or, where more is used already, than that: an hour for a study whose time ran out
    yesterday is an hour from now. Raises UsageError.
    """
    if spec.confirms is not None:
        raise UsageError(
            f"study {name!r} confirms trials of {spec.confirms.study!r}, and has as many as that takes: 'tuner confirm"
            f" {shlex.quote(spec.confirms.study)} --seeds N' adds to them"
        )
    changes: dict[str, object] = {}
    if trials is not None:
        wanted = int(_raised(name, "--trials", f"{now.trials} trials", trials, now.trials, standing.done))
        _check_grid(spec, wanted)
        changes["trials"] = wanted
    if max_failures is not None:
        now_at = now.max_failures
        changes["max_failures"] = int(
            _raised(name, "--max-failures", f"{now_at} failures", max_failures, now_at, standing.failures)
        )
    if timeout is not None:
        if now.timeout_s is None:
            raise UsageError(f"--timeout: study {name!r} has no time limit, and so there is nothing to add to")
        shown, used_s = f"a time of {duration(now.timeout_s)}", standing.age_s or 0.0
        changes["timeout_s"] = _raised(name, "--timeout", shown, timeout, now.timeout_s, used_s)
    return now.model_copy(update=changes)


def _raised(name: str, option: str, shown: str, amount: Amount, now: float, used: float) -> float:
    raised = max(now, used) + amount.value if amount.is_more else amount.value
    if raised > _MOST:
        raise UsageError(f"{option}: study {name!r} has {shown}, and can have at most {_MOST}")
    if raised < now:
        raise UsageError(f"{option}: study {name!r} has {shown}, and that only grows: a + adds to it")
    return raised


def _check_grid(spec: Spec, trials: int) -> None:
    if spec.sampler.name != "grid":
        return
    from tuner.study.sampling import grid_size

    size = grid_size(spec.sampler)
    if size is not None and trials > size:
        raise UsageError(f"--trials: the study's grid has {size} combinations, and would begin again at {size + 1}")
