import fcntl
import hashlib
import itertools
import os
import zlib
from pickle import UnpicklingError
from urllib.error import URLError

import numpy as np
import pytest
import torch

from tuner.data import (
    Data,
    DataError,
    Samples,
    Split,
    class_weights,
    downloading,
    join,
    map_inputs,
    split_rows,
    tensors,
)


def a_split(rows=4, *, kind="tensor", first=0.0, targets=None):
    one = torch.arange(rows * 3, dtype=torch.float32).reshape(rows, 3) + first
    inputs = {"tensor": one, "tuple": (one, one[:, :1]), "dict": {"x": one, "y": one[:, :1]}}[kind]
    return Split(inputs, torch.arange(rows) % 2 if targets is None else targets)


def the_data(**changes):
    splits = {name: a_split() for name in ("train", "valid", "test")}
    return Data(**{**splits, "class_names": ("even", "odd"), **changes})


KINDS = pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])


@KINDS
def test_rows_are_taken_from_every_tensor(kind):
    split = a_split(5, kind=kind)
    taken = split.rows(torch.tensor([3, 0]))
    assert len(taken) == 2
    assert taken.targets.tolist() == [1, 0]
    for whole, part in zip(tensors(split.inputs), tensors(taken.inputs), strict=True):
        assert torch.equal(part, whole[[3, 0]])
    assert type(taken.inputs) is type(split.inputs)
    assert len(split.rows(slice(1, 99))) == 4


@KINDS
def test_two_splits_are_joined_row_by_row(kind):
    first, second = a_split(2, kind=kind), a_split(3, kind=kind, first=100.0)
    joined = join(first, second)
    assert len(joined) == 5
    assert joined.targets.tolist() == [0, 1, 0, 1, 0]
    for one, other, both in zip(*(tensors(split.inputs) for split in (first, second, joined)), strict=True):
        assert torch.equal(both, torch.cat([one, other]))


def test_inputs_with_names_are_joined_by_name_in_whatever_order_they_come():
    x, y = torch.zeros(2, 3), torch.ones(2, 3)
    joined = join(Split({"x": x, "y": y}, torch.zeros(2)), Split({"y": y, "x": x}, torch.zeros(2)))
    assert torch.equal(joined.inputs["x"], torch.zeros(4, 3))
    assert torch.equal(joined.inputs["y"], torch.ones(4, 3))


@KINDS
def test_tensors_that_are_on_the_device_already_are_shared(kind):
    split = a_split(kind=kind)
    moved = split.to(torch.device("cpu"))
    for one, other in zip(tensors(split.inputs), tensors(moved.inputs), strict=True):
        assert one.data_ptr() == other.data_ptr()


@KINDS
def test_a_function_is_mapped_over_every_input(kind):
    split = a_split(kind=kind)
    doubled = map_inputs(lambda tensor: tensor * 2, split.inputs)
    assert [float(tensor.sum()) for tensor in tensors(doubled)] == [
        2 * float(tensor.sum()) for tensor in tensors(split.inputs)
    ]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Split(torch.zeros(3, 2), torch.zeros(2)), "the same number of rows, got [2, 3]: check load_data"),
        (lambda: Split({"x": torch.zeros(3), "y": torch.zeros(4)}, torch.zeros(3)), "got [3, 4]"),
        (lambda: Split(np.zeros((3, 2)), torch.zeros(3)), "got ndarray: use torch.as_tensor"),
        (lambda: Split(torch.zeros(3), np.zeros(3)), "got ndarray: use torch.as_tensor"),
        (lambda: Split([torch.zeros(3)], torch.zeros(3)), "got list: use torch.as_tensor"),
        (lambda: Split((torch.zeros(3), [1, 2, 3]), torch.zeros(3)), "got list: use torch.as_tensor"),
        (lambda: Split(torch.tensor(1.0), torch.zeros(1)), "got one number"),
        (lambda: the_data(test=a_split(0)), "the test split needs at least one row, got none: check load_data"),
        (lambda: the_data(valid=a_split(first=float("nan"))), "the valid split needs finite numbers"),
        (lambda: the_data(train=a_split(first=float("inf"))), "the train split needs finite numbers"),
        (
            lambda: the_data(class_names=(), valid=a_split(2, targets=torch.tensor([0.0, float("nan")]))),
            "the valid split needs finite numbers",
        ),
        (
            lambda: the_data(test=a_split(2, targets=torch.tensor([0, 2]))),
            "labels need to be in 0..1, got 0..2 in the test split: check class_names",
        ),
        (lambda: the_data(train=a_split(2, targets=torch.tensor([-1, 1]))), "got -1..1 in the train split"),
        (
            lambda: the_data(valid=a_split(2, targets=torch.tensor([0.0, 1.0]))),
            "'targets': 'int64 []'} in train and {'input 0': 'float32 [3]', 'targets': 'float32 []'} in valid",
        ),
        (
            lambda: the_data(valid=Split(torch.zeros(2, 4), torch.tensor([0, 1]))),
            "rows of the same shapes and types, got {'input 0': 'float32 [3]', 'targets': 'int64 []'} in train and"
            " {'input 0': 'float32 [4]', 'targets': 'int64 []'} in valid: check load_data",
        ),
        (lambda: the_data(test=Split(torch.zeros(2, 3).double(), torch.tensor([0, 1]))), "'float64 [3]'"),
        (lambda: the_data(test=Split(torch.zeros(2, 3), torch.tensor([[0, 0], [1, 1]]))), "'targets': 'int64 [2]'"),
        (lambda: the_data(valid=Split({"x": torch.zeros(2, 3)}, torch.tensor([0, 1]))), "'input x'"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_with_the_split_and_the_reason(make, told):
    with pytest.raises(DataError) as caught:
        make()
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def labelled(targets, n_classes=3, ignored=None, kind=lambda split: split):
    split = kind(Split(torch.zeros(len(targets), 2), targets))
    return Data(split, split, split, tuple("abcdefghij"[:n_classes]), ignored)


@pytest.mark.parametrize("kind", [lambda split: split, Samples, lambda split: Samples(list(split))])
@pytest.mark.parametrize(
    ("targets", "n_classes", "form", "dtype"),
    [
        (torch.tensor([0, 2, 1], dtype=torch.int32), 3, "one", torch.int64),
        (torch.tensor([0, 2, 1], dtype=torch.uint8), 3, "one", torch.int64),
        (torch.tensor([True, False]), 2, "one", torch.int64),
        (torch.tensor([[[0, 2], [1, 1]]], dtype=torch.int16), 3, "one", torch.int64),
        (torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64), 3, "several", torch.float32),
        (torch.tensor([[False, True, True], [True, False, False]]), 3, "several", torch.float32),
        (torch.tensor([0.0, 1.0, 0.5]), 2, "binary", torch.float32),
        (torch.tensor([[0.0], [1.0]]), 2, "binary", torch.float32),
        (torch.tensor([[0.0], [1.0]]), 1, "several", torch.float32),
    ],
)
def test_labels_get_the_type_that_losses_take(targets, n_classes, form, dtype, kind):
    data = labelled(targets, n_classes, kind=kind)
    for _, rows in data.splits():
        assert rows.labels.form == form
        read = rows.rows(slice(None))
        assert read.targets.dtype == dtype
        assert read.targets.tolist() == targets.tolist()
        assert read.labels is not None


@pytest.mark.parametrize(
    ("targets", "n_classes", "ignored", "told"),
    [
        (torch.tensor([[0], [1]]), 3, None, "need the shape [n], got [n, 1] in the train split: use .squeeze(1), or"),
        (
            torch.tensor([[0, 0, 1], [1, 0, 0]]),
            3,
            None,
            "got a column of 0 and 1 for each of 3 in the train split: use",
        ),
        (
            torch.tensor([[0, 1, 1], [1, 0, 0]]),
            3,
            None,
            ".argmax(1) for one class a row, .float() where a row may have",
        ),
        (torch.tensor([[0, 1], [1, 0]]), 2, None, "need the number of a class, got a column of 0 and 1 for each of 2"),
        (torch.tensor([0.0, 1.0]), 3, None, "got torch.float32 in the train split: use .long(), or give a column for"),
        (torch.tensor([[0.0, 1.5, 0.0]]), 3, None, "labels that are no integers need to be in 0..1, got 0..1.5 in the"),
        (
            torch.tensor([0, 1, 255]),
            2,
            None,
            "got 0..255 in the train split: check class_names, or give Data ignored=255",
        ),
        (torch.tensor([0, 1, -100]), 2, None, "or give Data ignored=-100 if that stands for no class"),
        (
            torch.tensor([0, 1, 7, 255]),
            2,
            255,
            "labels need to be in 0..1, got 0..7 in the train split: check class_names",
        ),
        (torch.tensor([1j]), 2, None, "class labels need an integer type, got torch.complex64 in the train split: use"),
    ],
)
def test_labels_that_no_loss_takes_are_refused_with_advice(targets, n_classes, ignored, told):
    with pytest.raises(DataError) as caught:
        labelled(targets, n_classes, ignored)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "n_classes", "ignored"),
    [
        (torch.tensor([0, 255, 1], dtype=torch.uint8), 2, 255),
        (torch.tensor([-100, -100]), 2, -100),
        (torch.tensor([[0.0, -1.0, 1.0]]), 3, -1),
        (torch.tensor([[0, 1], [0, 0], [1, 1]]), 2, None),  # two places a row, not two columns
    ],
)
def test_labels_that_are_none_may_be_named(targets, n_classes, ignored):
    assert labelled(targets, n_classes, ignored).train.targets.tolist() == targets.tolist()


def test_what_is_known_of_labels_stays_with_the_rows():
    data = labelled(torch.tensor([0, 1, 255]), 2, 255)
    wanted = data.train.labels
    for rows in (
        data.train.rows(slice(2)),
        data.train.to(torch.device("cpu")),
        join(data.train, data.valid),
        join(Samples(data.train, labels=wanted), data.valid),
    ):
        assert rows.labels == wanted


def test_classes_that_are_not_one_a_row_are_split_without_their_shares():
    data = split_rows(torch.zeros(10, 1), torch.eye(10), class_names=tuple("abcdefghij"))
    assert [len(split) for _, split in data.splits()] == [6, 2, 2]


def test_data_without_classes_takes_any_targets():
    regression = a_split(targets=torch.rand(4, 2))
    assert Data(regression, regression, regression).class_names == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_a_fingerprint_follows_from_the_data_alone(dtype):
    def data(value=1, targets=(0, 1, 0)):
        split = Split(torch.ones(3, 2).mul(value).to(dtype), torch.tensor(targets))
        return Data(split, split, split)

    assert data().fingerprint() == data().fingerprint()
    assert data().fingerprint() != data(value=0).fingerprint()
    assert data().fingerprint() != data(targets=(0, 1, 1)).fingerprint()
    assert len(data().fingerprint()) == hashlib.sha256().digest_size * 2


def test_a_fingerprint_is_of_the_values_not_of_how_they_lie_in_memory():
    values = torch.arange(12.0).reshape(3, 4)
    strided = values.t().contiguous().t()
    assert not strided.is_contiguous()
    one, other = (Split(inputs, torch.zeros(3)) for inputs in (values, strided))
    assert Data(one, one, one).fingerprint() == Data(other, other, other).fingerprint()


def test_a_fingerprint_tells_rows_that_changed_their_split():
    a, b = a_split(), a_split(first=1.0)
    assert the_data(valid=a, test=b).fingerprint() != the_data(valid=b, test=a).fingerprint()


def test_one_process_at_a_time_downloads(tmp_path):
    directory = tmp_path / "new"
    with downloading("Faces", directory):
        handle = os.open(directory, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError("no\ndownload"),
        RuntimeError("no download"),  # as torchvision says it
        URLError("no download", filename="https://example.org/faces.gz"),
    ],
)
def test_what_cannot_be_downloaded_is_told_with_its_place_and_advice(tmp_path, error):
    with pytest.raises(DataError) as caught, downloading("Faces", tmp_path):
        raise error
    assert str(caught.value).replace("<urlopen error no download>", "no download") == (
        f"Faces is not in {tmp_path} and cannot be downloaded (no download):"
        " copy it there from a machine that has it, or connect this one to the network"
    )


@pytest.mark.parametrize("error", [EOFError(), ValueError("cut\noff"), zlib.error("cut off"), UnpicklingError("?")])
def test_what_is_damaged_is_told_with_its_place_and_advice(tmp_path, error):
    with pytest.raises(DataError) as caught, downloading("Faces", tmp_path):
        raise error
    message = str(caught.value)
    assert message.startswith(f"Faces in {tmp_path} is damaged or incomplete ({type(error).__name__}")
    assert message.endswith("): delete its files there, to have them downloaded")
    assert "\n" not in message


def test_what_the_block_says_of_its_data_passes_through(tmp_path):
    with pytest.raises(DataError, match=r"^the faces look away$"), downloading("Faces", tmp_path):
        raise DataError("the faces look away")


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    told = r"^Faces cannot be read from .*file or kept there \(.*exists.*\): check its path and permissions$"
    with pytest.raises(DataError, match=told), downloading("Faces", tmp_path / "file"):
        pass


ROWS = torch.arange(100, dtype=torch.float32).reshape(100, 1)
LABELS = (torch.arange(100) < 20).long()


def in_splits(data):
    return [sorted(split.inputs.flatten().int().tolist()) for _, split in data.splits()]


@pytest.mark.parametrize("inputs", [(ROWS, ROWS + 1), {"a": ROWS, "b": ROWS + 1}])
def test_several_inputs_are_split_together(inputs):
    data = split_rows(inputs, LABELS)
    for _, split in data.splits():
        one, other = tensors(split.inputs)
        assert torch.equal(one + 1, other)
        assert torch.equal(split.targets, (one.flatten() < 20).long())


def test_every_row_is_in_one_split_with_its_target():
    data = split_rows(ROWS, LABELS, class_names=("big", "small"))
    assert [len(rows) for rows in in_splits(data)] == [60, 20, 20]
    assert sorted(itertools.chain(*in_splits(data))) == list(range(100))
    for _, split in data.splits():
        assert torch.equal(split.targets, (split.inputs.flatten() < 20).long())


@pytest.mark.parametrize(("valid", "test"), [(0.2, 0.2), (0.1, 0.4), (0.25, 0.05)])
def test_every_split_has_its_share_of_each_class(valid, test):
    data = split_rows(ROWS, LABELS, class_names=("big", "small"), valid=valid, test=test)
    wanted = [20 * (1 - valid - test), 20 * valid, 20 * test]
    assert [int(split.targets.sum()) for _, split in data.splits()] == pytest.approx(wanted)


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 7, 2**63 - 1])
def test_the_splits_follow_from_the_seed(seed):
    assert in_splits(split_rows(ROWS, LABELS, seed=seed)) == in_splits(split_rows(ROWS, LABELS, seed=seed))
    assert in_splits(split_rows(ROWS, LABELS, seed=seed)) != in_splits(
        split_rows(ROWS, LABELS, seed=seed - 1 if seed else 1)
    )


def test_samples_are_joined_with_samples_and_with_tensors():
    split = a_split(2)
    samples = Samples(a_split(3, first=100.0))
    for first, second, wanted in ((split, samples, [0, 3, 100, 103, 106]), (samples, split, [100, 103, 106, 0, 3])):
        joined = join(first, second)
        assert isinstance(joined, Samples)
        assert joined.rows(slice(None)).inputs[:, 0].tolist() == wanted


def test_a_fingerprint_tells_samples_apart_too():
    def data(first):
        samples = Samples(a_split(first=first))
        return Data(samples, samples, samples)

    assert data(0.0).fingerprint() == data(0.0).fingerprint() != data(1.0).fingerprint()


def test_each_class_weighs_the_same_in_all():
    weights = class_weights(a_split(4, targets=torch.tensor([0, 0, 0, 2])), 4)
    assert weights.tolist() == pytest.approx([4 / 12, 0.0, 1.0, 0.0])


def test_labels_that_are_none_weigh_nothing():
    train = labelled(torch.tensor([0, 0, 0, 255, 255, 1]), 2, 255).train
    assert class_weights(train, 2).tolist() == pytest.approx([4 / 6, 4 / 2])


def test_several_classes_a_row_have_no_class_weights():
    with pytest.raises(DataError, match=r"class weights need one class a row, got torch\.float32"):
        class_weights(labelled(torch.eye(3)).train, 3)


def test_a_split_that_is_streamed_has_its_class_weights():
    assert class_weights(Samples(a_split(3)), 2).tolist() == class_weights(a_split(3), 2).tolist() == [0.75, 1.5]


def test_samples_have_no_class_weights():
    with pytest.raises(DataError, match="count them once in load_data"):
        class_weights(Samples([(torch.zeros(2), 1)]), 2)


class Unreadable:
    def __len__(self):
        return 4

    def __getitem__(self, row):
        raise OSError(f"no image {row}")


@pytest.mark.parametrize(
    ("split", "told"),
    [
        (None, "the valid split needs to be a Split of tensors or Samples, got NoneType: Samples(dataset) takes"),
        (Samples(iter([])), "the valid split needs to be a Split of tensors or Samples, got list_iterator: Samples"),
        (Unreadable(), "the valid split needs to be a Split of tensors or Samples, got Unreadable: Samples(dataset)"),
        (Samples(Unreadable()), f"the valid split cannot be read: OSError: no image 0 ({__file__}, line "),
    ],
)
def test_a_split_that_cannot_be_read_is_told_with_its_name(split, told):
    with pytest.raises(DataError) as caught:
        the_data(valid=split)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("nothing", [(), {}])
def test_inputs_and_targets_of_no_tensor_are_refused(nothing):
    with pytest.raises(DataError, match="inputs need at least one tensor, got none"):
        Split(nothing, torch.zeros(3))
    with pytest.raises(DataError, match="targets need at least one tensor, got none"):
        Split(torch.zeros(3), nothing)


DIGITS = torch.arange(40) % 10
SEVERAL = {
    "dict": ({"digit": DIGITS, "even": DIGITS % 2 == 0, "size": DIGITS / 3}, ("digit", "even")),
    "tuple": ((DIGITS, DIGITS % 2 == 0, DIGITS / 3), (0, 1)),
}
NAMES = tuple("0123456789"), ("odd", "even")


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("samples", [lambda split: split, Samples, lambda split: Samples(list(split))])
def test_each_of_several_targets_has_its_labels(kind, samples):
    targets, names = SEVERAL[kind]
    split = samples(Split(torch.zeros(40, 2), targets))
    data = Data(split, split, split, dict(zip(names, NAMES, strict=True)))
    found = data.valid.rows(slice(None)).targets
    assert type(found) is type(targets)
    assert [tensor.dtype for tensor in tensors(found)] == [torch.int64, torch.int64, torch.float32]
    forms = {target: (labels.n_classes, labels.form) for target, labels in data.train.labels.by_target.items()}
    assert forms == {names[0]: (10, "one"), names[1]: (2, "one")}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_targets_stay_with_their_rows(kind):
    data = split_rows(torch.arange(40.0), SEVERAL[kind][0])
    both = join(data.train, data.valid)
    assert (len(both), data.test.n_bytes) == (32, 8 * (4 + 8 + 1 + 4))
    digits, even, size = tensors(both.targets)
    assert torch.equal(digits, both.inputs.long() % 10)
    assert torch.equal(even, digits % 2 == 0)
    assert torch.equal(size, digits / 3)
    assert tensors(both[3][1])[0] == both.inputs[3] % 10
    changed = split_rows(torch.arange(40.0), {**SEVERAL["dict"][0], "size": DIGITS / 4})
    assert changed.fingerprint() != split_rows(torch.arange(40.0), SEVERAL["dict"][0]).fingerprint()


def test_the_names_of_classes_of_targets_in_order_are_in_their_order():
    data = split_rows(torch.zeros(40), (DIGITS, DIGITS % 2 == 0), class_names=NAMES)
    assert list(data.train.labels.by_target) == [0, 1]


@pytest.mark.parametrize(
    ("targets", "class_names", "told"),
    [
        (SEVERAL["dict"][0], NAMES[0], "class_names need the names of each of several targets, got those of one"),
        (SEVERAL["dict"][0], {"digits": NAMES[0]}, "names of the targets, 'digit', 'even', 'size', got 'digits'"),
        (SEVERAL["dict"][0], {"digit": NAMES[1]}, "target 'digit': labels need to be in 0..1, got 0..9 in the "),
        (DIGITS, {"digit": NAMES[0]}, "class_names are of several targets, got one tensor in the train split"),
        ({"hot": torch.eye(40).long()}, {"hot": tuple(map(str, range(40)))}, "target 'hot': class labels need the num"),
    ],
)
def test_names_of_classes_that_do_not_fit_the_targets_are_refused(targets, class_names, told):
    with pytest.raises(DataError) as caught:
        split_rows(torch.zeros(40), targets, class_names=class_names)
    assert told in str(caught.value)


def test_each_of_several_targets_has_its_class_weights():
    data = split_rows(torch.zeros(40), SEVERAL["dict"][0], class_names={"even": NAMES[1]})
    even = float(data.train.targets["even"].double().mean())
    assert class_weights(data.train, 2, "even").tolist() == pytest.approx([0.5 / (1 - even), 0.5 / even])
    with pytest.raises(DataError, match="give target=its name"):
        class_weights(data.train, 2)
