"""How much each param has to do with a study's value, by fANOVA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from tuner.report.shown import a_study, drawable, evenly

if TYPE_CHECKING:
    from tuner.study.joining import AnyStudy

MIN_SURE = 20
"""Fewer complete trials than these say little."""
MAX_TRIALS = 1000
MAX_DEPTH = 6
"""As many trials are looked at, by trees of this depth: with Optuna's 64 the figures of 1000 trials of 5 params differ
by three points at most, and take 50 s instead of 1.2 (2 cores, 2026-11)."""


@dataclass(frozen=True, kw_only=True)
class Importance:
    """The part of the variance of one objective that each param alone accounts for, of all that single params do.

    It is reckoned from `trials` of the `complete` ones. `left_out` are params that not all of these have, or whose
    range changed. Without any `params`, `problem` says why.
    """

    metric: str
    params: dict[str, float]
    trials: int
    complete: int
    left_out: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def caveat(self) -> str | None:
        """What to think of it, None if nothing is to be said."""
        if self.params and self.complete < MIN_SURE:
            return (
                f"reckoned from {self.complete} complete trials: below {MIN_SURE}, importances change from trial to"
                " trial, and the order of params may be chance"
            )
        return None


def importances(study: AnyStudy, trials: Sequence[FrozenTrial]) -> tuple[Importance, ...]:
    """Return the importances of the params for each of the study's objectives, the most important first.

    The same trials give the same. As in https://proceedings.mlr.press/v32/hutter14.html, by Optuna's evaluator.
    """
    return tuple(_importance(study, trials, objective) for objective in range(len(study.directions)))


def _importance(study: AnyStudy, trials: Sequence[FrozenTrial], objective: int) -> Importance:
    metric = study.metrics[objective]
    usable = [trial for trial in trials if _value(trial, objective) is not None]
    drawn = drawable(evenly(usable, MAX_TRIALS))

    def without(problem: str) -> Importance:
        return Importance(metric=metric, params={}, trials=len(drawn), complete=len(usable), problem=problem)

    if len(usable) < 2:
        return without(f"there {'is' if usable else 'are'} {len(usable) or 'no'} complete trial{'' if usable else 's'}")
    if len({_value(trial, objective) for trial in drawn}) == 1:
        return without("all complete trials have the same value")
    try:
        found = get_param_importances(
            a_study(drawn, study),
            evaluator=FanovaImportanceEvaluator(seed=0, max_depth=MAX_DEPTH),
            target=lambda trial: trial.values[objective],
        )
    except RuntimeError:  # the forest's trees see no difference, as where all params are constant
        return without("no param was tried with values that make a difference")
    names = dict.fromkeys(name for trial in drawn for name in trial.params)
    if not found:
        return without("no param is in all complete trials" if names else "the trials have no params")
    return Importance(
        metric=metric,
        params={name: float(share) for name, share in found.items()},
        trials=len(drawn),
        complete=len(usable),
        left_out=tuple(name for name in names if name not in found),
    )


def _value(trial: FrozenTrial, objective: int) -> float | None:
    if trial.state != TrialState.COMPLETE or trial.values is None or len(trial.values) <= objective:
        return None
    value = trial.values[objective]
    return value if math.isfinite(value) else None
