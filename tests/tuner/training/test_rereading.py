"""Samples that are not the same whenever, or by whomever, they are read."""

import os

import pytest
import torch

from tuner.data import DataError, Samples
from tuner.training.batches import Streamed, place_rows, readable

CPU = torch.device("cpu")
# Readers are forked where that works, and Python 3.12 warns of any fork with a thread about.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Rows:
    """Forty rows of one number, their own."""

    def __len__(self):
        return 40

    def __getitem__(self, row):
        return torch.tensor([float(row)]), row % 2


class Augmented(Rows):
    def __getitem__(self, row):
        return torch.tensor([float(row)]) * (1 if torch.rand(()) < 0.5 else -1), row % 2


class RelabelledAtRandom(Rows):
    def __getitem__(self, row):
        return torch.tensor([float(row)]), int(torch.randint(2, ()))


class Rounded(Rows):
    """The same but for what summing in another order leaves."""

    def __getitem__(self, row):
        return torch.tensor([float(row)]) * (1 + 1e-6 * torch.rand(())), row % 2


class ByProcess(Rows):
    """Other rows in each process, or none, as from a connection or generator that processes share."""

    def __init__(self, *, fails=False):
        self.process = os.getpid()
        self.fails = fails

    def __getitem__(self, row):
        if self.fails and os.getpid() != self.process:
            raise ValueError("lost the thread")
        return torch.tensor([float(row + (os.getpid() != self.process))]), row % 2


class OfFile(Rows):
    """Rows of a file, opened when the first one is read, or anew in each process."""

    def __init__(self, path, *, in_each_process):
        path.write_bytes(bytes(range(40)))
        self.path = path
        self.in_each_process = in_each_process
        self.file, self.process = None, None

    def __getitem__(self, row):
        if self.file is None or (self.in_each_process and self.process != os.getpid()):
            self.file, self.process = self.path.open("rb", buffering=0), os.getpid()
        self.file.seek(row)
        return torch.tensor([float(self.file.read(1)[0])]), row % 2


@pytest.mark.slow
@pytest.mark.parametrize("dataset", [Augmented(), RelabelledAtRandom()])
@pytest.mark.parametrize("how", ["auto", "resident", "stream"])
def test_samples_that_differ_when_they_are_read_again_have_to_be_called_random(dataset, how):
    with pytest.raises(DataError) as caught:
        place_rows([Samples(dataset, split="valid")], CPU, how, print)
    assert str(caught.value) == (
        "samples of the valid split differ when they are read again: say Samples(dataset, random=True) if they are"
        " meant to, or let a row be the same each time"
    )
    assert readable(Samples(dataset, random=True)).random


@pytest.mark.parametrize("dataset", [Rows(), Rounded()])
def test_samples_that_are_the_same_each_time_are_read_by_processes(dataset):
    assert readable(Samples(dataset, readers=2)).readers == 2


def test_samples_that_are_others_in_another_process_are_refused():
    with pytest.raises(DataError, match=r"processes that read samples of the train split get other rows than this one"):
        readable(Samples(ByProcess(), split="train", readers=2))
    with pytest.raises(
        DataError, match=r"get other rows than this one \(the train split cannot be read: ValueError: lost"
    ):
        readable(Samples(ByProcess(fails=True), split="train", readers=2))
    assert readable(Samples(ByProcess(), readers=0)).readers == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/fdinfo"), reason="tells by Linux's /proc")
@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("how", ["resident", "stream"])
def test_a_file_that_processes_would_share_is_read_by_one(tmp_path, random, how):
    lines = []
    samples = Samples(OfFile(tmp_path / "rows", in_each_process=False), random=random, split="train", readers=2)
    if random and how == "resident":
        samples = Samples(samples.dataset, split="train", readers=2)
    samples.rows(slice(0, 1))  # as Data does, which opens it
    (placed,) = place_rows([samples], CPU, how, lines.append)
    assert lines[1] == (
        "samples of the train split are read by this process alone, as 2 processes would share the open file"
        f" {tmp_path / 'rows'} and its place: open it anew in each process (os.getpid()) to have them read ahead"
    )
    assert placed.rows(slice(None)).inputs.flatten().tolist() == list(range(40))
    if isinstance(placed, Samples):
        assert placed.readers == 0
    samples.dataset.file.close()


def test_a_file_that_each_process_opens_is_read_ahead(tmp_path):
    samples = Samples(OfFile(tmp_path / "rows", in_each_process=True), split="train", readers=2)
    samples.rows(slice(0, 1))
    assert readable(samples).readers == 2
    samples.dataset.file.close()


@pytest.mark.parametrize("readers", [0, 1, 2])
def test_as_many_processes_read_as_samples_say(readers):
    streamed = Streamed(Samples(Rows(), readers=readers, prefetch=2), 8, CPU)
    try:
        assert len(list(streamed.in_order())) == 5
        assert streamed._loader.num_workers == readers
        assert streamed._loader.prefetch_factor == (2 if readers else None)
    finally:
        streamed.close()
