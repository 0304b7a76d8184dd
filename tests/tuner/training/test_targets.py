"""Loss and metrics where a model answers several questions at once."""

import pytest
import torch
from sklearn import metrics as sk
from torch import nn
from torch.nn import functional
from torchmetrics import ClasswiseWrapper
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanSquaredError

from tuner.data import Batch, Samples, Split, split_rows
from tuner.errors import ObjectiveError
from tuner.training import evaluate, predict
from tuner.training.batches import batches_of
from tuner.training.classes import accuracies_of_classes, loss_of_classes
from tuner.training.targets import WeightedLoss, metric_of

N = 50
CPU = torch.device("cpu")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Answers(nn.Module):
    """A model that gives its inputs: logits of three classes, and one of two by a single number."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        answers = {"kind": x[:, :3], "is_new": x[:, 3]}
        return answers if self.kind == "dict" else tuple(answers.values())


def data_of(kind):
    x = drawn(N, 4)
    targets = {"kind": (x[:, :3] + drawn(N, 3, seed=1)).argmax(1), "is_new": (x[:, 3] + drawn(N, seed=2) > 0).float()}
    names = {"kind": ("a", "b", "c"), "is_new": ("no", "yes")}
    if kind == "tuple":
        return split_rows(x, tuple(targets.values()), class_names=tuple(names.values())), (0, 1)
    return split_rows(x, targets, class_names=names), tuple(names)


KINDS = pytest.mark.parametrize("kind", ["dict", "tuple"])


@KINDS
def test_by_default_each_target_has_its_loss_and_metric(kind):
    data, (first, second) = data_of(kind)
    x, model = data.train.inputs, Answers(kind)
    labels, is_new = data.train.targets[first], data.train.targets[second]
    ones = functional.cross_entropy(x[:, :3], labels), functional.binary_cross_entropy_with_logits(x[:, 3], is_new)
    for params, wanted in (({}, ones[0] + ones[1]), ({f"weight_{second}": 0.25}, ones[0] + 0.25 * ones[1])):
        assert float(loss_of_classes(data.train, params)(model(x), data.train.targets)) == pytest.approx(float(wanted))
    values = evaluate(model, data.train, accuracies_of_classes(data))
    accuracies = sk.accuracy_score(labels, x[:, :3].argmax(1)), sk.accuracy_score(is_new, x[:, 3] > 0)
    assert values == pytest.approx(
        {f"accuracy_{first}": accuracies[0], f"accuracy_{second}": accuracies[1], "accuracy": sum(accuracies) / 2}
    )


def test_any_metric_can_be_of_one_target():
    data, _ = data_of("dict")
    metrics = {
        "mse": metric_of("is_new", MeanSquaredError()),
        "of_each": metric_of("kind", ClasswiseWrapper(MulticlassAccuracy(3, average=None))),
    }
    for rows in (data.train, data.valid):  # the second is not of both
        values = evaluate(Answers("dict"), rows, metrics)
        assert values["mse"] == pytest.approx(sk.mean_squared_error(rows.targets["is_new"], rows.inputs[:, 3]))
    assert len(values) == 4


def test_a_loss_moves_with_what_it_holds():
    loss = WeightedLoss({"a": nn.CrossEntropyLoss(torch.ones(3)), "b": nn.MSELoss()}, {"b": 0.5})
    assert [buffer.device.type for buffer in loss.to("meta").buffers()] == ["meta"]


@pytest.mark.parametrize(
    ("outputs", "targets", "told"),
    [
        (torch.zeros(2), {"a": torch.zeros(2)}, "needs to return an output for 'a', got Tensor: let it return a dict"),
        ({"b": torch.zeros(2)}, {"a": torch.zeros(2)}, "needs to return an output for 'a', got 'b'"),
        ({}, {"a": torch.zeros(2), "b": 0}, "the loss needs one of each target, 'a', 'b', got those of 'a'"),
    ],
)
def test_outputs_that_do_not_fit_the_targets_are_told(outputs, targets, told):
    with pytest.raises(ObjectiveError) as caught:
        WeightedLoss({"a": nn.MSELoss()})(outputs, targets)
    assert told in str(caught.value).replace("'b', 'a'", "'a', 'b'")
    with pytest.raises(ObjectiveError, match="weights need targets that have a loss, 'a', got 'c'"):
        WeightedLoss({"a": nn.MSELoss()}, {"c": 1.0})


def test_several_outputs_for_one_target_want_a_prediction():
    data, _ = data_of("dict")
    rows = Split(data.valid.inputs, data.valid.targets["kind"])
    with pytest.raises(ObjectiveError, match=r"as there is one target, got tuple: override prediction\(outputs\)"):
        evaluate(Answers("tuple"), rows, {"accuracy": MulticlassAccuracy(3)})
    with pytest.raises(ObjectiveError, match="a prediction needs to be one tensor, got list: override"):
        predict(Answers("tuple"), rows.inputs, lambda outputs: [outputs])


@KINDS
@pytest.mark.parametrize("make", [lambda split: split, lambda split: Samples(list(split), readers=0)])
def test_batches_have_all_targets_of_their_rows(kind, make):
    data, (first, second) = data_of(kind)
    rows = data.train
    order = torch.randperm(len(rows))
    found = list(batches_of(make(rows), 8, CPU).shuffled(order))
    assert [batch.n_rows for batch in found] == [8, 8, 8, 6]
    for batch, numbers in zip(found, order.split(8), strict=True):
        assert isinstance(batch, Batch)
        assert torch.equal(batch.inputs, rows.inputs[numbers])
        for target in (first, second):
            assert torch.equal(batch.targets[target], rows.targets[target][numbers])
