"""Workers tell that they are there."""

import uuid

import pytest
from sqlalchemy import text

from storage import StorageError, open_engine, studies, workers
from storage.sessions import Sessions
from storage.workers import SlotSeen, WorkerSeen


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
    workers.ended(sessions, uuid.UUID(int=7))
    (third,) = rows(sessions)
    assert third["ended_at"] == third["last_seen"] > second["last_seen"]


def test_a_worker_of_a_study_that_was_deleted_is_refused(database, sessions):
    with pytest.raises(StorageError, match="refused"):
        workers.seen(sessions, a_worker(4711, "idle"))
