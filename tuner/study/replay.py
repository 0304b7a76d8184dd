"""What pruning rules would have done to a study's complete trials, whose curves are known to their end."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import Engine

from storage.coordination import history
from storage.database.sessions import Sessions
from storage.optuna_storage.rule_tables import Tables, best_so_far, minimized
from storage.optuna_storage.rules import Percentile, Rule, standard_rungs
from tuner.errors import TunerError
from tuner.spec import PrunerSpec

if TYPE_CHECKING:
    from tuner.study.joining import AnyStudy

ORDERS = 100
"""In how many random orders the trials are replayed."""
MAX_TRIALS = 200
"""Of more complete trials so many are replayed, evenly chosen."""
MIN_TRIALS = 10
GLANCE = {"orders": 30, "at_most": 60}
"""How much of a finished study is replayed for its status."""
TOP_SHARE = 0.1
"""Which part of the trials are the best ones."""


@dataclass(frozen=True, kw_only=True)
class Past:
    """A complete trial: its value and what it reported in order, both to be minimized."""

    number: int
    value: float
    reported: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over random orders of the trials, and 95 % of what trials drawn again from these give."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a rule would have done: the part of the epochs `saved`, and the part of the best trials `stopped`.

    `best_kept` is in how many of the orders the best trial was kept, `often` how often each of the best was stopped, by
    number.
    """

    rule: str
    saved: Interval
    stopped: Interval
    best_kept: float
    often: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The `replayed` trials of those that are `complete`, of up to `epochs` epochs, and what each rule did to them."""

    complete: int
    replayed: int
    epochs: int
    top: int
    rules: Sequence[Replayed]


def replay(engine: Engine, study: AnyStudy, *, orders: int = ORDERS, at_most: int = MAX_TRIALS) -> Replay | None:
    """Replay a study's complete trials; None of fewer than MIN_TRIALS that reported anything."""
    if len(study.directions) > 1:
        raise TunerError(f"study {study.name!r} has {len(study.directions)} objectives, and nothing prunes its trials")
    sign = -1.0 if study.directions[0] == "maximize" else 1.0
    complete, curves = Sessions(engine).snapshot(lambda conn: history.complete_curves(conn, study.study_id, at_most))
    past = [
        Past(number=number, value=sign * value, reported=minimized(reported, sign))
        for number, (value, reported) in curves.items()
        if reported and math.isfinite(value)
    ]
    if len(past) < MIN_TRIALS:
        return None
    epochs = max(len(trial.reported) for trial in past)
    rules = rules_for(epochs, None if study.spec is None else study.spec.pruner)
    return Replay(
        complete=complete,
        replayed=len(past),
        epochs=epochs,
        top=n_best(len(past)),
        rules=[replayed(past, name, rule, orders) for name, rule in rules.items()],
    )


def rules_for(epochs: int, own: PrunerSpec | None) -> dict[str, Rule]:
    """Return the rules that can be replayed, by the name of their pruner; `own` is a study's, if it has settings."""
    if own is not None and own.name == "rungs":  # fewer may have been trained, as with --patience
        epochs = int(str(own.settings.get("epochs", epochs)))
    rules: dict[str, Rule] = {
        "median": Percentile(),
        "percentile": Percentile(25.0),
        "rungs": standard_rungs(epochs),
    }
    settings = {} if own is None else {name: its for name, its in own.settings.items() if name != "epochs"}
    if own is None or not settings or own.name not in rules:
        return rules
    name = f"{own.name}:{','.join(f'{key}={its}' for key, its in settings.items())}"
    if own.name == "rungs":
        return {**rules, name: standard_rungs(epochs, float(str(settings["eta"])))}
    if settings.keys() <= {"percentile", "n_startup_trials"}:
        numbers = {key: float(str(its)) for key, its in settings.items()}
        wanted = Percentile(numbers.get("percentile", 50.0), int(numbers.get("n_startup_trials", 5)))
        return rules if wanted in rules.values() else {**rules, name: wanted}
    return rules


def replayed(past: Sequence[Past], name: str, rule: Rule, orders: int = ORDERS) -> Replayed:
    """Replay trials one after the other in random orders, the same each time that this is asked."""
    rng = random.Random(0)  # noqa: S311 - no secret
    top = _best(past)
    best = min(past, key=_by_value)
    saved, stopped, kept = [], [], 0
    often: Counter[int] = Counter()
    for _ in range(orders):
        share, gone = _once(rng.sample(past, len(past)), rule)
        saved.append(share)
        stopped.append(len(gone & top) / len(top))
        often.update(gone & top)
        kept += best.number not in gone
    saved_again, stopped_again = [], []
    for _ in range(orders):
        drawn = rng.choices(past, k=len(past))
        # Each as a trial of its own: the same one may be stopped in one place, and not in another.
        again = [Past(number=place, value=one.value, reported=one.reported) for place, one in enumerate(drawn)]
        share, gone = _once(again, rule)
        best_again = _best(again)
        saved_again.append(share)
        stopped_again.append(len(gone & best_again) / len(best_again))
    return Replayed(
        rule=name,
        saved=_interval(saved, saved_again),
        stopped=_interval(stopped, stopped_again),
        best_kept=kept / orders,
        often={number: count / orders for number, count in often.most_common()},
    )


def n_best(n_trials: int) -> int:
    """Return how many of so many trials are the best ones."""
    return max(1, math.ceil(TOP_SHARE * n_trials))


def _by_value(trial: Past) -> tuple[float, int]:
    return trial.value, trial.number


def _best(past: Sequence[Past]) -> set[int]:
    return {trial.number for trial in sorted(past, key=_by_value)[: n_best(len(past))]}


def _once(past: Sequence[Past], rule: Rule) -> tuple[float, set[int]]:
    """Return which part of the epochs the rule saves of trials in this order, and whom it stops."""
    tables, ran, stopped = Tables(), 0, set()
    for trial in past:
        last = len(trial.reported) - 1
        for step, best in enumerate(best_so_far(trial.reported)):
            ran += 1
            tables.report(step, best)
            if step < last and rule.stops(step, best, tables):
                stopped.add(trial.number)
                break
        else:
            tables.complete(trial.reported)
    return 1 - ran / sum(len(trial.reported) for trial in past), stopped


def _interval(found: Sequence[float], again: Sequence[float]) -> Interval:
    ordered = sorted(again)
    cut = round(0.025 * (len(ordered) - 1))
    return Interval(mean=sum(found) / len(found), low=ordered[cut], high=ordered[-1 - cut])
