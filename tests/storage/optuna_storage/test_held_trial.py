"""A trial under our lease reads as it is in the database, without asking it."""

from __future__ import annotations

import math

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from sqlalchemy import event

from storage.coordination import claims, studies
from storage.coordination.claims import Claim
from storage.coordination.standings import Budget

BUDGET = Budget(trials=10, timeout_s=None, max_failures=3, max_attempts=2)

WRITES = {
    "float": lambda storage, trial: storage.set_trial_param(trial, "x", 0.5, FloatDistribution(0, 1)),
    "int": lambda storage, trial: storage.set_trial_param(trial, "n", 3.0, IntDistribution(1, 9)),
    "choice": lambda storage, trial: storage.set_trial_param(trial, "c", 1.0, CategoricalDistribution((None, "b"))),
    "again": lambda storage, trial: storage.set_trial_param(trial, "x", 0.75, FloatDistribution(0, 1)),
    "report": lambda storage, trial: storage.set_trial_intermediate_value(trial, 1, 0.5),
    "another": lambda storage, trial: storage.set_trial_intermediate_value(trial, 1, 1),
    "nan": lambda storage, trial: storage.set_trial_intermediate_value(trial, 2, math.nan),
    "attr": lambda storage, trial: storage.set_trial_user_attr(trial, "a", (1, {"b": 2})),
    "attrs": lambda storage, trial: storage.set_trial_user_attrs(trial, {"a": 1, "b": None}),
    "system": lambda storage, trial: storage.set_trial_system_attr(trial, "s", [math.inf]),
}


@pytest.fixture
def held(storage) -> Claim:
    study_id = studies.create_study(storage.engine, "s", "maximize", {"version": 1}, {}, "value").study_id
    claimed = claims.claim(storage.sessions, study_id, BUDGET, claims.Holder(worker="test"))
    assert isinstance(claimed, Claim)
    storage.hold(claimed)
    return claimed


def shown(trial):
    """The trial as text, in which NaN is equal to NaN and a float differs from an int."""
    return repr(
        {name: sorted(value.items()) if isinstance(value, dict) else value for name, value in vars(trial).items()}
    )


def test_after_each_write_it_reads_as_others_read_it(storage, other, held):
    assert shown(storage.get_trial(held.trial_id)) == shown(other.get_trial(held.trial_id))
    for name, write in WRITES.items():
        write(storage, held.trial_id)
        assert shown(storage.get_trial(held.trial_id)) == shown(other.get_trial(held.trial_id)), name
    storage.set_trial_state_values(held.trial_id, TrialState.COMPLETE, [1.0])
    assert shown(storage.get_trial(held.trial_id)) == shown(other.get_trial(held.trial_id))


def test_it_is_read_once(storage, held):
    sent = []
    first = storage.get_trial(held.trial_id)
    event.listen(storage.engine, "before_cursor_execute", lambda *call: sent.append(call[2]))
    first.user_attrs["mine"] = 1  # a copy, which is the receiver's
    assert storage.get_trial(held.trial_id).user_attrs == {}
    assert sent == []
    storage.let_go(held)
    storage.get_trial(held.trial_id)
    assert len(sent) == 3
