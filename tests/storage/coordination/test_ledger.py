"""What a study has cost, by what it was spent on, and how fast it goes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, text

from storage import open_engine
from storage.coordination import ledger, studies
from storage.coordination.ledger import Cost, Pace
from storage.database.sessions import Sessions

# Between the statement that writes times and the one that reads the clock.
APART_S = 5.0


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    engine = open_engine(database)
    yield engine
    engine.dispose()


@pytest.fixture
def study_id(engine: Engine) -> int:
    return a_study(engine, "s")


def a_study(engine: Engine, name: str) -> int:
    return studies.create_study(engine, name, "minimize", {"version": 1}, {}, "value").study_id


def execute(engine: Engine, statement: str, **values: Any) -> Any:
    with engine.begin() as conn:
        result = conn.execute(text(statement), values)
        return result.scalar_one() if result.returns_rows else None


def a_trial(engine: Engine, study_id: int, state: str, started: float = 0.0, ended: float | None = None) -> int:
    """A trial that started and ended so many seconds ago; its id."""
    number = execute(engine, "select count(*) from trials where study_id = :study_id", study_id=study_id)
    trial_id: int = execute(
        engine,
        """
        insert into trials (study_id, number, state, datetime_start, datetime_complete)
        values (:study_id, :number, cast(:state as trialstate), timezone('UTC', now() - :started * interval '1 s'),
                timezone('UTC', now() - :ended * interval '1 s'))
        returning trial_id
        """,
        study_id=study_id,
        number=number,
        state=state,
        started=started,
        ended=ended,
    )
    return trial_id


def an_attempt(
    engine: Engine,
    trial_id: int,
    started: float,
    ended: float | None,
    outcome: str | None,
    *,
    worker: str = "gpu-1:7",
    share: float = 1.0,
) -> uuid.UUID:
    """An attempt that started and ended so many seconds ago; its token."""
    token = uuid.uuid4()
    execute(
        engine,
        """
        insert into tuner_attempts
            (token, trial_id, attempt, worker, slot, device, share, started_at, ended_at, outcome)
        values (:token, :trial_id, 1, :worker, 0, 'cuda:0', :share, now() - :started * interval '1 s',
                now() - :ended * interval '1 s', :outcome)
        """,
        token=token,
        trial_id=trial_id,
        worker=worker,
        share=share,
        started=started,
        ended=ended,
        outcome=outcome,
    )
    return token


def a_lease(engine: Engine, trial_id: int, token: uuid.UUID, expired: float) -> None:
    """The lease of an attempt, which ran out so many seconds ago."""
    execute(
        engine,
        "insert into tuner_leases values (:trial_id, 1, :token, 'gpu-1:7', now() - :expired * interval '1 s')",
        trial_id=trial_id,
        token=token,
        expired=expired,
    )


def a_worker(
    engine: Engine,
    study_id: int,
    started: float,
    seen: float,
    ended: float | None = None,
    *,
    shares: tuple[float, ...] = (1.0,),
    name: str = "gpu-1:7",
) -> None:
    """A worker that started, was seen last and ended so many seconds ago."""
    slots = ", ".join(
        f'{{"slot": {slot}, "device": "cuda:0", "share": {share}, "state": "idle"}}'
        for slot, share in enumerate(shares)
    )
    execute(
        engine,
        """
        insert into tuner_workers values (:worker_id, :study_id, :name, cast(:slots as jsonb), '{}',
            now() - :started * interval '1 s', now() - :seen * interval '1 s', now() - :ended * interval '1 s')
        """,
        worker_id=uuid.uuid4(),
        study_id=study_id,
        name=name,
        slots=f"[{slots}]",
        started=started,
        seen=seen,
        ended=ended,
    )


def check_cost(engine: Engine, study_id: int, **wanted: float) -> None:
    found = Sessions(engine).snapshot(lambda conn: ledger.cost(conn, study_id))
    assert vars(found) == pytest.approx(vars(Cost(**wanted)), abs=APART_S)


def pace_of(engine: Engine, study_id: int) -> Pace:
    return Sessions(engine).snapshot(lambda conn: ledger.pace(conn, study_id))


def test_a_study_that_nobody_has_run_has_cost_nothing(engine, study_id):
    a_trial(engine, study_id, "WAITING")
    check_cost(engine, study_id)


@pytest.mark.parametrize(
    ("state", "outcome", "kind"),
    [("COMPLETE", "complete", "complete"), ("PRUNED", "pruned", "pruned"), ("FAIL", "fail", "failed")],
)
def test_an_attempt_that_ended_its_trial_counts_by_how_it_did(engine, study_id, state, outcome, kind):
    an_attempt(engine, a_trial(engine, study_id, state), 500, 200, outcome)
    check_cost(engine, study_id, **{kind: 300})


def test_a_part_of_a_device_costs_that_part(engine, study_id):
    trial_id = a_trial(engine, study_id, "COMPLETE")
    an_attempt(engine, trial_id, 500, 200, "complete", share=0.25)
    check_cost(engine, study_id, complete=75)


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("COMPLETE", "complete"),
        ("PRUNED", "pruned"),
        ("FAIL", "failed"),
        ("WAITING", "running"),
        ("RUNNING", "running"),
    ],
)
def test_an_attempt_that_was_given_back_counts_by_what_its_trial_became(engine, study_id, state, kind):
    an_attempt(engine, a_trial(engine, study_id, state), 500, 200, "released")
    check_cost(engine, study_id, **{kind: 300})


@pytest.mark.parametrize("state", ["COMPLETE", "FAIL", "WAITING"])
def test_an_attempt_whose_worker_was_lost_is_lost_whatever_became_of_its_trial(engine, study_id, state):
    an_attempt(engine, a_trial(engine, study_id, state), 500, 200, "lost")
    check_cost(engine, study_id, lost=300)


def test_each_attempt_of_a_trial_counts(engine, study_id):
    trial_id = a_trial(engine, study_id, "COMPLETE")
    an_attempt(engine, trial_id, 1000, 900, "lost")
    an_attempt(engine, trial_id, 800, 600, "released")
    an_attempt(engine, trial_id, 500, 100, "complete")
    check_cost(engine, study_id, lost=100, complete=600)


def test_an_attempt_under_way_counts_until_now(engine, study_id):
    trial_id = a_trial(engine, study_id, "RUNNING")
    a_lease(engine, trial_id, an_attempt(engine, trial_id, 300, None, None), -60)
    check_cost(engine, study_id, running=300)


def test_an_attempt_whose_lease_ran_out_is_lost_since_then_before_anybody_says_so(engine, study_id):
    trial_id = a_trial(engine, study_id, "RUNNING")
    a_lease(engine, trial_id, an_attempt(engine, trial_id, 5000, None, None), 1000)
    check_cost(engine, study_id, lost=4000)


@pytest.mark.parametrize(("state", "kind"), [("COMPLETE", "complete"), ("PRUNED", "pruned"), ("FAIL", "failed")])
def test_an_attempt_that_another_client_ended_counts_until_its_trial_ended(engine, study_id, state, kind):
    trial_id = a_trial(engine, study_id, state, 500, 200)
    a_lease(engine, trial_id, an_attempt(engine, trial_id, 500, None, None), -60)
    check_cost(engine, study_id, **{kind: 300})


def test_an_attempt_of_which_nobody_knows_the_end_counts_nothing(engine, study_id):
    an_attempt(engine, a_trial(engine, study_id, "WAITING"), 500, None, None)
    ended_before = a_trial(engine, study_id, "COMPLETE", 900, 800)
    an_attempt(engine, ended_before, 500, None, None)
    check_cost(engine, study_id)


def test_a_worker_is_idle_while_it_runs_no_trial(engine, study_id):
    an_attempt(engine, a_trial(engine, study_id, "COMPLETE"), 900, 700, "complete", share=0.5)
    an_attempt(engine, a_trial(engine, study_id, "PRUNED"), 900, 800, "pruned", share=0.5)
    a_worker(engine, study_id, 1000, 0, shares=(0.5, 0.5))
    check_cost(engine, study_id, complete=100, pruned=50, idle=850)


def test_a_worker_costs_until_its_end_or_until_it_was_seen_last(engine, study_id):
    a_worker(engine, study_id, 1000, 800, 800, name="ended:1")
    a_worker(engine, study_id, 1000, 900, name="killed:2")
    check_cost(engine, study_id, idle=300)


def test_the_attempt_of_a_lost_worker_takes_no_idle_time_of_others_nor_of_the_time_after_it(engine, study_id):
    # Its lease ran on for 300 s, and the others' attempts are their own.
    an_attempt(engine, a_trial(engine, study_id, "WAITING"), 900, 500, "lost", worker="killed:1")
    a_worker(engine, study_id, 1000, 800, name="killed:1")
    a_worker(engine, study_id, 1000, 0, name="other:2")
    check_cost(engine, study_id, lost=400, idle=100 + 1000)


def test_workers_of_one_name_are_told_apart_by_time(engine, study_id):
    an_attempt(engine, a_trial(engine, study_id, "COMPLETE"), 990, 910, "complete")
    an_attempt(engine, a_trial(engine, study_id, "COMPLETE"), 400, 100, "complete")
    a_worker(engine, study_id, 1000, 900, 900)
    a_worker(engine, study_id, 500, 0)
    check_cost(engine, study_id, complete=380, idle=20 + 200)


def test_a_worker_that_told_of_itself_after_its_first_attempt_had_begun_was_not_idle_meanwhile(engine, study_id):
    an_attempt(engine, a_trial(engine, study_id, "COMPLETE"), 1010, 100, "complete")
    a_worker(engine, study_id, 1000, 0)
    check_cost(engine, study_id, complete=910, idle=100)


def test_more_attempts_than_a_worker_has_time_for_make_idle_time_nothing_and_not_less(engine, study_id):
    for _ in range(3):
        an_attempt(engine, a_trial(engine, study_id, "COMPLETE"), 1000, 0, "complete")
    a_worker(engine, study_id, 1000, 0)
    a_worker(engine, study_id, 100, 0, name="other:2")
    check_cost(engine, study_id, complete=3000, idle=100)


def test_what_other_studies_cost_does_not_count(engine, study_id):
    other = a_study(engine, "other")
    an_attempt(engine, a_trial(engine, other, "COMPLETE"), 1000, 0, "complete")
    a_worker(engine, other, 1000, 0)
    check_cost(engine, study_id)
    check_cost(engine, other, complete=1000)


def test_the_rate_is_of_the_last_hour(engine, study_id):
    for state, ended in (("COMPLETE", 10), ("PRUNED", 3500), ("COMPLETE", 3700), ("FAIL", 10), ("COMPLETE", -100)):
        a_trial(engine, study_id, state, 7200, ended)
    a_trial(engine, study_id, "RUNNING", 5)
    assert pace_of(engine, study_id) == Pace(done=2, window_s=3600)
    assert pace_of(engine, study_id).per_hour == 2


def test_the_rate_of_a_younger_study_is_of_its_time_so_far(engine, study_id):
    for ended in (10, 20, 30):
        a_trial(engine, study_id, "COMPLETE", 600, ended)
    found = pace_of(engine, study_id)
    assert (found.done, found.window_s) == (3, pytest.approx(600, abs=APART_S))
    assert found.per_hour == pytest.approx(18, rel=0.02)


def test_a_study_of_which_no_trial_started_has_no_rate(engine, study_id):
    a_trial(engine, study_id, "WAITING")
    execute(engine, "update trials set datetime_start = null")
    assert pace_of(engine, study_id) == Pace(done=0, window_s=None)
    assert pace_of(engine, study_id).per_hour is None
    assert Pace(done=1, window_s=0.0).per_hour is None
