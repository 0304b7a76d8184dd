"""Loss and metric of a classification, by the form of its labels."""

import math

import pytest
import torch
from sklearn import metrics as sk
from torch import nn

from tuner.data import Data, DataError, Split
from tuner.errors import ObjectiveError
from tuner.training import evaluate
from tuner.training.classes import accuracies_of_classes, loss_of_classes


def data_of(outputs, targets, n_classes, ignored=None):
    rows = Split(outputs, targets)
    return Data(rows, rows, rows, tuple("abcdef"[:n_classes]), ignored)


def found(outputs, targets, n_classes, ignored=None, smoothing=0.0):
    """The loss and the accuracy of these outputs."""
    data = data_of(outputs, targets, n_classes, ignored)
    loss = loss_of_classes(data.train, {"label_smoothing": smoothing})(outputs, data.train.targets)
    metrics = evaluate(nn.Identity(), data.train, accuracies_of_classes(data))
    return float(loss), metrics["accuracy"]


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(40, 3), (20, 3, 4, 4)])
def test_labels_that_are_none_count_neither_in_the_loss_nor_in_the_metric(shape, smoothing):
    outputs = drawn(*shape)
    targets = torch.randint(3, (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
    targets.view(-1)[::3] = 255
    loss, accuracy = found(outputs, targets, 3, 255, smoothing)
    known = targets != 255
    places = outputs.movedim(1, -1)[known]
    assert loss == pytest.approx(float(nn.CrossEntropyLoss(label_smoothing=smoothing)(places, targets[known])))
    assert accuracy == pytest.approx(sk.accuracy_score(targets[known], places.argmax(1)))


def test_a_batch_without_labels_has_a_loss_of_0():
    targets = torch.full((4,), -100)
    rows = data_of(drawn(5, 2), torch.tensor([0, 1, -100, 0, 1]), 2, -100).train
    assert float(loss_of_classes(rows, {})(drawn(4, 2), targets)) == 0.0
    assert math.isnan(float(nn.CrossEntropyLoss()(drawn(4, 2), targets)))


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_several_labels_a_row_are_told_from_logits_above_0(scale):
    outputs = drawn(50, 3) * scale + 0.5 * scale  # some batches of it are all in 0..1
    targets = (drawn(50, 3).roll(1, 0) > 0).float()
    loss, accuracy = found(outputs, targets, 3)
    assert loss == pytest.approx(float(nn.BCEWithLogitsLoss()(outputs, targets)))
    assert accuracy == pytest.approx(float(((outputs > 0) == targets.bool()).float().mean()))


def test_labels_of_several_a_row_may_be_none_too():
    outputs, targets = drawn(50, 3), (drawn(50, 3).roll(1, 0) > 0).float()
    targets[::2, 1] = -1
    loss, accuracy = found(outputs, targets, 3, -1)
    known = targets != -1
    assert loss == pytest.approx(float(nn.BCEWithLogitsLoss()(outputs[known], targets[known])))
    assert accuracy == pytest.approx(float(((outputs > 0) == targets.bool())[known].float().mean()))


@pytest.mark.parametrize("shape", [(50,), (50, 1), (10, 4, 4)])
def test_one_of_two_classes_may_be_a_number_with_an_output_of_its_own(shape):
    outputs, targets = drawn(*shape), (drawn(*shape).roll(1, 0) > 0).float()
    loss, accuracy = found(outputs.unsqueeze(1), targets, 2, smoothing=0.2)
    smooth = targets * 0.8 + 0.1
    assert loss == pytest.approx(float(nn.BCEWithLogitsLoss()(outputs, smooth)))
    assert accuracy == pytest.approx(float(((outputs > 0) == targets.bool()).float().mean()))


def test_an_output_a_class_is_refused_for_labels_that_are_one_number():
    rows = data_of(drawn(6, 2), torch.tensor([0.0, 1, 0, 1, 0, 1]), 2).train
    with pytest.raises(ObjectiveError, match=r"need an output for each, of shape \[6\], got \[6, 2\]: let the model"):
        loss_of_classes(rows, {})(drawn(6, 2), rows.targets)


def test_without_names_of_classes_the_loss_is_cross_entropy_and_there_is_no_metric():
    rows = Split(drawn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1]))
    assert isinstance(loss_of_classes(rows, {}), nn.CrossEntropyLoss)
    with pytest.raises(DataError, match="the default metric needs the names of the classes, got none"):
        accuracies_of_classes(Data(rows, rows, rows))
