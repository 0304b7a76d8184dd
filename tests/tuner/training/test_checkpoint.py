"""Checkpoints in a file: when one is written, what becomes of a training that is resumed from one."""

import os
import pickle

import pytest
import torch
from resuming import assert_same, interrupt_after, interrupt_at, some_rows, train
from torch import nn

from tuner.data import Samples, Split
from tuner.errors import SharedPlaceError
from tuner.training import Interrupted, Options, Run, fit
from tuner.training.checkpoint import Checkpoint
from tuner.training.steps import fastest

# Readers are forked where that works, and Python 3.12 warns of any fork with a thread about.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sgd", "adam", "fused", "lazy", "lbfgs"])
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_nothing_is_written_before_it_is_due(tmp_path):
    train(Checkpoint(tmp_path / "kept" / "late.pt", every_s=60))
    train(Checkpoint(tmp_path / "kept" / "soon.pt", every_s=0))
    assert os.listdir(tmp_path / "kept") == ["soon.pt"]


class _Trap:
    def __reduce__(self):
        return (os.system, ("touch /tmp/tuner-was-unpickled",))


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_full_disk_leaves_the_checkpoint_before(small_disk):
    path = small_disk / "a.pt"
    checkpoint = Checkpoint(path, log=(lines := []).append)
    checkpoint.save({"n": torch.tensor(1)}, (0, 0))
    checkpoint.close()
    checkpoint.save({"n": torch.zeros(100_000)}, (0, 1))
    checkpoint.close()
    assert lines == [f"cannot write the checkpoint {path}: No space left on device; the one before is kept"]
    assert checkpoint.load() == {"n": torch.tensor(1)}
    assert os.listdir(small_disk) == ["a.pt"]


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


class Away:
    """A place that other machines would find, and that is away."""

    def __str__(self):
        return "the far place"

    def fail(self, *_):
        raise SharedPlaceError("it is away")

    head = read = write = delete = fail


def test_a_copy_that_cannot_be_deleted_is_told_and_the_file_is_gone(tmp_path):
    checkpoint = Checkpoint(tmp_path / "study-1" / "a.pt", shared=Away(), log=(lines := []).append)
    checkpoint.save({"n": 1}, (0, 0), last=True)
    checkpoint.delete()
    assert lines == [
        "cannot copy the checkpoint to the far place: it is away",
        "cannot delete the checkpoint in the far place: it is away",
    ]
    assert os.listdir(tmp_path) == []


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


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("of_gpu", [False, True])
def test_the_moments_of_convolutions_are_laid_out_as_the_device_that_goes_on_wants_them(tmp_path, kind, of_gpu):
    # On CUDA images are channels last, on a CPU they are not; fused kernels walk over weights and moments side by side.
    generator = torch.Generator().manual_seed(0)
    rows = Split(torch.rand(64, 3, 6, 6, generator=generator), torch.randint(2, (64,), generator=generator))

    def trained(checkpoint=None, check=lambda: None, *, channels_last=False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 2))
        settings = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        fit(
            model,
            rows,
            optimizer=fastest(kind, model.parameters(), lr=0.05, **settings),
            loss=nn.CrossEntropyLoss(),
            metrics={},
            epochs=3,
            batch_size=16,
            seed=1,
            run=Run(options=Options(channels_last=channels_last), checkpoint=checkpoint, check=check),
        )
        return torch.cat([param.detach().flatten() for param in model.parameters()])

    with pytest.raises(Interrupted):
        trained(Checkpoint(tmp_path / "a.pt"), interrupt_at(6), channels_last=of_gpu)
    resumed = trained(Checkpoint(tmp_path / "a.pt"), channels_last=not of_gpu)
    torch.testing.assert_close(resumed, trained(), atol=1e-4, rtol=1e-4)
