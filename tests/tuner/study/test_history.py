"""Another study's trials as what a sampler learns from: which of them tell of what, and what they are not."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from searching import Untrained

from storage import StudyNotFoundError
from storage.coordination import records, standings, studies
from storage.database.sessions import Sessions
from tuner.errors import TunerError, UsageError
from tuner.spec import Budget, ObjectiveSpec, SamplerSpec, Spec
from tuner.study.history import Learned, history_of, samplers
from tuner.study.joining import best_of, create_study

X = FloatDistribution(0, 1)


class Searched(Untrained):
    metric = "score"
    direction = "maximize"

    def suggest(self, trial: optuna.Trial) -> None:
        trial.suggest_float("x", 0.5, 2)
        trial.suggest_categorical("kind", ["a", "b"])
        trial.suggest_int("units", 8, 64, step=8)


@pytest.fixture
def other(storage):
    """A study of another program, whose score is highest near x = 0.8."""
    return optuna.create_study(study_name="other", storage=storage, direction="maximize")


def a_spec(sampler: str = "tpe", **changes: Any) -> Spec:
    fields: dict[str, Any] = {
        "objective": ObjectiveSpec(name="search.py:Searched", code_hash="0" * 64),
        "metric": "score",
        "direction": "maximize",
        "sampler": SamplerSpec(name=sampler),
        "budget": Budget(trials=3),
        "epochs": 1,
        "history": "other",
    }
    return Spec(**{**fields, **changes})


def add(study: optuna.Study, count: int = 20, **others: tuple[Any, Any]) -> None:
    for n in range(count):
        params = {"x": n / count, **{name: value for name, (_, value) in others.items()}}
        distributions = {"x": X, **{name: its for name, (its, _) in others.items()}}
        value = 1 - abs(n / count - 0.8)
        study.add_trial(create_trial(params=params, distributions=distributions, value=value))


def create(engine, spec: Spec, objective: Any = None):
    return create_study(engine, "new", spec, history_of(engine, "other", spec, objective).trials)


def suggested(engine, study, in_study: optuna.Study, number: int, space: dict[str, Any]) -> dict[str, Any]:
    in_study.sampler = samplers(Sessions(engine), study)(number)
    trial = in_study.ask()
    return {name: trial._suggest(name, its) for name, its in space.items()}


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_the_sampler_starts_from_what_the_other_study_found(engine, other, sampler):
    add(other)
    study = create(engine, a_spec(sampler))
    own = optuna.create_study(direction="maximize")
    own.add_trial(create_trial(params={"x": 0.1}, distributions={"x": X}, value=0.3))  # gp's space is its own trials'
    assert suggested(engine, study, own, 1, {"x": X})["x"] == pytest.approx(0.8, abs=0.1)
    alone = create_study(engine, "alone", a_spec(sampler, history=None))
    assert suggested(engine, alone, own, 1, {"x": X})["x"] != pytest.approx(0.8, abs=0.1)


class Narrow(Searched):
    def suggest(self, trial: optuna.Trial) -> None:
        trial.suggest_float("x", 0, 1)
        if trial.suggest_categorical("kind", ["a", "b"]) == "a":
            trial.suggest_int("units", 8, 64, step=8)


def test_the_first_trial_of_gp_is_sampled_from_the_past_in_what_the_objective_always_suggests(engine, other):
    add(other)
    study = create(engine, a_spec("gp"), Narrow())
    own = optuna.create_study(direction="maximize")
    own.sampler = samplers(Sessions(engine), study, Narrow())(0)
    trial = own.ask()
    Narrow().suggest(trial)
    assert trial.params["x"] == pytest.approx(0.8, abs=0.1)
    assert "kind" in trial.params  # of which nothing is known: by chance


def test_past_trials_are_none_of_the_study(engine, other):
    add(other)
    study = create(engine, a_spec())
    standing = standings.look(Sessions(engine), study.study_id)
    assert (standing.n_trials, standing.done) == (0, 0)
    assert records.list_trials(engine, study.study_id) == []
    with pytest.raises(TunerError, match="has no complete trial yet"):
        best_of(engine, study)
    other._storage.delete_study(other._study_id)
    assert len(studies.history(Sessions(engine), study.study_id)) == 20


def test_what_is_dropped_new_or_out_of_range_is_told_and_not_kept(engine, other):
    kinds = CategoricalDistribution(["a", "c"])
    add(other, gone=(IntDistribution(0, 9), 3), kind=(kinds, "c"))
    other.add_trial(create_trial(params={"kind": "a"}, distributions={"kind": kinds}, value=1.0))
    other.add_trial(create_trial(params={"x": 0.75}, distributions={"x": X}, value=float("inf")))
    other.add_trial(create_trial(params={"x": 0.75}, distributions={"x": X}, state=TrialState.FAIL))
    pruned = create_trial(
        params={"x": 0.625}, distributions={"x": X}, state=TrialState.PRUNED, intermediate_values={4: 9.0}
    )
    other.add_trial(pruned)
    found = history_of(engine, "other", a_spec(), Searched())
    assert found.notes == [
        "learns from 12 trials of study other",
        "x: 0 to 1 there, 0.5 to 2 here; 11 of 21 trials have a value that is possible here",
        "kind: a or c there, a or b here; 1 of 21 trials have a value that is possible here",
        "dropped, as it is not suggested here: gone",
        "new, and nothing known of it: units",
    ]
    assert [trial["params"] for trial in found.trials[-3:]] == [{"x": 0.95}, {"kind": "a"}, {"x": 0.625}]
    assert found.trials[-1] == {"number": 23, "value": None, "step": 4, "reported": 9.0, "params": {"x": 0.625}}


@pytest.mark.parametrize("pruner", [optuna.pruners.NopPruner(), optuna.pruners.HyperbandPruner(max_resource=9)])
def test_a_sampler_sees_only_trials_that_tell_of_all_that_it_samples(other, pruner):
    seen: list[list[int]] = []

    class Looks(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, name, distribution):
            seen.append([its.number for its in study._get_trials(deepcopy=False, states=(TrialState.COMPLETE,))])
            return super().sample_independent(study, trial, name, distribution)

    past = [create_trial(params={}, distributions={}, value=0.0) for _ in range(3)]
    for number, (trial, params) in enumerate(zip(past, ({"x": 0.5}, {"x": 7.0}, {"y": True}), strict=True)):
        trial.number, trial.params = number - 3, params
    study = optuna.create_study(sampler=Learned(Looks(seed=0), past), pruner=pruner)
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.suggest_int("y", 0, 1)
    trial.suggest_categorical("y2", [1, 2])
    assert seen == [[-3], [], []]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (a_spec("qmc"), "--from: sampler qmc does not learn from other trials; tpe and gp do"),
        (a_spec(direction="minimize"), "study 'other' is to maximize value, and this one to minimize score: their"),
        (a_spec(), "--from: study 'other' has no finished trial to learn from"),
    ],
)
def test_a_study_that_nothing_is_to_be_learned_from_is_refused(engine, other, spec, told):
    with pytest.raises(UsageError) as caught:
        create(engine, spec)
    assert told in str(caught.value)
    with pytest.raises(StudyNotFoundError):
        studies.find_study(engine, "new")


def test_a_study_without_a_param_of_this_one_is_refused(engine, other):
    other.add_trial(create_trial(params={"gone": 1.0}, distributions={"gone": FloatDistribution(0, 2)}, value=1.0))
    with pytest.raises(UsageError, match=r"no trial of study 'other' has a param of this one: dropped.*: gone; new"):
        history_of(engine, "other", a_spec(), Searched())
    with pytest.raises(StudyNotFoundError, match="no study named 'nobody'"):
        history_of(engine, "nobody", a_spec(), None)
