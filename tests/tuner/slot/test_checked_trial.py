"""What a trial suggests: values of the params' own types, wherever they come from."""

import pytest
import torch
from attempts import a_spec
from optuna.trial import TrialState

from tuner.slot.attempt import TrialObjective, run_attempt
from tuner.slot.checked_trial import CheckedTrial
from tuner.spec import SamplerSpec
from tuner.study.sampling import build_sampler


def run(study, objective):
    """Run the study's next trial of a plain function as a slot does; its outcome, and the trial as it is kept."""
    what = TrialObjective.load(a_spec(), objective, "data", torch.device("cpu"))
    trial = CheckedTrial(study, study.ask()._trial_id, lambda: None)
    return run_attempt(what, trial), study.trials[-1]


def test_queued_values_reach_the_objective_as_the_types_of_their_params(study):
    given = {}

    def objective(trial):
        given["units"] = trial.suggest_int("units", 8, 64)
        given["dropout"] = trial.suggest_float("dropout", 0, 0.5)
        given["floor"] = trial.suggest_float("floor", 0, 4)
        given["year"] = trial.suggest_categorical("year", ["2023", "2024"])
        assert trial.params == given
        assert [type(value) for value in trial.params.values()] == [int, float, float, str]
        return 1.0

    study.enqueue_trial({"units": 32.0, "dropout": ".2", "floor": 1, "year": 2024})
    outcome, trial = run(study, objective)
    assert outcome.message == ""
    assert trial.params == given == {"units": 32, "dropout": 0.2, "floor": 1.0, "year": "2024"}


def test_a_param_suggested_twice_keeps_its_queued_value(study):
    study.enqueue_trial({"x": "1"})
    outcome, _ = run(study, lambda trial: trial.suggest_float("x", 0, 1) + trial.suggest_float("x", 0, 1))
    assert (outcome.state, outcome.value) == (TrialState.COMPLETE, 2.0)


@pytest.mark.parametrize(
    ("suggest", "queued", "message"),
    [
        (lambda trial: trial.suggest_int("n", 8, 64), 12.7, "n: 8 to 64, whole numbers; got 12.7"),
        (lambda trial: trial.suggest_float("n", 1e-4, 0.03, log=True), 5, "n: 0.0001 to 0.03, log; got 5"),
        (lambda trial: trial.suggest_int("n", 0, 2**63 - 1), 2**53 + 1, "n: whole numbers need to be within 2^53"),
        (lambda trial: trial.suggest_int("n", 0, 2**63 - 1), None, "n: whole numbers need to be within 2^53"),
        (lambda trial: trial.suggest_categorical("n", [(16,), "b"]), None, "n: choices need to be text, numbers, True"),
    ],
)
@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
def test_what_cannot_be_fails_the_trial_by_name_and_is_not_recorded(study, suggest, queued, message):
    if queued is not None:
        study.enqueue_trial({"n": queued})
    outcome, trial = run(study, suggest)
    assert (outcome.failure, trial.params) == ("user_error", {})
    assert f"ParamError: {message}" in outcome.message
    assert "test_checked_trial.py, line" in outcome.message


def test_a_grid_s_values_have_the_types_of_their_params(study):
    spec = SamplerSpec(name="grid", settings={"search_space": {"lr": [1], "units": [8.0]}})
    study.sampler = build_sampler(spec, 0, 0)

    def objective(trial):
        assert type(trial.suggest_float("lr", 0, 1)) is float
        trial.suggest_int("units", 8, 64)
        assert [type(value) for value in trial.params.values()] == [float, int]
        return 0.0

    outcome, _ = run(study, objective)
    assert outcome.message == ""
    study.sampler = build_sampler(SamplerSpec(name="grid", settings={"search_space": {"units": [8.5]}}), 0, 1)
    outcome, _ = run(study, lambda trial: trial.suggest_int("units", 8, 64))
    assert "units: 8 to 64, whole numbers; got 8.5" in outcome.message
