"""Plans of the frequent statements on a study of some thousand trials: what they read does not grow with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from filling import fill
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState
from psycopg2.extensions import TRANSACTION_STATUS_IDLE
from sqlalchemy import event, text

from storage import PostgresStorage
from storage.coordination import claims
from storage.coordination.standings import Budget
from storage.trials.finished import FinishedTrials

N_TRIALS = 3000
# More than what a trial has, and less than any part of a study's history.
FEW_ROWS = 200
BUDGET = Budget(trials=10**6, timeout_s=None, max_failures=9, max_attempts=3)


@pytest.fixture
def storage(database: str) -> Iterator[PostgresStorage]:
    storage = PostgresStorage(database)
    for name in ("other", "s"):  # the plans must not depend on the study being the only one
        fill(storage.engine, storage.create_new_study([StudyDirection.MINIMIZE], name), N_TRIALS)
    yield storage
    storage.engine.dispose()


def plans_of(storage: PostgresStorage, call: Any) -> list[dict[str, Any]]:
    """Return the plan, with the rows that were really read, of each statement of a call."""
    plans: list[dict[str, Any]] = []

    def explain(conn, cursor, statement, parameters, context, executemany):
        if statement.startswith(("BEGIN", "COMMIT")):
            return
        # Run and undone before it is run.
        begin, undo = ("SAVEPOINT before", "ROLLBACK TO before")
        if cursor.connection.info.transaction_status == TRANSACTION_STATUS_IDLE and cursor.connection.autocommit:
            begin, undo = ("BEGIN", "ROLLBACK")
        with cursor.connection.cursor() as explaining:
            explaining.execute(begin)
            explaining.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters)
            plans.append(explaining.fetchone()[0][0]["Plan"])
            explaining.execute(undo)

    event.listen(storage.engine, "before_cursor_execute", explain)
    try:
        call()
    finally:
        event.remove(storage.engine, "before_cursor_execute", explain)
    return plans


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def check_reads_few_rows(plans: list[dict[str, Any]]) -> None:
    assert plans
    for plan in plans:
        for node in nodes(plan):
            read = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
            assert read * node["Actual Loops"] <= FEW_ROWS, node


CALLS = {
    "report": lambda storage, trial: storage.set_trial_intermediate_value(trial, 1, 0.5),
    "param": lambda storage, trial: storage.set_trial_param(trial, "x1", 0.5, FloatDistribution(0, 1)),
    "attribute": lambda storage, trial: storage.set_trial_user_attr(trial, "key", 1),
    "finish": lambda storage, trial: storage.set_trial_state_values(trial, TrialState.COMPLETE, [1.0]),
    "number": lambda storage, trial: storage.get_trial_number_from_id(trial),
    "create": lambda storage, trial: storage.create_new_trial(2),
    "refresh": lambda storage, trial: storage.get_all_trials(2, deepcopy=False),
    "claim": lambda storage, trial: claims.claim(storage.sessions, 2, BUDGET, claims.Holder(worker="test")),
    "stale": lambda storage, trial: storage._get_stale_trial_ids(2),
}


@pytest.mark.slow
def test_reading_one_trial_reads_few_rows(storage):
    trial_id = storage.get_trial_id_from_study_id_trial_number(2, N_TRIALS // 2)
    check_reads_few_rows(plans_of(storage, lambda: storage.get_trial(trial_id)))


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_a_frequent_call_reads_few_rows_whatever_the_size_of_the_study(storage, call):
    held = claims.claim(storage.sessions, 2, BUDGET, claims.Holder(worker="test"))
    storage.hold(held)
    storage.record_heartbeat(held.trial_id)
    storage.get_all_trials(2, deepcopy=False)
    plans = plans_of(storage, lambda: call(storage, held.trial_id))
    check_reads_few_rows(plans)


@pytest.mark.slow
def test_a_report_that_brings_along_what_finished_reads_few_rows(storage):
    held = claims.claim(storage.sessions, 2, BUDGET, claims.Holder(worker="test"))
    storage.hold(held)
    index = FinishedTrials(storage.sessions, 2)
    with index.up_to_date(held.trial_id, 0):
        assert index.count > N_TRIALS / 2
    storage.follow(index)
    check_reads_few_rows(plans_of(storage, lambda: storage.set_trial_intermediate_value(held.trial_id, 1, 0.5)))


@pytest.mark.slow
def test_the_check_finds_a_plan_that_reads_a_whole_study(storage):
    plans = plans_of(storage, lambda: PostgresStorage.get_n_trials(storage, 2))
    with pytest.raises(AssertionError):
        check_reads_few_rows(plans)
    with storage.engine.connect() as conn:
        assert conn.scalar(text("select count(*) from trials")) == 2 * N_TRIALS
