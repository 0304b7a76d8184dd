"""Studies that other programs made, with a spec of ours: what their trials count for, and what does not go together."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from searching import Untrained

from storage.coordination import claims
from storage.coordination.claims import Claim
from storage.database.sessions import Sessions
from tuner.errors import TunerError, UsageError
from tuner.spec import Budget, ObjectiveSpec, SamplerSpec, Spec
from tuner.study.adopting import adopt_study
from tuner.study.extending import Amount
from tuner.study.joining import best_of, find_study, open_study

X = FloatDistribution(0, 1)
MORE = Amount(value=3, is_more=True)


class Searched(Untrained):
    metric = "score"
    direction = "maximize"

    def suggest(self, trial: optuna.Trial) -> None:
        trial.suggest_float("x", 0, 2)
        trial.suggest_int("units", 8, 64)


def a_spec(**changes: Any) -> Spec:
    fields: dict[str, Any] = {
        "objective": ObjectiveSpec(name="search.py:Searched", code_hash="0" * 64),
        "metric": "score",
        "direction": "maximize",
        "budget": Budget(trials=1, max_failures=1),
        "epochs": 1,
    }
    return Spec(**{**fields, **changes})


def a_study(storage, x=X, **others) -> optuna.Study:
    study = optuna.create_study(study_name="theirs", storage=storage, direction="maximize")
    distributions = {"x": x, **others}
    params = {name: its.choices[0] if hasattr(its, "choices") else its.low for name, its in distributions.items()}
    for value in (0.5, 0.9):
        study.add_trial(create_trial(params=params, distributions=distributions, value=value))
    for _ in range(3):
        study.add_trial(create_trial(state=TrialState.FAIL))
    return study


def adopt(engine, trials=MORE, objective: Any = None, **changes: Any):
    return adopt_study(engine, find_study(engine, "theirs"), a_spec(**changes), objective, trials)


def test_the_trials_there_are_count_towards_the_budget_and_failed_ones_do_not(engine, storage):
    a_study(storage)
    study = adopt(engine, objective=Searched()).study
    assert study == open_study(engine, "theirs")
    assert (study.spec.budget.trials, study.spec.budget.max_failures) == (5, 4)
    assert best_of(engine, study).number == 1
    held = [claims.claim(Sessions(engine), study.study_id, study.budget, claims.Holder(worker="w")) for _ in range(4)]
    assert [its.number for its in held[:3] if isinstance(its, Claim)] == [5, 6, 7]
    assert not isinstance(held[3], Claim)
    assert optuna.load_study(study_name="theirs", storage=storage).metric_names == ["score"]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_other_bounds_new_params_running_trials_and_another_metric_are_told(engine, storage):
    study = a_study(storage, gone=IntDistribution(1, 2))
    study.set_metric_names(["accuracy"])
    study.set_user_attr("seed", "mine")
    storage.create_new_trial(study._study_id)
    assert adopt(engine, objective=Searched()).notes == [
        "x: 0 to 1 in its trials, 0 to 2 from now on",
        "no longer suggested: gone",
        "new, and in none of its trials: units",
        "what its trials have as accuracy is score from now on",
        "another program runs trial 5, within the budget; if it is gone, 'tuner release theirs 5' lets a worker run it",
    ]
    assert study.user_attrs == {"seed": "mine", "objective": "search.py:Searched", "metric": "score", "epochs": 1}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_plain_function_leaves_the_values_their_name(engine, storage):
    a_study(storage).set_metric_names(["accuracy"])
    assert adopt(engine, metric="value").study.spec.metric == "accuracy"
    assert find_study(engine, "theirs").metrics == ("accuracy",)


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({"x": FloatDistribution(0.1, 1, log=True)}, "x is 0.1 to 1, log (float) in its trials, 0 to 2 (float) here"),
        ({"units": CategoricalDistribution([8, 64])}, "units is 8 or 64 (categorical) in its trials, 8 to 64"),
        ({"units": FloatDistribution(8, 64)}, "units is 8 to 64 (float) in its trials, 8 to 64, whole numbers (int)"),
    ],
)
def test_a_param_that_a_study_cannot_have_both_ways_is_refused(engine, storage, theirs, told):
    a_study(storage, **theirs)
    with pytest.raises(UsageError) as caught:
        adopt(engine, objective=Searched())
    assert "study 'theirs' cannot go on with Searched: " + told in str(caught.value)
    assert find_study(engine, "theirs").spec is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"direction": "minimize"}, "study 'theirs' maximizes value, and search.py:Searched is to minimize score"),
        (
            {"sampler": SamplerSpec(name="grid", settings={"search_space": {}})},
            "--sampler grid searches all of a space",
        ),
        ({"trials": Amount(value=2, is_more=False)}, "2 trials of study 'theirs' are done, which count; a + adds"),
    ],
)
def test_a_spec_that_the_trials_do_not_go_with_is_refused(engine, storage, changes, told):
    a_study(storage)
    with pytest.raises(UsageError) as caught:
        adopt(engine, **changes)
    assert told in str(caught.value)
    assert find_study(engine, "theirs").spec is None


def test_a_study_with_a_spec_or_several_objectives_is_refused(engine, storage):
    a_study(storage)
    seen = find_study(engine, "theirs")
    adopt(engine)
    for known in (seen, find_study(engine, "theirs")):  # one that somebody else has adopted meanwhile, too
        with pytest.raises(
            TunerError,
            match="'theirs' has a spec already, and workers may run its trials: 'tuner extend theirs",
        ):
            adopt_study(engine, known, a_spec(), None, MORE)
    optuna.create_study(study_name="two", storage=storage, directions=["minimize", "maximize"])
    with pytest.raises(TunerError, match="study 'two' has 2 objectives"):
        adopt_study(engine, find_study(engine, "two"), a_spec(), None, MORE)
