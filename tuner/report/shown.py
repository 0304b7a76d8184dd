"""The trials that are drawn: few enough for a page, and as Optuna's figures can take them."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.pruners import NopPruner
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

if TYPE_CHECKING:
    from tuner.spec import Direction
    from tuner.study.joining import AnyStudy

Item = TypeVar("Item")
MAX_LETTERS = 40
"""Of a text in a figure; tables have all of it."""


class _Given(InMemoryStorage):
    """A storage of one study with trials as they are, whatever their numbers."""

    def __init__(self, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> None:
        super().__init__()
        self._given, self._given_directions = list(trials), list(directions)

    def get_study_id_from_name(self, study_name: str) -> int:
        del study_name
        return 0

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        del study_id
        return self._given_directions

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        del study_id
        return {}

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        del study_id, deepcopy
        return [trial for trial in self._given if states is None or trial.state in states]


def a_study(trials: Sequence[FrozenTrial], study: AnyStudy) -> optuna.Study:
    """Return a study in memory with these trials, to be looked at by what takes one of Optuna's."""
    storage = _Given(trials, [StudyDirection[direction.upper()] for direction in study.directions])
    return optuna.Study(study.name, storage, sampler=RandomSampler(), pruner=NopPruner())


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Return so many of the items, or all if there are fewer, from the first to the last at even distances."""
    if len(items) <= count:
        return list(items)
    if count <= 1:
        return list(items[:count])
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def chosen(trials: Sequence[FrozenTrial], direction: Direction, count: int) -> list[FrozenTrial]:
    """Return so many of the trials by number: those that were the best when they ended, the best, and others evenly.

    A tenth of them are the best ones; what is not complete, with a finite first value, is among the others.
    """
    if len(trials) <= count:
        return list(trials)
    better = min if direction == "minimize" else max
    complete = [trial for trial in trials if first_value(trial) is not None]
    complete.sort(key=_sort_key, reverse=direction == "maximize")
    kept = {trial.number: trial for trial in complete[: count // 10]}
    best: float | None = None
    for trial in trials:
        value = first_value(trial)
        if value is not None and (best is None or better(best, value) != best):
            best = value
            if len(kept) < count // 2:
                kept[trial.number] = trial
    others = [trial for trial in trials if trial.number not in kept]
    kept |= {trial.number: trial for trial in evenly(others, count - len(kept))}
    return sorted(kept.values(), key=lambda trial: trial.number)


def first_value(trial: FrozenTrial) -> float | None:
    """Return the first objective's value of a complete trial; None of another, and where it is no finite number."""
    if trial.state != TrialState.COMPLETE or not trial.values or not math.isfinite(trial.values[0]):
        return None
    return float(trial.values[0])


def drawable(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return copies of the trials without user attributes, and with choices that are short texts, or scalars."""
    kinds: dict[int, BaseDistribution] = {}
    return [_drawable(trial, kinds) for trial in trials]


def choice_text(value: Any) -> Any:
    """Return a choice as figures can draw it: a list or a dict as JSON, all else as it is."""
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value, default=str)


def _drawable(trial: FrozenTrial, kinds: dict[int, BaseDistribution]) -> FrozenTrial:
    for kind in trial.distributions.values():
        if id(kind) not in kinds:
            kinds[id(kind)] = _drawable_kind(kind)
    return FrozenTrial(
        number=trial.number,
        state=trial.state,
        value=None,
        values=trial.values,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
        params={
            name: _drawable_value(value, trial.distributions[name], kinds[id(trial.distributions[name])])
            for name, value in trial.params.items()
        },
        distributions={name: kinds[id(kind)] for name, kind in trial.distributions.items()},
        user_attrs={},
        system_attrs=trial.system_attrs,
        intermediate_values={},
        trial_id=trial.number,
    )


def _drawable_kind(kind: BaseDistribution) -> BaseDistribution:
    if not isinstance(kind, CategoricalDistribution):
        return kind
    texts = [choice_text(choice) for choice in kind.choices]
    # the place among the choices tells those apart that begin alike
    shown = [shortened(text, f" #{place}") if isinstance(text, str) else text for place, text in enumerate(texts)]
    return kind if shown == list(kind.choices) else CategoricalDistribution(shown)


def _drawable_value(value: Any, kind: BaseDistribution, shown: BaseDistribution) -> Any:
    return value if shown is kind else shown.to_external_repr(kind.to_internal_repr(value))


def shortened(text: str, mark: str = "") -> str:
    """Return a text as a figure has room for it, with a mark if it was cut."""
    return text if len(text) <= MAX_LETTERS else f"{text[: MAX_LETTERS - 1 - len(mark)]}…{mark}"


def _sort_key(trial: FrozenTrial) -> float:
    value = first_value(trial)
    assert value is not None
    return value
