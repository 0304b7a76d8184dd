"""The index of finished trials, told of what changed by the reports of a trial that is held."""

from __future__ import annotations

import math
import random

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.pruners import MedianPruner
from optuna.trial import TrialState, create_trial
from sqlalchemy import event

from storage.coordination import claims, studies
from storage.coordination.claims import Claim
from storage.coordination.standings import Budget
from storage.optuna_storage.pruning import IndexedPercentilePruner
from storage.trials import finished
from storage.trials.finished import FinishedTrials, Reports

BUDGET = Budget(trials=1000, timeout_s=None, max_failures=3, max_attempts=2)


@pytest.fixture
def study_id(storage):
    return studies.create_study(storage.engine, "s", "maximize", {"version": 1}, {}, "value").study_id


@pytest.fixture
def pruner(storage, study_id):
    return IndexedPercentilePruner(storage, study_id, 50.0, n_startup_trials=1)


@pytest.fixture
def trial(storage, study_id, pruner):
    """A trial under our lease, in a study with the indexed pruner."""
    held = claims.claim(storage.sessions, study_id, BUDGET, claims.Holder(worker="test"))
    assert isinstance(held, Claim)
    storage.hold(held)
    return optuna.Trial(optuna.load_study(study_name="s", storage=storage, pruner=pruner), held.trial_id)


@pytest.fixture
def sent(storage):
    statements = []
    event.listen(storage.engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    return statements


def finish_one(storage, study_id, values, state=TrialState.COMPLETE):
    value = 0.0 if state == TrialState.COMPLETE else None
    storage.create_new_trial(study_id, create_trial(state=state, value=value, intermediate_values=values))


def test_a_decision_after_a_report_takes_no_query_unless_a_trial_has_finished(other, study_id, trial, sent):
    finish_one(other, study_id, dict.fromkeys(range(5), 0.5))
    trial.report(0.6, 0)
    assert not trial.should_prune()
    sent.clear()
    trial.report(0.6, 1)
    assert (trial.should_prune(), len(sent)) == (False, 1)
    finish_one(other, study_id, dict.fromkeys(range(5), 1.0))
    finish_one(other, study_id, dict.fromkeys(range(5), 1.0), TrialState.PRUNED)
    sent.clear()
    trial.report(0.6, 2)
    assert (trial.should_prune(), len(sent)) == (True, 2)


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=6), max_size=4),
    st.floats(0, 100),
)
def test_a_percentile_is_numpys_whatever_was_added_since(parts, percentile):
    reports, values = Reports(), np.array([])
    for part in parts:
        reports.add(np.array(part, dtype=">f8").tobytes())
        values = np.append(values, part)
        wanted = math.nan if np.isnan(values).all() else float(np.nanpercentile(values, percentile))
        assert reports.percentile(percentile) == pytest.approx(wanted, rel=0, abs=0, nan_ok=True)
    assert reports.count == len(values)


def test_a_decision_later_than_a_moment_after_the_report_asks_anew(other, study_id, trial, sent, monkeypatch):
    monkeypatch.setattr(finished, "_MOMENT_S", 0.0)
    finish_one(other, study_id, {0: 0.5})
    trial.report(0.6, 0)
    finish_one(other, study_id, {0: 1.0})
    sent.clear()
    assert (trial.should_prune(), len(sent)) == (True, 2)


def test_a_decision_on_another_trial_or_step_asks_anew(storage, other, study_id, trial, pruner):
    trial.report(0.6, 0)
    finish_one(other, study_id, {0: 1.0})
    mine = storage.get_trial(trial._trial_id)
    mine._trial_id += 1
    assert pruner.prune(trial.study, mine)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_it_decides_as_optuna_while_others_start_and_finish_trials(other, study_id, trial, seed):
    chance = random.Random(seed)
    stock = optuna.load_study(study_name="s", storage=other, pruner=MedianPruner(n_startup_trials=1))
    running = []
    for step in range(40):
        for _ in range(chance.randrange(3)):
            running.append(other.create_new_trial(study_id))
            for reported in range(40):
                other.set_trial_intermediate_value(running[-1], reported, chance.random())
        while running and chance.random() < 0.4:
            state = chance.choice([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
            ended = running.pop(chance.randrange(len(running)))
            other.set_trial_state_values(ended, state, [0.0] if state == TrialState.COMPLETE else None)
        trial.report(step / 40, step)
        theirs = stock.pruner.prune(stock, other.get_trial(trial._trial_id))
        assert trial.should_prune() == theirs, step


def test_what_is_told_twice_counts_once(storage, other, study_id):
    index = FinishedTrials(storage.sessions, study_id)
    finish_one(other, study_id, {0: 0.5})
    told = [(trial._trial_id, trial.number, trial.state.name) for trial in other.get_all_trials(study_id)]
    for _ in range(2):
        index.learn(told, 99, 0)
    with index.up_to_date(99, 0):
        assert (index.count, index.at(0).count) == (1, 1)
    index.learn(told, 99, 1)
    with index.up_to_date(99, 1):
        assert (index.count, index.at(0).count) == (1, 1)


def test_what_is_told_in_any_order_counts(storage, other, study_id):
    """A small table is read in the order of its last changes."""
    index = FinishedTrials(storage.sessions, study_id)
    for value in (0.5, 0.7, 0.6):
        finish_one(other, study_id, {0: value})
    told = [(trial._trial_id, trial.number, trial.state.name) for trial in other.get_all_trials(study_id)]
    index.learn(reversed(told), 99, 0)
    with index.up_to_date(99, 0):
        assert (index.count, index.at(0).count, index.at(0).percentile(100)) == (3, 3, 0.7)
