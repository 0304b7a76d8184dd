import os
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

from tuner.checkpoint import Checkpoint
from tuner.data import Samples, Split
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


@pytest.mark.parametrize("kind", [lambda split: split, Samples])
def test_saved_after_the_last_batch_of_an_epoch_a_training_goes_on_with_its_evaluation(tmp_path, kind):
    class SavedAfterTheLastBatch(Checkpoint):
        """Due once, after the fifth batch of the second epoch: each epoch asks after each batch and at its end."""

        asked = 0

        def is_due(self):
            self.asked += 1
            return self.asked == 6 + 5

    class Killed(BaseException):
        pass

    def kill(epoch):
        if epoch.number == 2:
            raise Killed

    rows = kind(some_rows())
    wanted = train(rows=rows)
    with pytest.raises(Killed):
        train(SavedAfterTheLastBatch(tmp_path / "a.pt"), rows=rows, on_epoch=kill)
    lines = []
    assert_same(train(Checkpoint(tmp_path / "a.pt"), rows=rows, seed=99, lines=lines), wanted)
    assert lines == ["resumed after epoch 1, batch 5"]


def test_nothing_is_written_before_it_is_due(tmp_path):
    train(Checkpoint(tmp_path / "kept" / "late.pt", every_s=60))
    train(Checkpoint(tmp_path / "kept" / "soon.pt", every_s=0))
    assert os.listdir(tmp_path / "kept") == ["soon.pt"]


class _Trap:
    def __reduce__(self):
        return (os.system, ("touch /tmp/tuner-was-unpickled",))


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", pickle.dumps(_Trap(), protocol=2), b"PK\x03\x04 cut off"]
)
def test_a_file_that_is_no_checkpoint_is_told_and_training_starts_again(tmp_path, content):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    lines = []
    ended = train(Checkpoint(path, log=lines.append))
    assert_same(ended, train())
    assert ended[3] == []
    assert [line.startswith(f"the checkpoint {path} cannot be read, starting again: ") for line in lines] == [True]
    assert not os.path.exists("/tmp/tuner-was-unpickled")


def test_a_checkpoint_of_another_training_is_not_taken(tmp_path):
    path = tmp_path / "a.pt"
    train(Checkpoint(path, identity="one", every_s=0))
    lines = []
    assert Checkpoint(path, identity="two", log=lines.append).load() is None
    assert "is of another training, starting again" in lines[0]
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
    checkpoint.save({"n": torch.tensor(1)})
    checkpoint.close()
    (aside,) = [f"{path}.{os.uname().nodename}-{os.getpid()}"]
    os.symlink("/dev/full", aside)
    checkpoint.save({"n": torch.tensor(2)})
    checkpoint.close()
    assert lines == [f"cannot write the checkpoint {path}: No space left on device; the one before is kept"]
    assert checkpoint.load() == {"n": torch.tensor(1)}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_deleted_checkpoint_leaves_nothing_behind(tmp_path):
    checkpoint = Checkpoint(tmp_path / "study-1" / "trial-3.pt")
    checkpoint.save({"n": 1})
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
    checkpoint.save({"weights": weights})
    weights.fill_(1.0)
    checkpoint.close()
    assert checkpoint.load()["weights"].sum() == 0
