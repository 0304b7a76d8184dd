"""What is known of a study's params, by the trials that it has."""

from __future__ import annotations

from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from storage.coordination import studies
from storage.trials.creation import distributions_of, param_names


def test_the_names_and_distributions_of_a_studys_own_params(storage):
    first, second = (
        studies.create_study(storage.engine, name, "maximize", {"version": 1}, {}, "value").study_id for name in "ab"
    )
    ranges = {"lr": FloatDistribution(0.1, 0.2), "b": FloatDistribution(1, 2), "of_another": FloatDistribution(3, 4)}
    for study_id, names in ((first, ["lr"]), (first, ["b", "lr"]), (first, []), (second, ["of_another"])):
        its = {name: ranges[name] for name in names}
        storage.create_new_trial(
            study_id, create_trial(value=0.0, params={name: its[name].low for name in its}, distributions=its)
        )
    assert param_names(storage.sessions, first) == ["b", "lr"]
    assert param_names(storage.sessions, second) == ["of_another"]
    known = distributions_of(storage.sessions, first, list(ranges))
    assert known == {"lr": ranges["lr"], "b": ranges["b"]}


def test_only_a_waiting_trial_is_set_running(storage):
    study_id = studies.create_study(storage.engine, "s", "maximize", {"version": 1}, {}, "value").study_id
    trial_id = storage.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
    moves = [storage.set_trial_state_values(trial_id, TrialState.RUNNING) for _ in range(2)]
    assert moves == [True, False]
