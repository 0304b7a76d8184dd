"""What pruning saved, and what it may have cost: pure functions over the trials' reports."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from storage.coordination.records import State
from tuner.spec import Direction

MIN_COMPLETE = 5
"""Complete trials that have to have reported at a step before it is said what a pruned one could have become."""
MIGHT_SHARE = 0.05
"""A pruned trial might have won if at least this part of the complete trials' gains would have made it the best."""


@dataclass(frozen=True, kw_only=True)
class Reports:
    """A finished trial as the audit sees it: its value, what it reported by step, and the devices' time it took.

    `epochs` is how many it was to have where its params say so.
    """

    number: int
    state: State
    value: float | None
    by_step: Mapping[int, float]
    device_s: float
    epochs: int | None = None


@dataclass(frozen=True, kw_only=True)
class PrunedTrial:
    """A trial that was pruned after `epochs` reports, the last at `step`, with `value` its best until then.

    Of the `rivals` that had reported so far, the trial itself among them, it was at place `rank`, 1 being the best.
    `extrapolated` is the value with the median gain of complete trials from that step to their end, `share` the part
    of these gains with which it would have been the study's best; None where too few trials tell.
    """

    number: int
    step: int
    epochs: int
    value: float
    rank: int
    rivals: int
    extrapolated: float | None
    share: float | None


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What pruning did: `trials` by number, epochs that were run and left out, and devices' time left out.

    `best` is the study's best value, None without one. `judged` of the trials could be extrapolated;
    `might_have_won` of these had a chance of MIGHT_SHARE at least, and `expected_winners` is the sum of all chances.
    """

    best: float | None
    pruned: int
    full_epochs: int
    epochs_run: int
    epochs_saved: int
    device_s_saved: float
    judged: int
    might_have_won: int
    expected_winners: float
    trials: tuple[PrunedTrial, ...]


def audit(trials: Sequence[Reports], direction: Direction, epochs: int | None) -> Audit | None:
    """Return what pruning did to a study; None if it pruned nothing.

    A full trial has as many reports as the median of the complete ones, or `epochs` while there is none; one that was
    pruned before its first report counts as pruned, and no more is known of it.

    What a pruned trial could have become is told by the complete ones: the gain of each is its value less the best
    that it had reported by the same step, and each of these gains is taken for one that the pruned trial may have
    had. Complete trials are those that did well, so that the gains, and the chances with them, are rather too high.
    """
    if not any(trial.state == "PRUNED" for trial in trials):
        return None
    sign = 1.0 if direction == "maximize" else -1.0
    complete = [trial for trial in trials if trial.state == "COMPLETE" and _is_finite(trial.value)]
    values = [sign * trial.value for trial in complete if trial.value is not None]
    best = max(values, default=None)
    lengths = [len(trial.by_step) for trial in complete if trial.by_step]
    full = math.ceil(median(lengths)) if lengths else epochs or 0
    so_far = {trial.number: _best_so_far(trial.by_step, sign) for trial in trials}
    gains, rivals = _gains(complete, so_far, sign), _values_by_step(so_far.values())
    run = saved = 0
    saved_s = 0.0
    found = []
    for trial in trials:
        n_run = len(trial.by_step)
        if trial.state != "PRUNED" or not n_run:
            continue
        n_saved = max(0, (trial.epochs or full) - n_run)
        run, saved = run + n_run, saved + n_saved
        saved_s += trial.device_s / n_run * n_saved
        if so_far[trial.number]:
            found.append(_judged(trial, so_far[trial.number], gains, rivals, best, sign))
    shares = [one.share for one in found if one.share is not None]
    return Audit(
        best=None if best is None else sign * best,
        pruned=sum(trial.state == "PRUNED" for trial in trials),
        full_epochs=full,
        epochs_run=run,
        epochs_saved=saved,
        device_s_saved=saved_s,
        judged=len(shares),
        might_have_won=sum(share >= MIGHT_SHARE for share in shares),
        expected_winners=sum(shares),
        trials=tuple(found),
    )


def _judged(
    trial: Reports,
    so_far: Mapping[int, float],
    gains: Mapping[int, Sequence[float]],
    rivals: Mapping[int, Sequence[float]],
    best: float | None,
    sign: float,
) -> PrunedTrial:
    step = max(so_far)
    value, others = so_far[step], rivals[step]
    its = gains.get(step, ())
    extrapolated = share = None
    if best is not None and len(its) >= MIN_COMPLETE:
        extrapolated = sign * (value + median(its))
        share = (len(its) - bisect_right(its, best - value)) / len(its)
    return PrunedTrial(
        number=trial.number,
        step=step,
        epochs=len(trial.by_step),
        value=sign * value,
        rank=len(others) - bisect_right(others, value) + 1,
        rivals=len(others),
        extrapolated=extrapolated,
        share=share,
    )


def _best_so_far(by_step: Mapping[int, float], sign: float) -> dict[int, float]:
    """Return the best report until each step, with `sign` such that more is better; of those that are numbers."""
    found: dict[int, float] = {}
    best = -math.inf
    for step in sorted(by_step):
        if _is_finite(by_step[step]):
            best = max(best, sign * by_step[step])
            found[step] = best
    return found


def _gains(
    complete: Iterable[Reports], so_far: Mapping[int, Mapping[int, float]], sign: float
) -> dict[int, list[float]]:
    """Return by step, in order, what the complete trials gained from there to their end."""
    gains: dict[int, list[float]] = {}
    for trial in complete:
        for step, value in so_far[trial.number].items():
            assert trial.value is not None
            gains.setdefault(step, []).append(sign * trial.value - value)
    return {step: sorted(its) for step, its in gains.items()}


def _values_by_step(curves: Iterable[Mapping[int, float]]) -> dict[int, list[float]]:
    values: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve.items():
            values.setdefault(step, []).append(value)
    return {step: sorted(its) for step, its in values.items()}


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
