"""A trial that is to be pruned, and is audited, runs on and still ends as a pruned one."""

import pytest
import torch
from attempts import PruneAt, Signs, a_spec
from optuna.trial import TrialState

from tuner.slot.attempt import TrialObjective
from tuner.slot.audit import run_audited
from tuner.slot.checked_trial import CheckedTrial


def run(study, objective, tmp_path, audit=1.0, **attrs):
    """Run the study's next trial, prune it at its second step, and tell its end, as a slot does."""
    study.pruner = PruneAt(2)
    spec = a_spec(epochs=4).model_copy(update={"audit": audit})
    what = TrialObjective.load(spec, objective, tmp_path, torch.device("cpu"))
    asked = study.ask()
    for name, value in attrs.items():
        asked.set_user_attr(name, value)
    trial = CheckedTrial(study, asked._trial_id, lambda: None)
    outcome = run_audited(what, trial)
    for name, value in outcome.attrs.items():
        trial.set_user_attr(name, value)
    study.tell(trial, outcome.value, outcome.state)
    return outcome, study.trials[-1]


def test_an_audited_trial_runs_to_its_end_and_ends_as_pruned(study, tmp_path):
    outcome, trial = run(study, Signs(), tmp_path)
    assert (outcome.state, outcome.value) == (TrialState.PRUNED, None)
    assert list(trial.intermediate_values) == [1, 2, 3, 4]
    assert trial.user_attrs["audit.pruned_at"] == 2
    assert trial.user_attrs["audit.value"] == max(trial.intermediate_values.values())
    assert trial.user_attrs["audit.seconds"] <= trial.user_attrs["seconds"]
    with pytest.raises(ValueError, match="No trials are completed"):
        _ = study.best_trial


def test_without_an_audit_it_is_pruned_and_nothing_is_noted(study, tmp_path):
    outcome, trial = run(study, Signs(), tmp_path, audit=0.0)
    assert outcome.state == TrialState.PRUNED
    assert list(trial.intermediate_values) == [1, 2]
    assert trial.user_attrs.keys().isdisjoint({"audit.pruned_at", "audit.value", "audit.seconds"})


def test_a_trial_that_was_marked_before_it_was_given_back_stays_so(study, tmp_path):
    outcome, trial = run(study, Signs(), tmp_path, audit=0.0, **{"audit.pruned_at": 1})
    assert outcome.state == TrialState.PRUNED
    assert (len(trial.intermediate_values), trial.user_attrs["audit.pruned_at"]) == (4, 1)


def a_function(after):
    def objective(trial):
        for step in range(1, 4):
            trial.report(0.5, step)
            assert not trial.should_prune()
        return after()

    return objective


def test_one_that_diverges_came_to_nothing_and_one_that_fails_otherwise_is_failed(study, tmp_path):
    outcome, trial = run(study, a_function(lambda: float("nan")), tmp_path)
    assert (outcome.state, outcome.failure) == (TrialState.PRUNED, None)
    assert trial.user_attrs["audit.value"] is None
    assert "failure" not in trial.user_attrs
    outcome, trial = run(study, a_function(lambda: 1 / 0), tmp_path)
    assert (outcome.state, outcome.failure) == (TrialState.FAIL, "user_error")


def test_who_is_audited_follows_from_the_study_s_seed_and_the_number():
    spec = a_spec().model_copy(update={"audit": 0.1})
    drawn = [spec.is_audited(number) for number in range(2000)]
    assert 140 < sum(drawn) < 260
    assert drawn == [spec.is_audited(number) for number in range(2000)]
    assert drawn != [spec.model_copy(update={"seed": 1}).is_audited(number) for number in range(2000)]
    assert not any(a_spec().is_audited(number) for number in range(2000))
    assert all(spec.model_copy(update={"audit": 1.0}).is_audited(number) for number in range(100))
    assert "audit" not in a_spec().model_dump()
    assert spec.model_dump()["audit"] == 0.1
