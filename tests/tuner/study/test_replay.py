"""What rules would have done to complete trials."""

import math

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from storage import open_storage
from storage.coordination.history import complete_curves
from storage.optuna_storage.rules import Never, Percentile, Rungs, standard_rungs
from tuner.spec import PrunerSpec
from tuner.study.joining import find_study
from tuner.study.replay import Past, replay, replayed, rules_for


def trials(n, epochs=10, crossing=()):
    """Trials that are as good at each epoch as in the end, but for those in `crossing`, which begin as the worst."""
    return [
        Past(
            number=number,
            value=float(number),
            reported=[float(n + number if number in crossing and step < 3 else number) for step in range(epochs)],
        )
        for number in range(n)
    ]


def test_a_rule_that_stops_nothing_saves_nothing():
    its = replayed(trials(20), "none", Never())
    assert (its.saved.mean, its.stopped.mean, its.best_kept, its.often) == (0.0, 0.0, 1.0, {})


def test_rungs_save_most_and_keep_the_best_where_curves_do_not_cross():
    its = replayed(trials(20), "rungs", Rungs((0, 2)))
    assert 0.5 < its.saved.mean < 0.9
    assert its.saved.low < its.saved.mean < its.saved.high
    assert its.best_kept == 1.0
    assert 0 not in its.often


def test_whom_a_rule_stops_of_the_best_is_told_by_number():
    its = replayed(trials(20, crossing=[0]), "rungs", Rungs((0, 2)))
    assert its.best_kept < 0.5
    assert its.often[0] == pytest.approx(1 - its.best_kept)
    assert its.stopped.mean == pytest.approx(sum(its.often.values()) / 2)  # of the best two of twenty


def test_a_trial_is_asked_about_after_each_report_but_the_last():
    assert replayed(trials(20, epochs=1), "rungs", Rungs((0,))).saved.mean == 0.0
    assert replayed(trials(20, epochs=2), "rungs", Rungs((0,))).saved.mean > 0.0
    assert replayed(
        [Past(number=n, value=1.0, reported=[math.nan, 1.0]) for n in range(10)], "r", Rungs((0,))
    ).saved.mean


def test_the_study_s_own_settings_are_replayed_as_well():
    assert list(rules_for(20, PrunerSpec())) == ["median", "percentile", "rungs"]
    rungs = rules_for(15, PrunerSpec(name="rungs", settings={"epochs": 20, "eta": 3}))  # none ran all of its epochs
    assert rungs["rungs:eta=3"] == standard_rungs(20, 3)
    median = rules_for(20, PrunerSpec(name="median", settings={"n_startup_trials": 2}))
    assert median["median:n_startup_trials=2"] == Percentile(n_startup_trials=2)
    assert list(rules_for(20, PrunerSpec(name="percentile", settings={"percentile": 25.0}))) == list(
        rules_for(20, None)
    )
    assert list(rules_for(20, PrunerSpec(name="median", settings={"interval_steps": 2}))) == list(rules_for(20, None))


def test_a_study_s_complete_trials_are_replayed_evenly_chosen_of_many(database):
    storage = open_storage(database)
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize")
    for number in range(30):
        state = TrialState.PRUNED if number % 6 == 5 else TrialState.COMPLETE
        reported = {step: number + step / 10 for step in (1, 2, 3)} if number else {}
        study.add_trial(create_trial(state=state, value=float(number), intermediate_values=reported))
    with storage.engine.connect() as conn:
        n_complete, curves = complete_curves(conn, study._study_id, 20)
    assert n_complete == 25
    assert list(curves) == [number for number in range(30) if number % 6 != 5][::2]
    assert curves[0] == (0.0, {})
    assert curves[2] == (2.0, {1: 2.1, 2: 2.2, 3: 2.3})
    found = replay(storage.engine, find_study(storage.engine, "s"), orders=20)
    assert (found.complete, found.replayed, found.epochs, found.top) == (25, 24, 3, 3)
    assert [its.best_kept for its in found.rules] == [1.0, 1.0, 1.0]
    assert all(its.saved.mean > 0 for its in found.rules)
    storage.engine.dispose()
