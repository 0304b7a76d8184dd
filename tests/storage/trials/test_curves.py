"""Learning curves: written with the report, in its statement, and read back whole."""

from __future__ import annotations

import math

import optuna
import pytest
from optuna.trial import create_trial
from sqlalchemy import event, text

from storage import parse_url
from storage.coordination import claims, control, studies
from storage.coordination.claims import Claim
from storage.coordination.standings import Budget
from storage.database.errors import InvalidWriteError, LeaseLostError
from storage.trials.curves import CurvePoint, curves

BUDGET = Budget(trials=10, timeout_s=None, max_failures=3, max_attempts=2)


def an_epoch(step, value=0.5, **changes):
    details = {
        "train_loss": 0.1 + step,
        "seconds": 1.25,
        "rates": (0.1, 1e-7),
        "metrics": {"accuracy": value, 'a "name" ü': 5e-324, "large": 1.7e308},
        "train_metrics": {"accuracy": 0.75},
    }
    return CurvePoint(step=step, value=value, **{**details, **changes})


@pytest.fixture
def study_id(storage):
    return studies.create_study(storage.engine, "s", "maximize", {"version": 1}, {}, "accuracy").study_id


@pytest.fixture
def held(storage, study_id):
    held = claims.claim(storage.sessions, study_id, BUDGET, claims.Holder(worker="test"))
    assert isinstance(held, Claim)
    storage.hold(held)
    return held


def read(storage, study_id, numbers=None):
    with storage.engine.connect() as conn:
        return curves(conn, study_id, numbers)


def n_kept(storage):
    with storage.engine.connect() as conn:
        return conn.scalar(text("SELECT count(*) FROM tuner_curves"))


def test_an_epoch_is_written_with_its_report_in_one_statement_and_read_back_as_it_was(storage, study_id, held):
    statements = []
    event.listen(storage.engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    storage.report(held.trial_id, an_epoch(1))
    assert len(statements) == 1
    without_rates = an_epoch(2, rates=(), train_metrics={}, seconds=None)
    storage.report(held.trial_id, without_rates)
    assert read(storage, study_id) == {0: [an_epoch(1), without_rates]}
    assert storage.get_trial(held.trial_id).intermediate_values == {1: 0.5, 2: 0.5}
    # A report that is repeated, as after a lost answer or of an attempt that was resumed, is written over the first.
    again = an_epoch(1, 0.75, rates=(0.2,))
    storage.report(held.trial_id, again)
    assert read(storage, study_id) == {0: [again, without_rates]}


def test_what_is_no_number_is_none(storage, study_id, held):
    odd = {"nan": math.nan, "more": math.inf, "less": -math.inf, "none": None}
    storage.report(held.trial_id, an_epoch(1, train_loss=math.nan, rates=(math.inf, 0.5), metrics=odd))
    expected = an_epoch(1, train_loss=None, rates=(None, 0.5), metrics=dict.fromkeys(odd))
    assert read(storage, study_id) == {0: [expected]}
    with pytest.raises(InvalidWriteError, match="a metric's name cannot hold a NUL"):
        storage.report(held.trial_id, an_epoch(2, metrics={"a\0": 0.5}))
    assert storage.get_trial(held.trial_id).intermediate_values == {1: 0.5}


def test_what_others_report_is_a_curve_of_values(storage, study_id, held):
    trial = create_trial(value=0.25, intermediate_values={3: 0.5, 0: math.nan, 7: math.inf})
    storage.create_new_trial(study_id, trial)
    storage.report(held.trial_id, an_epoch(1))
    values = [CurvePoint(step=step, value=value) for step, value in ((0, None), (3, 0.5), (7, None))]
    assert read(storage, study_id) == {0: [an_epoch(1)], 1: values}
    assert read(storage, study_id, [1, 2]) == {1: values}


def test_who_lost_the_lease_writes_neither_report_nor_epoch(storage, study_id, held):
    storage.report(held.trial_id, an_epoch(1))
    claims.release(storage.sessions, held, claims.LOST, 2)
    assert read(storage, study_id) == {}
    assert n_kept(storage) == 0  # the next attempt may end at an earlier epoch
    with pytest.raises(LeaseLostError):
        storage.report(held.trial_id, an_epoch(2))
    assert n_kept(storage) == 0


def test_the_curve_of_a_trial_that_failed_stays(storage, study_id, held):
    storage.report(held.trial_id, an_epoch(1))
    claims.release(storage.sessions, held, claims.LOST, 1)
    assert read(storage, study_id) == {0: [an_epoch(1)]}


@pytest.mark.parametrize("by_optuna", [True, False])
def test_curves_go_with_their_study(storage, study_id, held, database, by_optuna):
    storage.report(held.trial_id, an_epoch(1))
    if by_optuna:
        stock = optuna.storages.RDBStorage(parse_url(database).render_as_string(hide_password=False))
        optuna.delete_study(study_name="s", storage=stock)
        stock.remove_session()
        stock.engine.dispose()
    else:
        control.delete_study(storage.sessions, study_id, force=True)
    assert n_kept(storage) == 0
