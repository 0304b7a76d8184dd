"""Rows that stand in two splits."""

import pytest
import torch

from tuner.data import Data, Samples, Split
from tuner.training import overlap
from tuner.training.overlap import overlaps


def data_of(make, *, shared=0):
    """Three splits, of which `shared` rows of valid and test are train's first, with other targets."""
    rows = torch.arange(40.0).unsqueeze(1)
    train, valid, test = rows[:20], rows[20:30].clone(), rows[30:].clone()
    valid[:shared] = test[:shared] = train[:shared]
    return Data(*(make(part, torch.rand(len(part))) for part in (train, valid, test)))


KINDS = {
    "tensor": Split,
    "one number": lambda rows, targets: Split(rows[:, 0], targets),
    "bytes": lambda rows, targets: Split(rows.to(torch.uint8), targets),
    "strided": lambda rows, targets: Split(rows.repeat(1, 4).t().contiguous().t(), targets),
    "dict": lambda rows, targets: Split({"a": rows // 5, "b": rows % 5, "c": rows[:, :0]}, targets),
    "streamed": lambda rows, targets: Samples(Split(rows, targets)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_stand_in_two_splits_are_counted_for_each_two(kind):
    lines = list(map(str, overlaps(data_of(KINDS[kind], shared=3))))
    assert [line.partition(":")[0] for line in lines] == [
        "3 of 10 rows of the valid split have inputs that stand in train too",
        "3 of 10 rows of the test split have inputs that stand in train too",
        "3 of 10 rows of the test split have inputs that stand in valid too",
    ]
    assert list(overlaps(data_of(KINDS[kind]))) == []


def test_samples_are_not_read_for_it():
    samples = Samples([(torch.zeros(2), 0)])
    assert list(overlaps(Data(samples, samples, samples))) == []


@pytest.mark.parametrize("limit", ["LOOKED_AT_ROWS", "LOOKED_AT_BYTES"])
def test_of_very_large_data_nothing_is_told(monkeypatch, limit):
    monkeypatch.setattr(overlap, limit, 30)
    assert list(overlaps(data_of(Split, shared=3))) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("valid", "is_identical"),
    [(torch.arange(20), True), (torch.arange(19, -1, -1), True), (torch.arange(19), False), (torch.zeros(20), False)],
)
def test_two_splits_of_the_same_rows_are_identical_in_whatever_order(kind, valid, is_identical):
    rows = torch.arange(40.0).unsqueeze(1)
    parts = rows[:20], rows[valid.long()], rows[20:]
    data = Data(*(KINDS[kind](part, torch.rand(len(part))) for part in parts))
    assert [(its.first, its.second, its.is_identical) for its in overlaps(data)] == [("train", "valid", is_identical)]
