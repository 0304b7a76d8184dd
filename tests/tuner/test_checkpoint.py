import os
import pickle
import random
import threading
import time
import uuid

import fsspec
import numpy as np
import pytest
import torch
from command import wait_for
from proxy import Proxy
from sqlalchemy import text
from torch import nn

import tuner.checkpoint
from storage import PostgresStorage, checkpoints, claims, studies
from storage.sessions import Backoff, Sessions
from tuner.checkpoint import Checkpoint
from tuner.data import Samples, Split
from tuner.shared import InDatabase, InFolder
from tuner.training import Interrupted, Run, fit

# Readers are forked where that works, and Python 3.12 warns of any fork with a thread about.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Model(nn.Module):
    """Draws from every generator there is."""

    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 2)
        )

    def forward(self, x):
        noise = random.random() + np.random.random() if self.training else 0.0
        return self.layers(x + noise)


def some_rows(n=40):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    return Split(x, (x[:, 0] > 0).long())


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def train(checkpoint=None, *, kind="sgd", seed=0, rows=None, check=lambda: None, on_epoch=None, width=8, lines=None):
    """Train six epochs of five batches; `seed` is the global generators', as a new process has others."""
    seed_all(seed)
    model = Model(width)
    optimizer = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "adam": lambda: torch.optim.Adam(model.parameters(), lr=0.05),
        "fused": lambda: torch.optim.AdamW(model.parameters(), lr=0.05, fused=True),
    }[kind]()
    resumed = []
    history = fit(
        model,
        some_rows() if rows is None else rows,
        some_rows(),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
        loss=nn.CrossEntropyLoss(),
        metrics={},
        epochs=6,
        batch_size=8,
        seed=4,
        on_epoch=on_epoch,
        run=Run(
            checkpoint=checkpoint,
            check=check,
            on_resume=resumed.extend,
            log=print if lines is None else lines.append,
        ),
    )
    return model.state_dict(), optimizer.state_dict(), history, [epoch.number for epoch in resumed]


def interrupt_at(batch):
    """Return a check that interrupts before that batch, counted from 0 over all epochs."""
    left = iter([False] * batch + [True])

    def check():
        if next(left, False):
            raise Interrupted

    return check


def interrupt_after(number):
    def on_epoch(epoch):
        if epoch.number == number:
            raise Interrupted

    return on_epoch


def assert_same(ours, wanted):
    (model, optimizer, history, _), (its_model, its_optimizer, its_history, _) = ours, wanted
    assert {name for name in model if not torch.equal(model[name], its_model[name])} == set()
    assert history == its_history
    assert optimizer["param_groups"] == its_optimizer["param_groups"]


@pytest.mark.parametrize("kind", ["sgd", "adam", "fused"])
@pytest.mark.parametrize("batch", [0, 1, 7, 10, 29])
def test_a_resumed_training_ends_as_one_that_was_never_interrupted(tmp_path, kind, batch):
    wanted = train(kind=kind)
    path = tmp_path / "trial-0.pt"
    with pytest.raises(Interrupted):
        train(Checkpoint(path), kind=kind, check=interrupt_at(batch))
    again = train(Checkpoint(path), kind=kind, seed=99)
    assert_same(again, wanted)
    assert again[3] == list(range(1, batch // 5 + 1))


def test_interrupted_twice_at_the_ends_of_epochs_it_ends_the_same(tmp_path):
    wanted = train()
    for number, seed in ((2, 0), (4, 98)):
        with pytest.raises(Interrupted):
            train(Checkpoint(tmp_path / "a.pt"), seed=seed, on_epoch=interrupt_after(number))
    again = train(Checkpoint(tmp_path / "a.pt"), seed=99)
    assert_same(again, wanted)
    assert again[3] == [1, 2, 3, 4]


def test_a_training_from_samples_resumes_within_an_epoch(tmp_path):
    rows = Samples(some_rows())
    wanted = train(rows=rows)
    with pytest.raises(Interrupted):
        train(Checkpoint(tmp_path / "a.pt"), rows=rows, check=interrupt_at(8))
    assert_same(train(Checkpoint(tmp_path / "a.pt"), rows=rows, seed=99), wanted)


def test_a_training_that_was_killed_goes_on_from_the_last_checkpoint(tmp_path):
    class Killed(BaseException):
        pass

    def kill(epoch):
        if epoch.number == 3:
            raise Killed

    wanted = train()
    with pytest.raises(Killed):
        train(Checkpoint(tmp_path / "a.pt", every_s=0), on_epoch=kill)
    lines = []
    assert_same(train(Checkpoint(tmp_path / "a.pt"), seed=99, lines=lines), wanted)
    assert lines[0].startswith("resumed after epoch ")


@pytest.mark.parametrize("batch", range(5))
@pytest.mark.parametrize("kind", [lambda split: split, Samples])
def test_killed_in_the_evaluation_of_the_first_epoch_a_training_goes_on_from_the_batch_saved(tmp_path, kind, batch):
    class DueAt(Checkpoint):
        """Due once, at that batch."""

        asked = 0

        def is_due(self):
            self.asked += 1
            return self.asked == batch + 1

    class Killed(BaseException):
        pass

    def kill(_):
        raise Killed

    rows = kind(some_rows())
    wanted = train(rows=rows)
    with pytest.raises(Killed):
        train(DueAt(tmp_path / "a.pt"), rows=rows, on_epoch=kill)
    lines = []
    assert_same(train(Checkpoint(tmp_path / "a.pt"), rows=rows, seed=99, lines=lines), wanted)
    assert lines == [f"resumed after epoch 0, batch {batch}"]


def test_nothing_is_written_before_it_is_due(tmp_path):
    train(Checkpoint(tmp_path / "kept" / "late.pt", every_s=60))
    train(Checkpoint(tmp_path / "kept" / "soon.pt", every_s=0))
    assert os.listdir(tmp_path / "kept") == ["soon.pt"]


class _Trap:
    def __reduce__(self):
        return (os.system, ("touch /tmp/tuner-was-unpickled",))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"tunerck1", pickle.dumps(_Trap(), protocol=2)])
def test_a_file_that_is_no_checkpoint_is_told_and_training_starts_again(tmp_path, content):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    lines = []
    ended = train(Checkpoint(path, log=lines.append))
    assert_same(ended, train())
    assert ended[3] == []
    assert lines == [f"cannot use the checkpoint {path}: it is none, or cut off; starting again"]


def test_a_checkpoint_is_not_unpickled(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint = Checkpoint(path, log=(lines := []).append)
    checkpoint.save({"trap": _Trap()}, (1, 0))
    checkpoint.close()
    assert checkpoint.load() is None
    assert lines[0].startswith(f"cannot use the checkpoint {path}: UnpicklingError: ")
    assert not os.path.exists("/tmp/tuner-was-unpickled")


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-9] + b"x" + data[-8:]])
def test_a_file_that_was_cut_off_or_changed_is_told_and_training_starts_again(tmp_path, damage):
    path = tmp_path / "a.pt"
    train(Checkpoint(path, every_s=0))
    size = path.stat().st_size
    path.write_bytes(damage(path.read_bytes()))
    lines = []
    assert_same(train(Checkpoint(path, log=lines.append)), train())
    (line,) = lines
    assert line.startswith(f"cannot use the checkpoint {path}: it is damaged: ")
    assert line.endswith("; starting again")
    assert size - path.stat().st_size in (0, 1)


def test_a_checkpoint_of_another_training_is_not_taken(tmp_path):
    path = tmp_path / "a.pt"
    train(Checkpoint(path, identity="one", every_s=0))
    lines = []
    assert Checkpoint(path, identity="two", log=lines.append).load() is None
    assert lines == [f"cannot use the checkpoint {path}: it is of another training; starting again"]
    assert Checkpoint(path, identity="one").load()["history"]


def test_a_checkpoint_of_another_model_is_not_taken(tmp_path):
    train(Checkpoint(tmp_path / "a.pt", every_s=0))
    lines = []
    ended = train(Checkpoint(tmp_path / "a.pt"), width=16, lines=lines)
    assert_same(ended, train(width=16))
    assert lines == ["the checkpoint is of another model, starting again"]


def test_what_cannot_be_written_is_told_and_training_goes_on(tmp_path):
    (tmp_path / "file").write_text("in the way")
    lines = []
    ended = train(Checkpoint(tmp_path / "file" / "a.pt", every_s=0, log=lines.append))
    assert_same(ended, train())
    assert lines[-1].startswith(f"cannot write the checkpoint {tmp_path / 'file' / 'a.pt'}: ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    checkpoint = Checkpoint(path, log=(lines := []).append)
    checkpoint.save({"n": torch.tensor(1)}, (0, 0))
    checkpoint.close()
    (aside,) = [f"{path}.{os.uname().nodename}-{os.getpid()}"]
    os.symlink("/dev/full", aside)
    checkpoint.save({"n": torch.tensor(2)}, (0, 1))
    checkpoint.close()
    assert lines == [f"cannot write the checkpoint {path}: No space left on device; the one before is kept"]
    assert checkpoint.load() == {"n": torch.tensor(1)}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_deleted_checkpoint_leaves_nothing_behind(tmp_path):
    checkpoint = Checkpoint(tmp_path / "study-1" / "trial-3.pt")
    checkpoint.save({"n": 1}, (0, 0))
    checkpoint.close()
    (tmp_path / "study-1" / "trial-3.pt.host-77").write_bytes(b"of a writer that was killed")
    (tmp_path / "study-1" / "trial-33.pt").write_bytes(b"of another trial")
    checkpoint.delete()
    assert os.listdir(tmp_path / "study-1") == ["trial-33.pt"]
    Checkpoint(tmp_path / "study-1" / "trial-33.pt").delete()
    assert not (tmp_path / "study-1").exists()


def test_a_state_is_copied_when_it_is_saved(tmp_path):
    checkpoint = Checkpoint(tmp_path / "a.pt")
    weights = torch.zeros(1000)
    checkpoint.save({"weights": weights}, (0, 0))
    weights.fill_(1.0)
    checkpoint.close()
    assert checkpoint.load()["weights"].sum() == 0


def test_a_checkpoint_of_another_kind_of_device_is_gone_on_from_in_another_order(tmp_path):
    class OfAnotherDevice(Checkpoint):
        def load(self):
            state = super().load()
            return state and {**state, "order_device": "cuda", "order": torch.zeros(16, dtype=torch.uint8)}

    with pytest.raises(Interrupted):
        train(Checkpoint(tmp_path / "a.pt"), check=interrupt_at(7))
    lines = []
    *_, history, resumed = train(OfAnotherDevice(tmp_path / "a.pt"), seed=99, lines=lines)
    assert [epoch.number for epoch in history] == [1, 2, 3, 4, 5, 6]
    assert resumed == [1]
    assert lines[0].startswith("the checkpoint is of another kind of device, ")


# With a place that other machines reach as well.


@pytest.fixture
def storage(database):
    storage = PostgresStorage(database)
    yield storage
    storage.engine.dispose()


def claim(storage):
    study = studies.create_study(storage.engine, "s", "maximize", {"version": 1}, {}, "value")
    budget = claims.Budget(trials=3, timeout_s=None, max_failures=3, max_attempts=3)
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
    monkeypatch.setattr(tuner.checkpoint, "COPY_SHARE", 1)
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
    monkeypatch.setattr(tuner.checkpoint, "COPY_S", 0.5)
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
def test_a_folder_that_is_full_keeps_the_copy_before_and_is_told_once(tmp_path):
    shared = InFolder(f"file://{tmp_path}", "study-1", 0)
    checkpoint = Checkpoint(tmp_path / "a.pt", shared=shared, log=(lines := []).append)
    save(checkpoint, 1, (1, 0))
    aside = f"{tmp_path}/study-1/trial-0.pt.{os.uname().nodename}-{os.getpid()}"
    for number in (2, 3):
        os.symlink("/dev/full", aside)
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
