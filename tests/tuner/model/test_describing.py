"""What an export tells of its inputs' ranges and of each output: by the labels, and by the outputs where it has to."""

import pytest
import torch
from manifests import an_input, an_output
from torch import nn

from tuner.data import Data, Samples, Split
from tuner.model.describing import with_kinds, with_ranges
from tuner.objective import Objective

N = 40
X = torch.linspace(-1, 1, N * 3).reshape(N, 3)
ONE, TWO = torch.arange(N) % 3, (torch.arange(N) % 2).float()


class Plain(Objective):
    def suggest(self, trial):
        pass

    def load_data(self, root):
        raise NotImplementedError

    def build_model(self, params):
        raise NotImplementedError


class OwnLoss(Plain):
    def build_loss(self, params, train):
        return nn.BCELoss()


class OwnPrediction(Plain):
    def prediction(self, outputs):
        return outputs.softmax(1)


class Gives(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _data(targets, names=()):
    rows = Split(X, targets)
    return Data(rows, rows, rows, names)


@pytest.mark.parametrize(
    ("objective", "targets", "n_classes", "gives", "wanted"),
    [
        (Plain(), ONE, 3, lambda x: x, ("classes", "logits")),
        (Plain(), ONE, 3, lambda x: x.softmax(1), ("classes", "logits")),  # as the default loss takes them
        (OwnPrediction(), ONE, 3, lambda x: x.softmax(1), ("classes", "probabilities")),
        (OwnLoss(), ONE, 3, lambda x: x.log_softmax(1), ("classes", "logits")),
        (OwnLoss(), ONE, 3, lambda x: x.sigmoid(), ("classes", "logits")),  # no probabilities of one class of three
        (OwnPrediction(), ONE, 3, lambda x: x.argmax(1), ("classes", "logits")),
        (Plain(), TWO, 2, lambda x: x[:, 0], ("binary", "logits")),
        (OwnLoss(), TWO, 2, lambda x: x[:, 0].sigmoid(), ("binary", "probabilities")),
        (OwnLoss(), TWO, 2, lambda x: x[:, 0], ("binary", "logits")),
        (Plain(), (X > 0).float(), 3, lambda x: x, ("multilabel", "logits")),
        (Plain(), X[:, 0], 0, lambda x: x[:, 0], ("number", None)),
        (Plain(), ONE, 0, lambda x: x, (None, None)),
    ],
)
def test_an_output_has_the_kind_of_its_target(objective, targets, n_classes, gives, wanted):
    data = _data(targets, tuple("abc"[:n_classes]))
    (found,) = with_kinds([an_output(3)], Gives(gives), data, objective)
    assert (found.kind, found.values) == wanted


def test_each_of_several_outputs_has_its_own_and_those_of_no_target_have_none():
    data = _data({"one": ONE, "two": TWO, "number": X[:, 0]}, {"one": tuple("abc"), "two": ("a", "b")})
    described = [an_output(name=name) for name in ("one", "number", "two", "more")]
    found = with_kinds(described, Gives(lambda x: x), data, Plain())
    assert [its.kind for its in found] == ["classes", "number", "binary", None]
    in_order = _data((TWO, X[:, 0]), (("a", "b"),))
    assert [its.kind for its in with_kinds([an_output(), an_output()], nn.Identity(), in_order, Plain())] == [
        "binary",
        "number",
    ]
    assert with_kinds([], nn.Identity(), data, Plain()) == []  # without a program


class Wide:
    """More samples than are looked at."""

    def __len__(self):
        return 100_000

    def __getitem__(self, row):
        Wide.read.append(row)
        return torch.tensor([float(row)]), 0.0


def test_an_input_has_the_range_of_the_training_split():
    (found,) = with_ranges([an_input(3)], Split(X, ONE))
    assert found.seen == (-1, 1)
    pair = Split((torch.ones(N, 2, dtype=torch.bool), torch.arange(N).to(torch.uint8)), ONE)
    assert [its.seen for its in with_ranges([an_input(2), an_input()], pair)] == [(1, 1), (0, N - 1)]
    Wide.read = []
    (found,) = with_ranges([an_input(1)], Samples(Wide()))
    assert found.seen is not None
    assert 99_000 < found.seen[1] < 100_000  # from all over it
    assert len(Wide.read) < 300
