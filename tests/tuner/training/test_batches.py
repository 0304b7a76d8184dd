import errno
import gc
import multiprocessing
import os
import signal
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from tuner import training
from tuner.data import Data, DataError, Samples, Split, tensors
from tuner.training import batches, loaders
from tuner.training.batches import Resident, Streamed, batches_of, place
from tuner.training.loaders import DeadReaderError

CPU = torch.device("cpu")
# Readers are forked where that works, and Python 3.12 warns of any fork with a thread about.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def a_split(n=10, *, kind="tensor"):
    one = torch.arange(n * 3, dtype=torch.uint8).reshape(n, 3)
    inputs = {"tensor": one, "tuple": (one, one[:, :1].float()), "dict": {"x": one, "y": one[:, :1].float()}}[kind]
    return Split(inputs, torch.arange(n))


class Pairs:
    """Samples as a data set gives them; `broken` rows hold NaN, `wrong` ones have a label that is no class."""

    def __init__(self, n=10, *, broken=(), wrong=()):
        self.n = n
        self.broken = broken
        self.wrong = wrong

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        return torch.full((2,), float("nan") if row in self.broken else float(row)), 5 if row in self.wrong else row % 2


class Noisy(Pairs):
    def __getitem__(self, row):
        return torch.rand(2), row % 2


KINDS = pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])


@pytest.fixture
def streamed():
    """Make streamed batches, whose readers end with the test."""
    made = []

    def make(*arguments):
        made.append(Streamed(*arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


READERS = pytest.mark.parametrize("readers", [0, 2])


def listed(found):
    return [batch.targets.tolist() for batch in found]


@KINDS
@pytest.mark.parametrize("permuted_bytes", [1, 40, 2**26])
def test_resident_batches_are_the_rows_in_the_order_of_the_epoch(monkeypatch, kind, permuted_bytes):
    monkeypatch.setattr(batches, "PERMUTED_BYTES", permuted_bytes)
    split = a_split(kind=kind)
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    found = list(Resident(split, 4).shuffled(order))
    assert listed(found) == [[3, 1, 4, 0], [5, 9, 2, 6], [8, 7]]
    for batch in found:
        assert type(batch.inputs) is type(split.inputs)
        for whole, part in zip(tensors(split.inputs), tensors(batch.inputs), strict=True):
            assert part.dtype == whole.dtype
            assert torch.equal(part, whole[batch.targets])


@READERS
def test_after_the_last_batch_there_is_none(streamed, readers):
    order = torch.arange(10)
    assert list(Resident(a_split(), 4).shuffled(order, 3)) == []
    assert list(streamed(Samples(a_split()), 4, CPU, readers).shuffled(order, 3)) == []


def test_batches_are_views_of_rows_that_were_gathered_at_once():
    first, second, third = Resident(a_split(), 4).shuffled(torch.arange(10).flip(0))
    assert {batch.inputs.untyped_storage().data_ptr() for batch in (first, second, third)} == {
        first.inputs.untyped_storage().data_ptr()
    }


@READERS
@KINDS
def test_streamed_batches_are_the_resident_ones(streamed, kind, readers):
    split = a_split(kind=kind)
    order = torch.randperm(10)
    from_samples = streamed(Samples(split), 4, CPU, readers)
    for first in (0, 2):
        resident = list(Resident(split, 4).shuffled(order, first))
        found = list(from_samples.shuffled(order, first))
        assert listed(found) == listed(resident)
        assert type(found[0].inputs) is type(split.inputs)
        for ours, theirs in zip(found, resident, strict=True):
            for one, other in zip(tensors(ours.inputs), tensors(theirs.inputs), strict=True):
                assert torch.equal(one, other)
                assert one.dtype == other.dtype
    assert from_samples.waited_s > 0


def fitted(rows, valid=None, **changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))
    history = training.fit(
        model,
        rows,
        valid,
        **{
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            "loss": nn.CrossEntropyLoss(),
            "metrics": {},
            "epochs": 2,
            "batch_size": 8,
            "seed": 3,
            **changes,
        },
    )
    return model.state_dict(), history


def assert_equal(one, other):
    assert {name for name in one if not torch.equal(one[name], other[name])} == set()


def test_training_gives_the_same_from_samples_as_from_tensors():
    pairs = Pairs(30)
    split = Samples(pairs).rows(slice(None))
    (resident, one), (streamed, other) = fitted(split, split), fitted(Samples(pairs), Samples(pairs))
    assert_equal(resident, streamed)
    assert one == other
    assert sum(epoch.wait_s for epoch in one) == 0 < sum(epoch.wait_s for epoch in other)


def test_random_samples_that_other_processes_read_follow_from_the_seed_and_change_with_the_epoch(streamed):
    def epochs():
        rows = streamed(Samples(Noisy(), random=True), 4, CPU, 2)
        return [torch.cat([batch.inputs for batch in rows.shuffled(torch.arange(10), 0, seed)]) for seed in (1, 2)]

    first, again = epochs(), epochs()
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    later = streamed(Samples(Noisy(), random=True), 4, CPU, 1).shuffled(torch.arange(10), 1, 2)
    assert torch.equal(torch.cat([batch.inputs for batch in later]), first[1][4:])


def some_data(rows):
    return Data(rows, rows, Samples(Pairs(3)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "how", "share", "kind", "told"),
    [
        (Samples(Pairs()), "auto", 0.5, Split, "data resident on cpu (0 MB, "),
        (Samples(Pairs()), "auto", 0.0, Samples, "data streamed to cpu (0 MB, "),
        (Samples(Pairs()), "stream", 0.5, Samples, "--data stream"),
        (Samples(Pairs()), "resident", 0.0, Split, "--data resident"),
        (Samples(Noisy(), random=True), "auto", 0.5, Samples, "free, random, --data auto"),
        (Samples(Pairs()).rows(slice(None)), "auto", 0.0, Split, "data resident on cpu"),
        (Samples(Pairs()).rows(slice(None)), "stream", 0.5, Samples, "data streamed to cpu"),
    ],
)
def test_rows_are_resident_if_they_fit_unless_told_otherwise(monkeypatch, rows, how, share, kind, told):
    monkeypatch.setattr(batches, "RESIDENT_SHARE", share)
    lines = []
    placed = place(some_data(rows), CPU, how, lines.append)
    assert (type(placed.train), type(placed.valid), type(placed.test)) == (kind, kind, Samples)
    assert [told in line for line in lines] == [True]
    wanted, found = (data.train.rows(slice(None)) for data in (some_data(rows), placed))
    assert torch.equal(found.targets, wanted.targets)
    if not getattr(rows, "random", False):
        assert torch.equal(found.inputs, wanted.inputs)


@pytest.mark.slow
@pytest.mark.parametrize(("share", "kind", "told"), [(1.0, Split, False), (1e-3, Split, True), (1e-12, Samples, True)])
def test_slots_that_start_at_once_leave_each_other_room(share, kind, told):
    lines = []
    placed = place(some_data(Samples(Pairs())), CPU, "auto", lines.append, share=share)
    assert (type(placed.train), type(placed.valid)) == (kind, kind)
    assert [" free, a share of " in line for line in lines] == [told]


def test_random_samples_cannot_be_resident():
    with pytest.raises(DataError, match="random samples cannot be resident"):
        place(some_data(Samples(Noisy(), random=True)), CPU, "resident")


@pytest.mark.parametrize(
    ("train", "told"),
    [
        (Pairs(20, broken=[17]), "the train split needs finite numbers, got NaN or infinity: clean the data"),
        (Pairs(20, wrong=[17]), "labels need to be in 0..1, got 0..5 in the train split: check class_names"),
    ],
)
@READERS
def test_a_sample_that_cannot_be_trained_on_is_told_with_its_split_in_one_line(streamed, train, told, readers):
    data = Data(Samples(train), Samples(Pairs()), Samples(Pairs()), class_names=("even", "odd"))
    with pytest.raises(DataError) as caught:
        list(streamed(data.train, 4, CPU, readers).in_order())
    assert str(caught.value) == told


class Odd:
    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, row):
        return self.samples[row]


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        ([(object(), 1)], "a sample of the train split needs to be (inputs, target)"),
        ([torch.zeros(3)], "a sample of the train split needs to be (inputs, target)"),
        ([(torch.zeros(3), 1, 2)], "a sample of the train split needs to be (inputs, target)"),
        ([], "the train split needs at least one row"),
        ([(torch.zeros(5), 1)], "all splits need rows of the same shapes and types"),
    ],
)
def test_samples_of_another_form_are_refused_before_training(samples, told):
    with pytest.raises(DataError) as caught:
        Data(Samples(Odd(*samples)), Samples(Pairs()), Samples(Pairs()))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_on_another_device_than_the_model_are_refused():
    with pytest.raises(DataError, match="got the model on meta and data on cpu"):
        batches_of(a_split(), 4, torch.device("meta"))


def test_a_model_on_two_devices_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(DataError, match="a model needs to be on one device, got it on cpu, meta"):
        training.evaluate(model, Samples(Pairs()).rows(slice(None)), {})


class Readers:
    """Samples whose target is the process that read them."""

    def __len__(self):
        return 64

    def __getitem__(self, row):
        return torch.zeros(2), os.getpid()


def test_other_processes_read_and_live_from_epoch_to_epoch(streamed):
    batches = streamed(Samples(Readers()), 4, CPU, 2)
    first, second = ({int(target) for batch in batches.in_order() for target in batch.targets} for _ in range(2))
    assert first == second
    assert len(first) == 2
    assert os.getpid() not in first


def test_readers_outlive_a_sigterm_that_a_scheduler_sends_to_every_process(streamed):
    order = torch.arange(64)
    rows = streamed(Samples(Readers()), 1, CPU, 2)
    readers = {int(batch.targets) for batch in rows.shuffled(order)}
    again = rows.shuffled(order)
    next(again)
    for reader in readers:
        os.kill(reader, signal.SIGTERM)
    assert {int(batch.targets) for batch in again} == readers
    assert {int(batch.targets) for batch in rows.shuffled(order)} == readers


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_batches_are_read_ahead_and_pinned_for_a_cuda_device(streamed, device, pinned):
    loader = streamed(Samples(Readers()), 4, torch.device(device), 2)._loader
    assert loader.pin_memory == pinned
    assert loader.prefetch_factor > 1


@pytest.mark.slow
def test_a_reader_that_was_killed_between_two_epochs_is_told_as_one(streamed):
    rows = streamed(Samples(Readers()), 4, CPU, 2)
    list(rows.in_order())
    reader = rows._loader._iterator._workers[0]
    reader.kill()
    reader.join()
    with pytest.raises(DeadReaderError, match="a process that reads samples was killed"):
        list(rows.in_order())


class Failing:
    """A loader that raises when it is started."""

    def __init__(self, error):
        self.error = error

    def __iter__(self):
        raise self.error


@pytest.mark.parametrize(
    ("error", "told_as"),
    [
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed."), DeadReaderError),
        (RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"), DeadReaderError),
        (RuntimeError("Pin memory thread exited unexpectedly"), DeadReaderError),
        (EOFError(), DeadReaderError),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError),
        (RuntimeError("of another kind"), RuntimeError),
    ],
)
def test_what_a_loader_raises_is_told_by_its_cause(error, told_as):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - its exact type is looked at
        list(loaders.watched(Failing(error)))
    assert type(caught.value) is told_as


class Raising(Pairs):
    def __init__(self, error):
        super().__init__(64)
        self.error = error

    def __getitem__(self, row):
        if row == 40:
            raise self.error
        return super().__getitem__(row)


@pytest.mark.parametrize(
    ("error", "kind", "number"),
    [
        (OSError(errno.EIO, "Input/output error", "/data/x.jpg"), OSError, errno.EIO),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError, None),
        (MemoryError(), MemoryError, None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError, None),
        (FileNotFoundError(errno.ENOENT, "No such file", "/data/x.jpg"), DataError, None),
    ],
)
@READERS
def test_a_broken_disk_and_too_little_memory_are_not_told_as_of_the_data(streamed, error, kind, number, readers):
    with pytest.raises(kind) as caught:
        list(streamed(Samples(Raising(error), split="train"), 8, CPU, readers).in_order())
    assert type(caught.value) is kind
    assert getattr(caught.value, "errno", None) == number


FULL = "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"


def no_space(*_):
    raise RuntimeError(FULL)


@pytest.mark.parametrize("rows", [a_split(), Pairs()])
def test_a_batch_for_which_there_is_no_shared_memory_is_told_and_not_waited_for(monkeypatch, streamed, rows):
    monkeypatch.setattr(torch.Tensor, "share_memory_", no_space)
    with pytest.raises(DataError) as caught:
        list(streamed(Samples(rows, split="train"), 4, CPU, 1).in_order())
    assert str(caught.value) == (
        f"processes that read samples need shared memory, got {FULL!r}:"
        " give it a larger /dev/shm (docker --shm-size), or use --data resident"
    )


def test_samples_that_find_no_shared_memory_are_not_told_as_of_different_shapes(monkeypatch, streamed):
    monkeypatch.setattr(torch.utils.data, "default_collate", no_space)
    with pytest.raises(DataError, match="processes that read samples need shared memory"):
        list(streamed(Samples(Pairs(), split="train"), 4, CPU, 1).in_order())


class Stuck(Pairs):
    def __init__(self, n):
        super().__init__(n)
        self.n_stuck = multiprocessing.get_context("fork").Semaphore(0)

    def __getitem__(self, row):
        if row >= 2:
            self.n_stuck.release()
            threading.Event().wait(60)
        return super().__getitem__(row)


def test_closing_ends_readers_that_are_stuck(monkeypatch, streamed):
    monkeypatch.setattr(batches, "CLOSE_S", 0.1)
    samples = Stuck(20)
    rows = streamed(Samples(samples), 2, CPU, 2)
    next(rows.in_order())
    readers = loaders.workers_of(rows._loader)
    for _ in readers:  # one that is not yet would end by itself
        assert samples.n_stuck.acquire(timeout=60)
    # What torch sets for any other loader of this process raises wherever the main thread is.
    handler = signal.signal(signal.SIGCHLD, lambda *_: pytest.fail("a reader's end is no error here"))
    try:
        rows.close()
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert [reader.exitcode for reader in readers] == [-signal.SIGKILL] * 2


def test_what_was_closed_leaves_nothing_to_be_done_at_the_exit():
    rows = Streamed(Samples(Pairs()), 4, CPU, 1)
    list(rows.in_order())
    at_exit = weakref.ref(rows._at_exit)
    rows.close()
    del rows
    gc.collect()
    assert at_exit() is None


@pytest.mark.slow
def test_a_whole_number_of_numpy_is_a_batch_size():
    split = Samples(Pairs(30)).rows(slice(None))
    (one, _), (other, _) = fitted(split, batch_size=np.int64(8)), fitted(split)
    assert_equal(one, other)


@pytest.mark.parametrize(("device", "waits"), [("cuda", False), ("mps", True), ("cpu", True)])
def test_only_copies_to_a_cuda_device_are_not_waited_for(monkeypatch, device, waits):
    seen = []
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, device, non_blocking=False: seen.append(non_blocking) or tensor
    )
    a_split().to(torch.device(device))
    assert seen == [not waits] * 2


LEFT_OPEN = """
import threading, torch
from tuner.training.batches import Streamed
from tuner.data import Samples

class Stuck:
    def __len__(self):
        return 64

    def __getitem__(self, row):
        if row >= 16:
            threading.Event().wait(600)
        return torch.ones(3), 1

reading = Streamed(Samples(Stuck()), 8, torch.device("cpu"), 2).in_order()
next(reading)
"""


@pytest.mark.slow
def test_a_process_ends_though_a_reader_that_it_left_open_is_stuck(start_python):
    process = start_python(LEFT_OPEN)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
