"""What people do to a study from outside, as its claims, reports and rows show it."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import func, select

from storage import (
    InvalidWriteError,
    LiveTrialsError,
    PostgresStorage,
    StudyHaltedError,
    StudyNotFoundError,
    TrialNotWaitingError,
)
from storage.coordination import checkpoints, claims, control, records, standings, studies, workers
from storage.coordination.claims import Claim
from storage.coordination.standings import Budget, NothingToClaim
from storage.coordination.workers import WorkerSeen
from storage.database import tables

if TYPE_CHECKING:
    pass

BY_HAND = claims.GivenBack(outcome="released", reason="by hand", counts=False)
BUDGET = Budget(trials=10, timeout_s=None, max_failures=3, max_attempts=2)


@pytest.fixture
def study_id(storage: PostgresStorage) -> int:
    return studies.create_study(storage.engine, "s", "maximize", {"version": 1}, {}, "value").study_id


def claim(storage: PostgresStorage, study_id: int) -> Claim:
    held = claims.claim(storage.sessions, study_id, BUDGET, claims.Holder(worker="test"))
    assert isinstance(held, Claim)
    storage.hold(held)
    return held


@pytest.mark.parametrize(("state", "final"), [("paused", False), ("stopped", True)])
def test_a_halted_study_hands_out_nothing_until_it_is_resumed(storage, study_id, state, final):
    control.set_state(storage.sessions, study_id, state)
    refused = claims.claim(storage.sessions, study_id, BUDGET, claims.Holder(worker="test"))
    assert isinstance(refused, NothingToClaim)
    assert (refused.final, refused.paused) == (final, not final)
    assert standings.look(storage.sessions, study_id).state == state
    control.set_state(storage.sessions, study_id, "open")
    assert claim(storage, study_id).number == 0


@pytest.mark.slow
@pytest.mark.parametrize("state", ["paused", "stopped"])
def test_a_report_is_written_and_then_tells_that_the_study_was_halted(storage, study_id, state):
    held = claim(storage, study_id)
    storage.set_trial_intermediate_value(held.trial_id, 0, 0.5)
    assert control.set_state(storage.sessions, study_id, state) == 1
    with pytest.raises(StudyHaltedError, match=rf"the study was {state}: trial id {held.trial_id} is to be given back"):
        storage.set_trial_intermediate_value(held.trial_id, 1, 0.6)
    storage.let_go(held)
    assert storage.get_trial(held.trial_id).intermediate_values == {0: 0.5, 1: 0.6}
    storage.set_trial_intermediate_value(held.trial_id, 2, 0.7)  # as a client like any other
    assert claims.release(storage.sessions, held, BY_HAND, 2)
    assert control.set_state(storage.sessions, study_id, "open") == 0


def test_an_enqueued_trial_is_optunas_own_and_is_handed_out_first(storage, study_id):
    first = claim(storage, study_id)
    params = {"x": 0.25, "kind": None}
    assert [control.enqueue(storage.sessions, study_id, params) for _ in range(2)] == [1, 2]
    optuna.load_study(study_name="s", storage=storage).enqueue_trial(params)
    *ours, theirs = storage.get_all_trials(study_id)[1:]
    for trial in ours:
        trial.number, trial._trial_id = theirs.number, theirs._trial_id
    assert ours == [theirs] * 2
    assert [claim(storage, study_id).number for _ in range(4)] == [1, 2, 3, 4]
    assert first.number == 0


def test_a_cancelled_trial_keeps_its_number_and_counts_neither_as_done_nor_as_a_failure(storage, study_id):
    for _ in range(BUDGET.max_failures + 2):
        control.cancel(storage.sessions, study_id, control.enqueue(storage.sessions, study_id, {"x": 1}))
    standing = standings.look(storage.sessions, study_id)
    assert (standing.done, standing.failures, standing.cancelled, standing.waiting) == (0, 0, 5, 0)
    assert records.count_failures(storage.engine, study_id) == {"cancelled": (5, "taken back before it ran")}
    assert claim(storage, study_id).number == 5
    first = storage.get_all_trials(study_id)[0]
    assert (first.state, first.values, first.datetime_complete is None) == (TrialState.FAIL, None, False)


def test_only_a_waiting_trial_is_cancelled_one_with_a_checkpoint_too(storage, study_id):
    held = claim(storage, study_id)
    with pytest.raises(TrialNotWaitingError, match="trial 0 is running, and not waiting; 'tuner release' puts it back"):
        control.cancel(storage.sessions, study_id, 0)
    checkpoints.save(storage.sessions, held, b"state")
    assert claims.release(storage.sessions, held, BY_HAND, 2)
    control.cancel(storage.sessions, study_id, 0)
    with storage.engine.connect() as conn:
        assert conn.scalar(select(func.count()).select_from(tables.tuner_checkpoints)) == 0
    for number, told in ((0, "trial 0 is fail, and not waiting$"), (7, "there is no trial 7")):
        with pytest.raises(TrialNotWaitingError, match=told):
            control.cancel(storage.sessions, study_id, number)


def test_a_waiting_trial_is_listed_with_what_it_was_enqueued_with(storage, study_id):
    control.enqueue(storage.sessions, study_id, {"lr": 0.1, "units": 8})
    assert [trial.params for trial in records.list_trials(storage.engine, study_id)] == [{"lr": 0.1, "units": 8}]
    claim(storage, study_id)
    assert [trial.params for trial in records.list_trials(storage.engine, study_id)] == [{}]


def test_a_study_is_deleted_only_if_nothing_of_it_is_done_and_nobody_is_there(storage, study_id):
    held = claim(storage, study_id)
    assert control.delete_if_nothing_done(storage.sessions, study_id) is None
    assert claims.release(storage.sessions, held, BY_HAND, 2)
    storage.let_go(held)
    worker = WorkerSeen(worker_id=uuid.uuid4(), study_id=study_id, name="w", slots=[], versions={})
    workers.seen(storage.sessions, worker)
    assert control.delete_if_nothing_done(storage.sessions, study_id) is None
    workers.ended(storage.sessions, worker.worker_id)
    control.enqueue(storage.sessions, study_id, {"lr": 0.1})
    assert control.delete_if_nothing_done(storage.sessions, study_id) == [{"lr": 0.1}]
    with pytest.raises(StudyNotFoundError):
        control.delete_if_nothing_done(storage.sessions, study_id)


def test_a_name_that_the_database_cannot_hold_enqueues_nothing(storage, study_id):
    with pytest.raises(InvalidWriteError, match="a param's name"):
        control.enqueue(storage.sessions, study_id, {"a\0b": 1})
    assert storage.get_all_trials(study_id) == []


def test_deleting_is_refused_while_a_lease_lives(storage, study_id):
    held = claim(storage, study_id)
    with pytest.raises(LiveTrialsError, match=r"workers run 1 of its trials now \(number 0, test for one\)"):
        control.delete_study(storage.sessions, study_id)
    storage.set_trial_state_values(held.trial_id, TrialState.COMPLETE, [1.0])
    control.delete_study(storage.sessions, study_id)
    with storage.engine.connect() as conn:
        rows = {name: conn.scalar(select(func.count()).select_from(table)) for name, table in _TABLES}
    assert rows == dict.fromkeys(rows, 0)


def test_deleting_by_force_takes_the_trial_from_its_holder(storage, study_id):
    held = claim(storage, study_id)
    control.delete_study(storage.sessions, study_id, force=True)
    with pytest.raises(KeyError):
        storage.set_trial_intermediate_value(held.trial_id, 0, 1.0)
    with pytest.raises(StudyNotFoundError):
        claims.claim(storage.sessions, study_id, BUDGET, claims.Holder(worker="test"))


@pytest.mark.parametrize(
    "call",
    [
        lambda sessions: control.set_state(sessions, 7, "paused"),
        lambda sessions: control.enqueue(sessions, 7, {"x": 1}),
        lambda sessions: control.cancel(sessions, 7, 0),
        lambda sessions: control.extend(sessions, 7, lambda _: {"trials": 1}),
        lambda sessions: control.delete_study(sessions, 7),
    ],
)
def test_a_study_that_is_not_there_is_told(storage, call):
    with pytest.raises(StudyNotFoundError, match="'tuner studies' lists the others"):
        call(storage.sessions)


_TABLES = [
    (name, table)
    for metadata in (tables.optuna_metadata, tables.tuner_metadata)
    for name, table in metadata.tables.items()
    if name not in ("tuner_schema", "tuner_operations")  # of the database, and not of a study
]
