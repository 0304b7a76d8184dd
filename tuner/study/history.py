"""What a study's sampler learns from beside its own trials: those of another study, as they were at its creation.

They are kept with the study and are no trials of it: they have no numbers, count towards no budget, are never best, and
no pruner sees them. The sampler sees them as older than all trials there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter
from sqlalchemy import Engine

from storage.coordination import records, studies
from storage.coordination.records import TrialRecord
from storage.database.sessions import Sessions
from storage.trials.creation import distributions_of, param_names
from tuner.errors import UsageError
from tuner.spec import Spec
from tuner.study.joining import Study, find_study
from tuner.study.params import range_text
from tuner.study.sampling import build_sampler, common_space, discover

if TYPE_CHECKING:
    from tuner.objective import Objective

LEARNING: Final = ("tpe", "gp")
"""The samplers that learn from trials whoever suggested them."""


class PastTrial(BaseModel):
    """A trial of another study as it is kept: what a sampler looks at. `step` and `reported` are the last report's."""

    model_config = ConfigDict(frozen=True)

    number: int
    value: float | None
    step: int | None
    reported: float | None
    params: dict[str, JsonValue]


@dataclass(frozen=True, kw_only=True)
class History:
    """The trials that a new study is to learn from, as JSON, and what there is to tell of them, line by line."""

    trials: list[dict[str, Any]]
    notes: list[str]


def history_of(engine: Engine, name: str, spec: Spec, objective: Objective | None) -> History:
    """Return what a new study of this spec learns from the finished trials of study `name`.

    A trial tells of a param that both studies have if its value is possible here. `objective` is None for a plain
    function, whose params are compared when it suggests them. Raises StudyNotFoundError, and UsageError if there is
    nothing to learn.
    """
    if spec.sampler.name not in LEARNING:
        raise UsageError(
            f"--from: sampler {spec.sampler.name} does not learn from other trials; {' and '.join(LEARNING)} do"
        )
    other = find_study(engine, name)
    metric = other.metrics[0]
    if other.directions != (spec.direction,) or (metric != spec.metric and "value" not in (metric, spec.metric)):
        raise UsageError(
            f"--from: study {name!r} is to {other.goal}, and this one to {spec.direction} {spec.metric}: their values"
            " cannot be compared"
        )
    found = [trial for trial in records.list_trials(engine, other.study_id) if _tells(trial)]
    if not found:
        raise UsageError(f"--from: study {name!r} has no finished trial to learn from")
    notes: list[str] = []
    if objective is None:
        kept = [(trial, trial.params) for trial in found]
    else:
        sessions = Sessions(engine)
        theirs = distributions_of(sessions, other.study_id, param_names(sessions, other.study_id))
        ours = discover(objective)
        notes = _compared(name, found, theirs, ours)
        kept = [(trial, _known(trial, ours)) for trial in found]
    trials = [
        PastTrial(
            number=trial.number,
            value=trial.value if trial.state == "COMPLETE" else None,
            step=trial.last_step,
            reported=trial.last_value,
            params=params,
        ).model_dump(mode="json")
        for trial, params in kept
        if params
    ]
    return History(trials=trials, notes=[f"learns from {len(trials)} trials of study {name}", *notes])


def samplers(sessions: Sessions, study: Study, objective: Objective | None = None) -> Callable[[int], BaseSampler]:
    """Return what makes the sampler of a trial by its number; the history is read once.

    `objective` tells which params there are before a trial has had any; None for a plain function.
    """
    spec = study.spec
    if spec.history is None:
        return lambda number: build_sampler(spec.sampler, spec.seed, number)
    stored = TypeAdapter(list[PastTrial]).validate_python(studies.history(sessions, study.study_id))
    past = [_frozen(index - len(stored), trial) for index, trial in enumerate(stored)]
    space: dict[str, BaseDistribution] = {}
    if spec.sampler.name == "gp" and objective is not None:
        # The others of the history would be left out for what one trial does not tell of.
        space = {name: its for name, its in common_space(objective).items() if all(name in its.params for its in past)}
    return lambda number: Learned(build_sampler(spec.sampler, spec.seed, number), past, space)


class Learned(BaseSampler):
    """A sampler that sees past trials, oldest first and with numbers below 0, before the study's own."""

    def __init__(
        self,
        sampler: BaseSampler,
        past: Sequence[FrozenTrial],
        first_space: Mapping[str, BaseDistribution] = MappingProxyType({}),
    ) -> None:
        """`first_space` is what is sampled as a whole before a trial of the study tells what it has in common."""
        self._sampler = sampler
        self._past = past
        self._first_space = {name: its for name, its in first_space.items() if not its.single()}

    def reseed_rng(self) -> None:
        """Reseed the sampler."""
        self._sampler.reseed_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Infer it from the study's own trials: only they have the params that are new, and their ranges."""
        return self._sampler.infer_relative_search_space(study, trial) or dict(self._first_space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Sample the params that belong together from all trials that have all of them."""
        return self._sampler.sample_relative(self._with_past(study, search_space), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Sample a param from all trials that have it."""
        seen = self._with_past(study, {param_name: param_distribution})
        return self._sampler.sample_independent(seen, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Tell the sampler."""
        self._sampler.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Tell the sampler."""
        self._sampler.after_trial(study, trial, state, values)

    def _with_past(self, study: optuna.Study, space: Mapping[str, BaseDistribution]) -> Any:
        """Return the study as the sampler is to see it, with the past trials that tell of these params."""
        return _Seen(study, [trial for trial in self._past if _is_within(trial.params, space)])


class _Seen:
    """A study, which may be one of a pruner's brackets, with other trials before its own."""

    def __init__(self, study: optuna.Study, past: Sequence[FrozenTrial]) -> None:
        self._study_seen = study
        self._past = past

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study_seen, name)

    def _get_trials(
        self, deepcopy: bool = True, states: Sequence[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        past = [trial for trial in self._past if states is None or trial.state in states]
        return past + self._study_seen._get_trials(deepcopy, states, use_cache)


def _tells(trial: TrialRecord) -> bool:
    """Whether the trial ended with a number to learn from: its value or, where it was pruned, its last report."""
    number = {"COMPLETE": trial.value, "PRUNED": trial.last_value}.get(trial.state)
    return number is not None and math.isfinite(number)


def _known(trial: TrialRecord, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    return {name: value for name, value in trial.params.items() if name in space and _is_one_of(space[name], value)}


def _is_within(params: Mapping[str, Any], space: Mapping[str, BaseDistribution]) -> bool:
    return all(name in params and _is_one_of(its, params[name]) for name, its in space.items())


def _is_one_of(distribution: BaseDistribution, value: Any) -> bool:
    """Whether the param could have this value; 1, 1.0 and True are one number and no truth value."""
    if isinstance(distribution, CategoricalDistribution):
        return any(type(choice) is type(value) and choice == value for choice in distribution.choices)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and distribution._contains(float(value))


def _compared(
    name: str,
    trials: Sequence[TrialRecord],
    theirs: Mapping[str, BaseDistribution],
    ours: Mapping[str, BaseDistribution],
) -> list[str]:
    """Return what to tell of the params of both studies. Raises UsageError if no trial tells of any."""
    notes, n_known = [], 0
    for param in [param for param in ours if param in theirs]:
        values = [trial.params[param] for trial in trials if param in trial.params]
        n_possible = sum(_is_one_of(ours[param], value) for value in values)
        n_known += n_possible
        if n_possible < len(values):
            ranges = f"{range_text(theirs[param])} there, {range_text(ours[param])} here"
            notes.append(f"{param}: {ranges}; {n_possible} of {len(values)} trials have a value that is possible here")
    dropped = [param for param in theirs if param not in ours]
    new = [param for param in ours if param not in theirs]
    for told, params in (("dropped, as it is not suggested here", dropped), ("new, and nothing known of it", new)):
        if params:
            notes.append(f"{told}: {', '.join(params)}")
    if not n_known:
        raise UsageError(f"--from: no trial of study {name!r} has a param of this one: {'; '.join(notes)}")
    return notes


def _frozen(number: int, past: PastTrial) -> FrozenTrial:
    is_complete = past.value is not None
    reports = {} if past.step is None or past.reported is None else {past.step: past.reported}
    trial = FrozenTrial(
        number=number,
        state=TrialState.COMPLETE if is_complete else TrialState.PRUNED,
        value=past.value,
        datetime_start=None,
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values=reports,
        trial_id=number,
    )
    trial.params = dict(past.params)  # of a study whose distributions are none of this one's
    return trial
