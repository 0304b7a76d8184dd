"""Data that cannot be trained on: told before the first epoch, with objective, split and cause."""

import itertools
import math
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from attempts import Signs, a_spec, attempt
from optuna.trial import TrialState
from torch import nn

from tuner.data import Data, DataError, Samples, Split, downloading
from tuner.errors import TunerError
from tuner.slot.attempt import TrialObjective, load_data
from tuner.training.batches import CHECKED_ROWS


def test_data_that_cannot_be_loaded_are_told_with_the_line(tmp_path):
    class Gone(Signs):
        def load_data(self, root):
            return (root / "images.npy").read_bytes()

    with pytest.raises(TunerError) as caught:
        load_data(Gone(), tmp_path)
    message = str(caught.value)
    assert message.startswith(f"Gone.load_data('{tmp_path}') failed: FileNotFoundError: ")
    assert f"{__file__}, line " in message


class Broken(Signs):
    """Signs of which one split, or how they are put together, is not what can be trained on."""

    what: str

    def load_data(self, root):
        data = super().load_data(root)
        splits = dict(data.splits())
        train, valid = data.train, data.valid
        if self.what == "a number that is none":
            valid.inputs[7, 1] = math.nan
        elif self.what == "an infinite number":
            train.inputs[7, 1] = math.inf
        elif self.what == "a label too many":
            splits["valid"] = Split(valid.inputs, valid.targets + 1)
        elif self.what == "a label below 0":
            splits["train"] = Split(train.inputs, train.targets - 1)
        elif self.what == "other shapes":
            splits["valid"] = Split(valid.inputs[:, :1], valid.targets)
        elif self.what == "no rows":
            splits["test"] = data.test.rows(slice(0, 0))
        return Data(**splits, class_names=data.class_names)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("a number that is none", "the valid split needs finite numbers, got NaN or infinity: clean the data"),
        ("an infinite number", "the train split needs finite numbers, got NaN or infinity: clean the data"),
        ("a label too many", "labels need to be in 0..1, got 1..2 in the valid split: check class_names"),
        (
            "a label below 0",
            "labels need to be in 0..1, got -1..0 in the train split: check class_names, or"
            " give Data ignored=-1 if that stands for no class",
        ),
        (
            "other shapes",
            "all splits need rows of the same shapes and types, got {'input 0': 'float32 [2]', 'targets': 'int64 []'}"
            " in train and {'input 0': 'float32 [1]', 'targets': 'int64 []'} in valid: check load_data",
        ),
        ("no rows", "the test split needs at least one row, got none: check load_data"),
    ],
)
def test_bad_data_are_told_before_training_with_objective_split_and_cause(study, what, told):
    with pytest.raises(TunerError) as caught:
        attempt(study, Broken(what=what))
    message = str(caught.value)
    assert message.startswith(f"Broken.load_data('.') failed: DataError: {told} ({__file__}, line ")
    assert "\n" not in message
    assert study.trials == []


class Elsewhere(Signs):
    def build_model(self, params):
        return nn.Linear(2, 2, device="meta")


class HalfElsewhere(Signs):
    def build_model(self, params):
        model = nn.Linear(2, 2)
        offset = torch.zeros(2, device="meta")  # no buffer: the model does not take it along
        model.register_forward_hook(lambda module, inputs, outputs: outputs + offset)
        return model


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (
            Elsewhere(),
            "Elsewhere: build_model's model cannot be moved to cpu: Cannot copy out of meta tensor; no data!",
        ),
        (HalfElsewhere(), "meta"),
    ],
)
def test_a_model_on_another_device_fails_its_trial_before_the_first_epoch_ends(study, objective, told):
    outcome, trial = attempt(study, objective)
    assert (outcome.state, outcome.attrs["failure"]) == (TrialState.FAIL, "user_error")
    assert told in outcome.attrs["failure_message"]
    assert "device" in outcome.attrs["failure_message"] or "moved" in outcome.attrs["failure_message"]
    assert trial.intermediate_values == {}


class Read(Signs):
    """Signs whose training rows are samples, each there several times; row `broken` is no number, or has no label."""

    broken: int
    copies: int = 1
    is_label: bool = False

    def load_data(self, root):
        data = super().load_data(root)
        rows, targets = data.train.inputs.repeat(self.copies, 1), data.train.targets.repeat(self.copies)
        if self.is_label:
            targets[self.broken] = 2
        else:
            rows[self.broken] = math.nan
        return Data(Samples(list(zip(rows, targets, strict=True))), data.valid, data.test, data.class_names)


BROKEN_SAMPLES = pytest.mark.parametrize(
    ("is_label", "told"),
    [
        (False, "Read: the train split needs finite numbers, got NaN or infinity: clean the data"),
        (True, "Read: labels need to be in 0..1, got 0..2 in the train split: check class_names"),
    ],
)


@BROKEN_SAMPLES
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("how", ["auto", "resident", "stream"])
def test_broken_samples_are_found_before_the_first_epoch(study, how, is_label, told):
    with pytest.raises(TunerError) as caught:
        attempt(study, Read(broken=33, is_label=is_label), data=how)
    assert str(caught.value) == told
    assert study.trials == []


def test_streamed_samples_are_checked_all_over_each_split(study):
    reads = []

    class Rows:
        def __len__(self):
            return 1000

        def __getitem__(self, row):
            reads.append(row)
            return torch.zeros(2), 0

    class Watched(Signs):
        def load_data(self, root):
            data = super().load_data(root)
            return Data(data.train, Samples(Rows()), Samples(Rows()), data.class_names)

    TrialObjective.load(a_spec(data="stream"), Watched(), Path(), torch.device("cpu"))
    assert len(set(reads)) == CHECKED_ROWS
    assert max(later - earlier for earlier, later in itertools.pairwise(sorted(set(reads)))) == 16
    assert len(reads) < 2 * CHECKED_ROWS  # of valid alone: the search does not see test


@BROKEN_SAMPLES
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_broken_samples_that_are_met_later_fail_the_trial(study, is_label, told):
    outcome, _ = attempt(study, Read(broken=1, copies=5, is_label=is_label), data="stream")
    assert outcome.attrs["failure"] == "user_error"
    assert outcome.attrs["failure_message"].replace("got 1..2", "got 0..2") == told


class _Raises:
    def __init__(self, length, broken):
        self.length, self.broken = length, broken

    def __len__(self):
        return self.length

    def __getitem__(self, row):
        return {}[f"no file {row}"] if row == self.broken else (torch.zeros(2), 0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("length", [8, 1000])
def test_what_a_data_set_raises_while_it_is_read_is_told_in_one_line(study, length):
    class Missing(Signs):
        def load_data(self, root):
            data = super().load_data(root)
            return Data(Samples(_Raises(length, broken=1)), data.valid, data.test, data.class_names)

    if length > CHECKED_ROWS:
        message = attempt(study, Missing(), data="stream")[0].attrs["failure_message"]
    else:
        with pytest.raises(TunerError) as caught:
            attempt(study, Missing(), data="stream")
        message = str(caught.value)
    assert message.startswith("Missing: the train split cannot be read: KeyError: 'no file ")
    assert f"{__file__}, line " in message
    assert "\n" not in message


@contextmanager
def unprivileged():
    """Let the block run as a user who owns nothing, where tests run as root, whom nothing is denied."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("closed", ["", "images"])
def test_data_without_permission_are_told_with_objective_and_path(closed):
    class Images(Signs):
        def load_data(self, root):
            with downloading("Images", root):
                (root / "images").read_bytes()

    with tempfile.TemporaryDirectory() as name:  # pytest's own lies in one that is closed to others
        directory = Path(name)
        (directory / "images").touch()
        directory.chmod(0o755)
        (directory / closed).chmod(0)
        with unprivileged(), pytest.raises(TunerError) as caught:
            load_data(Images(), directory)
        directory.chmod(0o700)
    message = str(caught.value)
    assert message.startswith(
        f"Images.load_data('{directory}') failed: DataError: Images cannot be read from {directory} or kept there"
        " ([Errno 13] Permission denied: "
    )
    assert ": check its path and permissions (" in message


def test_data_in_a_closed_directory_are_told_of_where_they_seem_to_be_missing():
    def read(root):
        with downloading("Images", root):
            if not os.path.exists(root / "raw" / "images"):  # as torchvision asks
                raise RuntimeError("Error downloading images.gz")

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "raw").mkdir()
        (directory / "raw" / "images").touch()
        directory.chmod(0o755)
        (directory / "raw").chmod(0)
        with unprivileged(), pytest.raises(DataError) as caught:
            read(directory)
        (directory / "raw").chmod(0o700)
        assert f"(Error downloading images.gz; no permission to read {directory / 'raw'})" in str(caught.value)
        (directory / "raw" / "images").unlink()
        with pytest.raises(DataError, match=r"\(Error downloading images.gz\): copy it there"):
            read(directory)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path.write_bytes(b"cut o"), "Cut.load_data("),
        (lambda path: path.mkdir(), "IsADirectoryError"),
        (lambda path: None, "FileNotFoundError"),
    ],
)
def test_a_data_directory_that_cannot_be_read_is_told_in_one_line(tmp_path, make, told):
    class Cut(Signs):
        def load_data(self, root):
            return torch.load(root / "rows.pt", weights_only=True)

    make(tmp_path / "rows.pt")
    with pytest.raises(TunerError) as caught:
        load_data(Cut(), tmp_path)
    assert told in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that is to be missing")
def test_data_that_cannot_be_put_on_the_device_are_told_in_one_line():
    with pytest.raises(TunerError) as caught:
        TrialObjective.load(a_spec(), Signs(), Path(), torch.device("cuda"))
    message = str(caught.value)
    assert message.startswith("Signs: the data cannot be put on cuda: ")
    assert message.endswith("where memory is short, try --data stream or fewer slots")
    assert "\n" not in message
