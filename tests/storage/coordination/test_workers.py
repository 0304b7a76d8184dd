"""Workers tell that they are there, and are seen by it."""

import json
import math
import uuid
from dataclasses import asdict

import pytest
from command import wait_for
from sqlalchemy import text

from storage import StorageError, ensure_schema, open_engine
from storage.coordination import claims, standings, studies, workers
from storage.coordination.workers import SlotNow, SlotSeen, WorkerSeen
from storage.database.sessions import Sessions

UP_S = text("select extract(epoch from now() - pg_postmaster_start_time())")


@pytest.fixture
def sessions(database):
    engine = open_engine(database)
    yield Sessions(engine)
    engine.dispose()


def a_worker(study_id: int, state: workers.SlotState) -> WorkerSeen:
    slots = [SlotSeen(slot=0, device="cuda:0", share=0.5, state=state)]
    return WorkerSeen(
        worker_id=uuid.UUID(int=7), study_id=study_id, name="gpu-1:7", slots=slots, versions={"torch": "2.10"}
    )


def rows(sessions):
    return sessions.statement(lambda conn: conn.execute(text("select * from tuner_workers")).mappings().all())


def test_a_worker_is_one_row_from_its_start_to_its_end(database, sessions):
    study_id = studies.create_study(sessions._engine, "s", "minimize", {"version": 1}, {}, "value").study_id
    workers.seen(sessions, a_worker(study_id, "starting"))
    (first,) = rows(sessions)
    workers.seen(sessions, a_worker(study_id, "running"))
    (second,) = rows(sessions)
    assert first["slots"][0]["state"] == "starting"
    assert second["slots"] == [{"slot": 0, "device": "cuda:0", "share": 0.5, "state": "running"}]
    assert second["started_at"] == first["started_at"] < second["last_seen"]
    assert (second["name"], second["versions"], second["ended_at"]) == ("gpu-1:7", {"torch": "2.10"}, None)
    for number in (6, 8):  # another's end is not its own
        workers.ended(sessions, uuid.UUID(int=number))
    assert rows(sessions) == [second]
    workers.ended(sessions, uuid.UUID(int=7))
    (third,) = rows(sessions)
    assert third["ended_at"] == third["last_seen"] > second["last_seen"]


def test_a_worker_of_a_study_that_was_deleted_is_refused(database, sessions):
    with pytest.raises(StorageError, match="refused"):
        workers.seen(sessions, a_worker(4711, "idle"))


def execute(sessions, statement, **values):
    sessions.statement(lambda conn: conn.execute(text(statement), values))


def a_row(sessions, study_id, *, name="gpu-1:7", started=1000.0, seen=0.0, ended=None, slots=2):
    """A worker that started, was seen last and ended so many seconds ago."""
    told = [asdict(SlotSeen(slot=slot, device=f"cuda:{slot}", share=1.0, state="idle")) for slot in range(slots)]
    statement = """
        insert into tuner_workers values (:worker_id, :study_id, :name, cast(:slots as jsonb), '{"torch": "2.10"}',
            now() - :started * interval '1 s', now() - :seen * interval '1 s', now() - :ended * interval '1 s')
        """
    values = {"worker_id": uuid.uuid4(), "study_id": study_id, "name": name, "slots": json.dumps(told)}
    times = {"started": started, "seen": seen, "ended": ended}
    execute(sessions, statement, **values, **times)


def a_claim(sessions, study_id, worker="gpu-1:7", slot=0):
    budget = standings.Budget(trials=99, timeout_s=None, max_failures=9, max_attempts=3)
    return claims.claim(sessions, study_id, budget, claims.Holder(worker=worker, slot=slot))


def present(sessions, study_id):
    return sessions.snapshot(lambda conn: workers.present(conn, study_id))


def running(sessions, study_id):
    """The number of the trial of each slot of each worker."""
    found = present(sessions, study_id)
    return [[None if slot.trial is None else slot.trial.number for slot in worker.slots] for worker in found]


@pytest.fixture
def study_id(sessions):
    return studies.create_study(sessions._engine, "s", "minimize", {"version": 1}, {}, "value").study_id


def test_workers_are_present_until_they_tell_their_end(sessions, study_id):
    a_row(sessions, study_id, name="young:1", started=10)
    a_row(sessions, study_id, name="gone:2", ended=5)
    a_row(sessions, study_id, name="old:3", seen=12)
    old, young = present(sessions, study_id)
    assert (old.name, old.versions, old.is_lost) == ("old:3", {"torch": "2.10"}, False)
    assert (young.name, young.silent_s) == ("young:1", pytest.approx(0, abs=5))
    assert (old.last_seen - old.started_at).total_seconds() == pytest.approx(988)
    assert old.silent_s == pytest.approx(12, abs=5)
    assert old.slots == tuple(
        SlotNow(slot=slot, device=f"cuda:{slot}", share=1.0, state="idle", trial=None) for slot in range(2)
    )
    assert sessions.snapshot(lambda conn: workers.count_ended(conn, study_id)) == 1


@pytest.mark.slow
def test_a_worker_that_tells_nothing_is_lost(sessions, study_id):
    # Longer ago than the server started, which would be why.
    wait_for(lambda: sessions.statement(lambda conn: conn.scalar(UP_S)) > workers.SILENT_S, "the server runs a while")
    a_row(sessions, study_id, name="a:1", seen=workers.SILENT_S + 5)
    a_row(sessions, study_id, name="b:2", seen=workers.SILENT_S - 5)
    assert [worker.is_lost for worker in present(sessions, study_id)] == [True, False]


@pytest.mark.slow
def test_workers_that_could_not_reach_a_server_that_was_away_are_not_lost(killable):
    engine = open_engine(killable.url())
    ensure_schema(engine)
    sessions = Sessions(engine)
    study_id = studies.create_study(engine, uuid.uuid4().hex, "minimize", {"version": 1}, {}, "value").study_id
    a_row(sessions, study_id, seen=100)
    killable.stop()
    killable.start()
    assert [worker.is_lost for worker in present(sessions, study_id)] == [False]
    engine.dispose()


def test_a_slot_runs_the_trial_of_its_lease_at_its_latest_report(sessions, study_id):
    a_row(sessions, study_id)
    a_row(sessions, study_id, name="other:8")
    zero, one, two = (
        a_claim(sessions, study_id),
        a_claim(sessions, study_id, slot=1),
        a_claim(sessions, study_id, "other:8"),
    )
    reports = "insert into trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)"
    for held, step, value, kind in (zero, 2, 0.5, "FINITE"), (zero, 10, 0.25, "FINITE"), (one, 1, None, "NAN"):
        execute(
            sessions,
            f"{reports} values (:id, :step, :value, :kind)",
            id=held.trial_id,
            step=step,
            value=value,
            kind=kind,
        )
    first, second = present(sessions, study_id)
    assert running(sessions, study_id) == [[0, 1], [2, None]]
    assert (first.slots[0].trial.step, first.slots[0].trial.value, first.slots[0].trial.attempt) == (10, 0.25, 1)
    assert (first.slots[1].trial.step, math.isnan(first.slots[1].trial.value)) == (1, True)
    assert (second.slots[0].trial.step, second.slots[0].trial.value) == (None, None)
    claims.release_by_number(sessions, study_id, zero.number)
    execute(sessions, "update trials set state = 'FAIL' where trial_id = :id", id=two.trial_id)
    assert running(sessions, study_id) == [[None, 1], [None, None]]
    a_claim(sessions, study_id, "other:8", slot=1)  # the one that was released
    assert running(sessions, study_id) == [[None, 1], [None, 0]]


def test_a_trial_belongs_to_the_latest_worker_of_its_workers_name(sessions, study_id):
    # As a container has it that was killed and started again: the same host, the same process id.
    a_row(sessions, study_id, started=1000, seen=500, slots=1)
    a_claim(sessions, study_id)
    execute(sessions, "update tuner_attempts set started_at = now() - interval '600 s'")
    a_row(sessions, study_id, started=400, slots=1)
    assert running(sessions, study_id) == [[0], [None]]
    a_claim(sessions, study_id)
    assert running(sessions, study_id) == [[0], [1]]


def test_a_trial_that_was_claimed_before_its_worker_told_of_itself_is_its_own(sessions, study_id):
    a_claim(sessions, study_id)
    a_row(sessions, study_id, started=0, slots=1)
    execute(sessions, "update tuner_attempts set started_at = now() - interval '1 s'")
    assert running(sessions, study_id) == [[0]]


def test_workers_of_other_studies_are_not_present(sessions, study_id):
    a_row(sessions, study_id)
    other = studies.create_study(sessions._engine, "other", "minimize", {"version": 1}, {}, "value").study_id
    a_claim(sessions, other)
    assert present(sessions, other) == []
    assert running(sessions, study_id) == [[None, None]]
