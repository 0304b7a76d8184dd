"""Claims and leases: exact budgets, dense numbers, and trials that are never lost nor held twice."""

from __future__ import annotations

import signal
import threading
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import optuna
import pytest
from command import wait_for
from optuna.trial import TrialState
from sqlalchemy import Engine, text

from storage import (
    PostgresStorage,
    StudyNotFoundError,
    TrialNotRunningError,
    ensure_schema,
    open_engine,
    open_storage,
)
from storage.coordination import claims, records, standings, studies
from storage.coordination.claims import Claim
from storage.coordination.standings import Budget, NothingToClaim
from storage.database.sessions import Sessions

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

BY_HAND = claims.GivenBack(outcome="released", reason="by hand", counts=False)
BUDGET = Budget(trials=10, timeout_s=None, max_failures=3, max_attempts=2)

# Claims and completes trials until the budget is used up; prints the numbers that it ran.
_WORKER = """
import sys
from storage import open_engine
from storage.coordination import claims, standings
from storage.database.sessions import Sessions
from sqlalchemy import text
engine = open_engine(sys.argv[1])
budget = standings.Budget(trials=int(sys.argv[3]), timeout_s=None, max_failures=0, max_attempts=1)
sys.stdin.readline()
while True:
    held = claims.claim(Sessions(engine), int(sys.argv[2]), budget, claims.Holder(worker="test"))
    if isinstance(held, standings.NothingToClaim):
        if held.final:
            break
        continue
    with engine.begin() as conn:
        conn.execute(text("update trials set state = 'COMPLETE' where trial_id = :id"), {"id": held.trial_id})
    print(held.number)
"""

_HOLDER = """
import sys
from storage import open_engine
from storage.coordination import claims, standings
from storage.database.sessions import Sessions
engine = open_engine(sys.argv[1])
budget = standings.Budget(trials=10, timeout_s=None, max_failures=3, max_attempts=2)
print(claims.claim(Sessions(engine), int(sys.argv[2]), budget, claims.Holder(worker="holder")).number, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    engine = open_engine(database)
    ensure_schema(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def study_id(engine: Engine) -> int:
    return studies.create_study(engine, "s", "maximize", {"version": 1}, {}, "value").study_id


def finish(engine: Engine, held: Claim, state: str = "COMPLETE") -> None:
    with engine.begin() as conn:
        conn.execute(
            text("update trials set state = cast(:state as trialstate) where trial_id = :id"),
            {"state": state, "id": held.trial_id},
        )


def expire(engine: Engine, held: Claim) -> None:
    """Let the lease run out now, as if LEASE_S seconds had passed without a renewal."""
    with engine.begin() as conn:
        conn.execute(
            text("update tuner_leases set expires_at = now() - interval '1 hour' where trial_id = :id"),
            {"id": held.trial_id},
        )


def claim(engine: Engine, study_id: int, budget: Budget = BUDGET) -> Claim:
    held = claims.claim(Sessions(engine), study_id, budget, claims.Holder(worker="test"))
    assert isinstance(held, Claim)
    return held


def end_of_budget(engine: Engine, study_id: int, budget: Budget) -> str | None:
    closed = standings.closed(standings.look(Sessions(engine), study_id), budget)
    return closed.reason if closed is not None and closed.final else None


def state_of(engine: Engine, held: Claim) -> str:
    with engine.connect() as conn:
        return str(
            conn.execute(text("select state from trials where trial_id = :id"), {"id": held.trial_id}).scalar_one()
        )


def test_claims_number_the_trials_from_zero_without_gaps(engine: Engine, study_id: int) -> None:
    assert [claim(engine, study_id).number for _ in range(3)] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 8])
def test_the_budget_is_exact_whatever_the_number_of_workers(
    engine: Engine,
    database: str,
    study_id: int,
    processes: int,
    start_python: Callable[..., subprocess.Popen[str]],
) -> None:
    trials = 40
    workers = [start_python(_WORKER, database, str(study_id), str(trials)) for _ in range(processes)]
    outputs = [worker.communicate("go\n", timeout=60) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * processes, outputs
    numbers = [int(line) for stdout, _ in outputs for line in stdout.split()]
    assert sorted(numbers) == list(range(trials))


def test_running_trials_hold_their_share_of_the_budget(engine: Engine, study_id: int) -> None:
    budget = replace(BUDGET, trials=2)
    first, _ = claim(engine, study_id, budget), claim(engine, study_id, budget)
    refused = claims.claim(Sessions(engine), study_id, budget, claims.Holder(worker="test"))
    assert refused == NothingToClaim(final=False, reason="2 running trials hold the rest of the budget")
    finish(engine, first, "FAIL")
    assert claim(engine, study_id, budget).number == 2


@pytest.mark.parametrize("state", ["COMPLETE", "PRUNED"])
def test_complete_and_pruned_trials_use_the_budget_up(engine: Engine, study_id: int, state: str) -> None:
    budget = replace(BUDGET, trials=1)
    finish(engine, claim(engine, study_id, budget), state)
    refused = claims.claim(Sessions(engine), study_id, budget, claims.Holder(worker="test"))
    assert isinstance(refused, NothingToClaim)
    assert refused.final
    assert end_of_budget(engine, study_id, budget) == "the budget of 1 trials is used up"


def test_more_failures_than_allowed_end_the_study(engine: Engine, study_id: int) -> None:
    budget = replace(BUDGET, max_failures=1)
    finish(engine, claim(engine, study_id, budget), "FAIL")
    finish(engine, claim(engine, study_id, budget), "FAIL")
    refused = claims.claim(Sessions(engine), study_id, budget, claims.Holder(worker="test"))
    reason = "2 trials failed, more than the 1 allowed"
    assert refused == NothingToClaim(final=True, reason=reason, limit="max_failures")


def test_no_trial_starts_after_the_timeout_by_the_databases_clock(engine: Engine, study_id: int) -> None:
    budget = replace(BUDGET, timeout_s=100.0)
    claim(engine, study_id, budget)
    with engine.begin() as conn:
        conn.execute(text("update tuner_studies set created_at = now() - interval '101 seconds'"))
    refused = claims.claim(Sessions(engine), study_id, budget, claims.Holder(worker="test"))
    reason = "the study's time of 100 s is over"
    assert refused == NothingToClaim(final=True, reason=reason, limit="timeout")


def test_waiting_trials_are_handed_out_first_oldest_first(engine: Engine, study_id: int, database: str) -> None:
    study = optuna.load_study(study_name="s", storage=open_storage(database))
    study.enqueue_trial({"x": 1})
    study.enqueue_trial({"x": 2})
    assert [claim(engine, study_id).number for _ in range(3)] == [0, 1, 2]
    trial = optuna.Trial(study, study.trials[1]._trial_id)
    assert trial.suggest_int("x", 0, 9) == 2


def test_stock_optuna_and_claims_share_one_numbering(engine: Engine, study_id: int, database: str) -> None:
    study = optuna.load_study(study_name="s", storage=open_storage(database))
    numbers = []
    for _ in range(3):
        numbers.append(claim(engine, study_id).number)
        numbers.append(study._storage.get_trial(study._storage.create_new_trial(study_id)).number)
    assert numbers == list(range(6))


def test_a_trial_whose_worker_was_killed_runs_again_with_its_number_and_params(
    engine: Engine, study_id: int, database: str, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    holder = start_python(_HOLDER, database, str(study_id))
    assert holder.stdout is not None
    assert holder.stdout.readline() == "0\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    study = optuna.load_study(study_name="s", storage=open_storage(database))
    first = study.trials[0]
    trial = optuna.Trial(study, first._trial_id)
    x = trial.suggest_float("x", 0, 1)
    trial.report(0.5, step=7)
    expire(engine, Claim(study_id=1, trial_id=first._trial_id, number=0, attempt=1, token=uuid.uuid4()))

    again = claim(engine, study_id)
    assert (again.number, again.attempt) == (0, 2)
    assert optuna.Trial(study, again.trial_id).suggest_float("x", 0, 1) == x
    assert study.trials[0].intermediate_values == {}
    assert study.get_trials(states=[TrialState.RUNNING])[0].number == 0


def test_a_lease_that_was_renewed_in_time_is_kept(engine: Engine, study_id: int) -> None:
    held = claim(engine, study_id)
    expire(engine, held)
    assert claims.renew(Sessions(engine), held)
    assert claim(engine, study_id).number == 1


def test_the_former_holder_of_a_trial_can_neither_renew_nor_release_it(engine: Engine, study_id: int) -> None:
    former = claim(engine, study_id)
    expire(engine, former)
    now = claim(engine, study_id)
    assert now.number == former.number
    assert not claims.renew(Sessions(engine), former)
    assert not claims.release(Sessions(engine), former, claims.LOST, 2)
    assert claims.renew(Sessions(engine), now)


def test_a_trial_whose_worker_is_lost_in_each_attempt_fails_and_says_why(
    engine: Engine, study_id: int, database: str
) -> None:
    for attempt in range(BUDGET.max_attempts):
        held = claim(engine, study_id)
        assert (held.number, held.attempt) == (0, attempt + 1)
        expire(engine, held)
    assert claim(engine, study_id).number == 1
    failed = optuna.load_study(study_name="s", storage=open_storage(database)).trials[0]
    assert failed.state == TrialState.FAIL
    assert failed.datetime_complete is not None
    assert failed.user_attrs == {"failure": "lost", "failure_message": "its worker was lost in the last of 2 attempts"}
    assert records.count_failures(engine, study_id) == {"lost": (1, "its worker was lost in the last of 2 attempts")}


def test_a_trial_given_back_by_a_worker_that_stops_costs_no_attempt(engine: Engine, study_id: int) -> None:
    for _ in range(BUDGET.max_attempts + 1):
        held = claim(engine, study_id)
        assert held.attempt == 1
        assert claims.release(Sessions(engine), held, BY_HAND, BUDGET.max_attempts)
        assert state_of(engine, held) == "WAITING"


def test_a_running_trial_of_a_stock_client_is_left_alone(engine: Engine, study_id: int, database: str) -> None:
    study = optuna.load_study(study_name="s", storage=open_storage(database))
    theirs = study._storage.create_new_trial(study_id)
    assert claim(engine, study_id).number == 1
    assert study._storage.get_trial(theirs).state == TrialState.RUNNING


def test_claiming_from_a_deleted_study_says_so(engine: Engine, study_id: int, database: str) -> None:
    claim(engine, study_id)
    optuna.delete_study(study_name="s", storage=open_storage(database))
    with pytest.raises(StudyNotFoundError, match="was deleted"):
        claims.claim(Sessions(engine), study_id, BUDGET, claims.Holder(worker="test"))
    with engine.connect() as conn:
        assert conn.execute(text("select count(*) from tuner_leases")).scalar_one() == 0


def test_start_and_end_of_trials_are_utc_for_optuna(engine: Engine, study_id: int, database: str) -> None:
    claim(engine, study_id)
    started = optuna.load_study(study_name="s", storage=open_storage(database)).trials[0].datetime_start
    with engine.connect() as conn:
        now = conn.execute(text("select now() at time zone 'UTC'")).scalar_one()
        (ours,) = conn.execute(text("select datetime_start from trials")).scalars()
    assert started is not None
    assert abs((now - ours).total_seconds()) < 60


def test_a_trial_that_ends_just_as_its_lease_is_found_expired_stays_ended(engine: Engine, study_id: int) -> None:
    held = claim(engine, study_id)
    expire(engine, held)
    found: list[Claim] = []
    claiming = threading.Thread(target=lambda: found.append(claim(engine, study_id)))
    with engine.begin() as conn:
        conn.execute(text("update trials set state = 'COMPLETE' where trial_id = :id"), {"id": held.trial_id})
        claiming.start()
        waiting = text("select count(*) from pg_locks where not granted")
        wait_for(lambda: bool(conn.scalar(waiting)), "the claim waits for the trial's row")
    claiming.join(30)
    assert [(one.number, one.attempt) for one in found] == [(1, 1)]
    assert state_of(engine, held) == "COMPLETE"


def attempts(engine: Engine) -> list[Any]:
    query = (
        "select attempt, worker, slot, device, share, outcome, message, ended_at is null as runs from tuner_attempts"
    )
    with engine.connect() as conn:
        return list(conn.execute(text(f"{query} order by started_at")))


def let_run_out(engine: Engine, held: Claim) -> None:
    """Let the lease have run out a second ago."""
    with engine.begin() as conn:
        conn.execute(text("update tuner_leases set expires_at = now() - interval '1 second'"))


def test_each_attempt_is_recorded_with_where_it_ran_and_how_it_ended(engine: Engine, study_id: int) -> None:
    storage = PostgresStorage(engine.url)
    holder = claims.Holder(worker="gpu-1:7", slot=2, device="cuda:1", share=0.5)
    first = claims.claim(storage.sessions, study_id, BUDGET, holder)
    assert isinstance(first, Claim)
    assert claims.release(storage.sessions, first, replace(claims.LOST, reason="exit code 9"), 3)
    second = claim(engine, study_id)
    storage.hold(second)
    storage.set_trial_state_values(second.trial_id, TrialState.COMPLETE, [1.0])
    storage.engine.dispose()
    third = claim(engine, study_id)
    assert third.number == 1
    assert [tuple(row) for row in attempts(engine)] == [
        (1, "gpu-1:7", 2, "cuda:1", 0.5, "lost", "exit code 9", False),
        (2, "test", 0, "cpu", 1.0, "complete", None, False),
        (1, "test", 0, "cpu", 1.0, None, None, True),
    ]


def test_holders_have_time_to_renew_after_the_server_was_away(database: str, study_id: int, engine: Engine) -> None:
    held = claim(engine, study_id)
    let_run_out(engine, held)
    with engine.connect() as conn:
        up_s = conn.scalar(text("select extract(epoch from now() - pg_postmaster_start_time())"))
    expected = up_s > standings.RETURN_S
    assert (standings.look(Sessions(engine), study_id).expired == 1) == expected
    assert claims.renew(Sessions(engine), held)
    assert standings.look(Sessions(engine), study_id).expired == 0


def test_who_was_cut_off_leaves_the_leases_of_others_alone(engine: Engine, study_id: int) -> None:
    held = claim(engine, study_id)
    expire(engine, held)
    holder = claims.Holder(worker="cut off")
    other = claims.claim(Sessions(engine), study_id, BUDGET, holder, sweep=False)
    assert isinstance(other, Claim)
    assert other.number == 1
    assert state_of(engine, held) == "RUNNING"
    again = claims.claim(Sessions(engine), study_id, BUDGET, holder)
    assert isinstance(again, Claim)
    assert (again.number, again.attempt) == (0, 2)


def test_a_trial_is_released_by_hand_whoever_runs_it(engine: Engine, study_id: int) -> None:
    sessions = Sessions(engine)
    held = claim(engine, study_id)
    assert claims.release_by_number(sessions, study_id, 0) == "test"
    assert state_of(engine, held) == "WAITING"
    assert not claims.renew(sessions, held)
    again = claim(engine, study_id)
    assert (again.number, again.attempt) == (0, 1)
    finish(engine, again)
    with pytest.raises(TrialNotRunningError, match="trial 0 is complete, and not running"):
        claims.release_by_number(sessions, study_id, 0)
    with pytest.raises(TrialNotRunningError, match="there is no trial 7"):
        claims.release_by_number(sessions, study_id, 7)


def test_a_running_trial_of_another_program_is_released_by_hand(engine: Engine, study_id: int, database: str) -> None:
    study = optuna.load_study(study_name="s", storage=open_storage(database))
    trial_id = study._storage.create_new_trial(study_id)
    study._storage.set_trial_intermediate_value(trial_id, 1, 1.0)
    assert claims.release_by_number(Sessions(engine), study_id, 0) is None
    (trial,) = study.trials
    assert (trial.state, trial.intermediate_values) == (TrialState.WAITING, {})


def test_a_trial_is_run_anew_without_what_it_reported(engine: Engine, study_id: int) -> None:
    storage = PostgresStorage(engine.url)
    held = claim(engine, study_id)
    storage.hold(held)
    storage.set_trial_intermediate_value(held.trial_id, 1, 0.5)
    assert claims.restart(storage.sessions, held)
    storage.hold(held)
    assert storage.get_trial(held.trial_id).intermediate_values == {}
    assert state_of(engine, held) == "RUNNING"
    assert not claims.restart(storage.sessions, replace(held, token=uuid.uuid4()))
    storage.engine.dispose()
