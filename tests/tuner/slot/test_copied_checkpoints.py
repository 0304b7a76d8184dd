"""Checkpoints that are copied to where other machines find them."""

import os
import threading
import time
import uuid

import fsspec
import pytest
from command import wait_for
from full import fill_disk
from proxy import Proxy
from resuming import assert_same, interrupt_at, train
from sqlalchemy import text

from storage import PostgresStorage
from storage.coordination import checkpoints, claims, standings, studies
from storage.database.sessions import Backoff, Sessions
from tuner.slot.shared_checkpoints import InDatabase, InFolder
from tuner.training import Interrupted
from tuner.training.checkpoint import Checkpoint


@pytest.fixture
def storage(database):
    storage = PostgresStorage(database)
    yield storage
    storage.engine.dispose()


def claim(storage):
    study = studies.create_study(storage.engine, "s", "maximize", {"version": 1}, {}, "value")
    budget = standings.Budget(trials=3, timeout_s=None, max_failures=3, max_attempts=3)
    return claims.claim(storage.sessions, study.study_id, budget, claims.Holder(worker="test"))


def in_database(storage, held):
    return InDatabase(storage.sessions, Sessions(storage.engine), held)


@pytest.fixture(params=["database", "folder", "bucket"])
def shared(request, tmp_path):
    """Where other machines find the checkpoint."""
    if request.param == "database":
        storage = request.getfixturevalue("storage")
        yield in_database(storage, claim(storage))
    elif request.param == "folder":
        yield InFolder(f"file://{tmp_path}/a folder", "study-1", 0)
    else:
        bucket = f"memory://{uuid.uuid4()}"
        yield InFolder(bucket, "study-1", 0)
        fsspec.filesystem("memory").rm(bucket, recursive=True)


def save(checkpoint, n, progress, *, last=True):
    checkpoint.save({"n": n}, progress, last=last)
    checkpoint.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("batch", [0, 7, 10, 29])
def test_interrupted_here_a_training_goes_on_elsewhere_as_if_it_had_not_been(tmp_path, shared, kind, batch):
    wanted = train(kind=kind)
    with pytest.raises(Interrupted):
        train(Checkpoint(tmp_path / "here" / "a.pt", shared=shared), kind=kind, check=interrupt_at(batch))
    lines = []
    again = train(Checkpoint(tmp_path / "there" / "a.pt", shared=shared), kind=kind, seed=99, lines=lines)
    assert_same(again, wanted)
    assert lines == [f"resumed after epoch {batch // 5}, batch {batch % 5}"]


def test_whichever_has_come_further_is_taken(tmp_path, shared):
    here, there = (Checkpoint(tmp_path / name / "a.pt", shared=shared) for name in ("here", "there"))
    save(here, 1, (1, 3))
    save(there, 2, (2, 0))
    assert here.load() == {"n": 2}
    save(Checkpoint(tmp_path / "here" / "a.pt"), 3, (2, 1))  # as while the other place was away
    assert here.load() == {"n": 3}
    assert there.load() == {"n": 2}
    save(Checkpoint(tmp_path / "here" / "a.pt"), 4, (2, 0))
    assert here.load() == {"n": 4}  # as far as the other, and nearer


def test_a_copy_that_cannot_be_used_is_told_and_the_file_is_taken(tmp_path, shared):
    path = tmp_path / "a.pt"
    save(Checkpoint(path), 1, (1, 0))
    save(Checkpoint(tmp_path / "other" / "a.pt", identity="other", shared=shared), 2, (2, 0))
    lines = []
    assert Checkpoint(path, shared=shared, log=lines.append).load() == {"n": 1}
    assert lines == [f"cannot use the checkpoint {shared}: it is of another training"]
    save(Checkpoint(tmp_path / "there" / "a.pt", shared=shared), 3, (3, 0))
    shared.write(memoryview(shared.read()[:-1]), threading.Event())
    assert Checkpoint(path, shared=shared, log=lines.append).load() == {"n": 1}
    assert lines[1].startswith(f"cannot use the checkpoint {shared}: it is damaged: ")
    assert Checkpoint(tmp_path / "nowhere.pt", shared=shared, log=lines.append).load() is None
    assert lines[2].endswith("; starting again")


def test_a_file_that_cannot_be_used_is_told_and_the_copy_is_taken(tmp_path, shared):
    path = tmp_path / "a.pt"
    checkpoint = Checkpoint(path, shared=shared, log=(lines := []).append)
    save(checkpoint, 1, (1, 0))
    path.write_bytes(path.read_bytes()[:-1])
    assert checkpoint.load() == {"n": 1}
    (line,) = lines
    assert line.startswith(f"cannot use the checkpoint {path}: it is damaged: ")


def test_without_a_place_for_the_file_the_copy_is_written(tmp_path, shared):
    (tmp_path / "file").write_text("in the way")
    lines = []
    save(Checkpoint(tmp_path / "file" / "a.pt", shared=shared, log=lines.append), 1, (1, 0))
    assert len(lines) == 1
    assert Checkpoint(tmp_path / "a.pt", shared=shared).load() == {"n": 1}


def test_a_state_that_is_too_large_for_the_database_stays_here_and_is_told_once(tmp_path, storage, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_BYTES", 2**10)
    shared = in_database(storage, claim(storage))
    lines = []
    train(Checkpoint(tmp_path / "a.pt", shared=shared, every_s=0, log=lines.append))
    (line,) = lines
    assert line.startswith("cannot copy the checkpoint to the database: ")
    assert "--checkpoints URL" in line
    assert shared.head(8) is None
    assert (tmp_path / "a.pt").exists()


def test_a_database_that_is_away_does_not_stop_the_training_and_is_told_once(tmp_path, storage, database, monkeypatch):
    monkeypatch.setattr("tuner.training.checkpoint.COPY_SHARE", 1)
    held = claim(storage)
    near = in_database(storage, held)
    proxy = Proxy(database)
    far = PostgresStorage(proxy.url, retry=Backoff(limit_s=0))
    lines = []
    checkpoint = Checkpoint(tmp_path / "a.pt", shared=in_database(far, held), every_s=0, log=lines.append)

    def go_away(epoch):
        if epoch.number == 2:
            wait_for(lambda: near.head(8) is not None, "a state is copied")
            proxy.close()

    started_at = time.monotonic()
    with pytest.raises(Interrupted):
        train(checkpoint, check=interrupt_at(29), on_epoch=go_away)
    assert time.monotonic() - started_at < 20
    (line,) = lines
    assert line.startswith("cannot copy the checkpoint to the database: ")
    # It is back; what is on the disk has come further.
    resumed = []
    again = train(Checkpoint(tmp_path / "a.pt", shared=near), seed=99, lines=resumed)
    assert_same(again, train())
    assert resumed == ["resumed after epoch 5, batch 4"]
    far.engine.dispose()


def test_a_database_that_does_not_answer_holds_up_neither_the_training_nor_its_end(tmp_path, storage, monkeypatch):
    monkeypatch.setattr("tuner.training.checkpoint.COPY_S", 0.5)
    held = claim(storage)
    lines = []
    checkpoint = Checkpoint(tmp_path / "a.pt", shared=in_database(storage, held), every_s=0, log=lines.append)
    with storage.engine.begin() as conn:  # what is to be written waits for this for 10 s
        conn.execute(text("select from tuner_leases for update"))
        started_at = time.monotonic()
        with pytest.raises(Interrupted):
            train(checkpoint, check=interrupt_at(29))
        assert time.monotonic() - started_at < 8
    assert lines == ["cannot copy the checkpoint to the database: it takes longer than 0.5 s"]
    assert len(Checkpoint(tmp_path / "a.pt").load()["history"]) == 5


class Held(InFolder):
    """A folder that takes its time."""

    def __init__(self, *place):
        super().__init__(*place)
        self.began, self.go_on = threading.Event(), threading.Event()

    def write(self, data, give_up):
        self.began.set()
        assert self.go_on.wait(60)
        super().write(data, give_up)


def test_while_a_copy_is_under_way_files_are_written_and_the_last_state_is_copied_after_it(tmp_path):
    shared = Held(f"file://{tmp_path}", "study-1", 0)
    checkpoint = Checkpoint(tmp_path / "a.pt", shared=shared, every_s=0)
    checkpoint.save({"n": 1}, (1, 0))
    assert shared.began.wait(60)
    checkpoint.save({"n": 2}, (2, 0))
    checkpoint.save({"n": 3}, (3, 0), last=True)
    shared.go_on.set()
    checkpoint.close()
    assert Checkpoint(tmp_path / "a.pt").load() == {"n": 3}
    assert Checkpoint(tmp_path / "b.pt", shared=shared).load() == {"n": 3}


def test_what_takes_long_to_copy_is_copied_less_often(tmp_path):
    shared = Held(f"file://{tmp_path}", "study-1", 0)
    checkpoint = Checkpoint(tmp_path / "a.pt", shared=shared, every_s=0)
    checkpoint.save({"n": 1}, (1, 0))
    assert shared.began.wait(60)
    threading.Timer(0.5, shared.go_on.set).start()
    save(checkpoint, 2, (2, 0))  # within the 0.5 s
    save(checkpoint, 3, (3, 0), last=False)  # within the 9.5 s after them
    assert Checkpoint(tmp_path / "a.pt").load() == {"n": 3}
    assert Checkpoint(tmp_path / "b.pt", shared=shared).load() == {"n": 2}


def test_at_its_end_a_training_does_not_wait_for_a_copy_that_nobody_needs(tmp_path):
    shared = Held(f"file://{tmp_path}", "study-1", 0)
    checkpoint = Checkpoint(tmp_path / "a.pt", shared=shared, every_s=0)
    checkpoint.save({"n": 1}, (1, 0))
    assert shared.began.wait(60)
    threading.Timer(0.2, shared.go_on.set).start()
    checkpoint.close()
    assert shared.read() is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_folder_that_is_full_keeps_the_copy_before_and_is_told_once(tmp_path, monkeypatch):
    shared = InFolder(f"file://{tmp_path}", "study-1", 0)
    checkpoint = Checkpoint(tmp_path / "a.pt", shared=shared, log=(lines := []).append)
    save(checkpoint, 1, (1, 0))
    with monkeypatch.context() as patched:
        fill_disk(patched, "tuner.slot.folders")
        for number in (2, 3):
            save(checkpoint, number, (number, 0))
    assert lines == [f"cannot copy the checkpoint to {shared}: No space left on device"]
    assert os.listdir(tmp_path / "study-1") == ["trial-0.pt"]
    assert Checkpoint(tmp_path / "b.pt", shared=shared).load() == {"n": 1}
    save(checkpoint, 4, (4, 0))
    assert Checkpoint(tmp_path / "b.pt", shared=shared).load() == {"n": 4}


def test_a_folder_that_may_not_be_written_to_is_told_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    shared = InFolder(f"file://{tmp_path}/file", "study-1", 0)
    lines = []
    ended = train(Checkpoint(tmp_path / "a.pt", shared=shared, every_s=0, log=lines.append))
    assert_same(ended, train())
    assert lines == [f"cannot copy the checkpoint to {shared}: Not a directory"]


def test_deleted_the_copy_is_gone_too(tmp_path):
    shared = InFolder(f"file://{tmp_path}", "study-1", 0)
    checkpoint = Checkpoint(tmp_path / "here" / "a.pt", shared=shared)
    save(checkpoint, 1, (1, 0))
    checkpoint.delete()
    assert os.listdir(tmp_path) == []
    checkpoint.delete()
