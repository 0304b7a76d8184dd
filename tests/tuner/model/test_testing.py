"""What is told of the test split: against figures that are known, and other ways to the same ones."""

import base64
import io

import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from tuner.data import Data, Split
from tuner.model.testing import QUANTILES, _bootstrap, details_of_test


def _data(inputs, targets, **names):
    return Data(*(Split(inputs + number, targets) for number in range(3)), **names)


def test_a_classifier_is_told_by_class_and_by_its_confidence():
    wanted = torch.tensor([0, 0, 0, 1, 1, 2])
    given = torch.tensor([0, 0, 1, 1, 1, 0])
    shares = torch.full((6, 3), 0.1).scatter(1, given[:, None], 0.8)
    data = _data(shares.log(), wanted, class_names=("a", "b", "c"))
    test = Split(shares.log(), wanted)
    details = details_of_test(
        nn.Identity(), test, data, {"accuracy": MulticlassAccuracy(3, average="micro")}, data.class_names, 0
    )
    its = details.classes[""]
    assert its.confusion == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert its.calibration_error == pytest.approx(abs(4 / 6 - 0.8))
    assert (its.by_class["a"].recall, its.by_class["a"].precision) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (its.by_class["c"].recall, its.by_class["c"].precision, its.by_class["c"].f1) == (0, None, 0)
    assert details.residuals == {}
    assert [(its.row, its.wanted, its.given) for its in details.wrong[""]] == [(2, "a", "b"), (5, "c", "a")]
    assert [(its.row, its.given) for its in details.right[""]] == [(0, "a"), (1, "a"), (3, "b"), (4, "b")]
    surest = details.wrong[""][0]
    assert (surest.confidence, surest.image) == (pytest.approx(0.8), None)
    assert surest.values == pytest.approx(shares.log()[2].tolist())


def test_rows_that_are_images_are_drawn_as_they_are():
    pixels = torch.zeros(20, 1, 9, 12, dtype=torch.uint8)
    pixels[3, 0, 4, 7] = 255
    pixels[0] = 255
    outputs = torch.nn.functional.one_hot(torch.arange(20) % 2).float() * 9

    class Constant(nn.Module):
        def forward(self, rows):
            return outputs[: len(rows)]

    targets = torch.zeros(20, dtype=torch.long)
    data = Data(*(Split(pixels, targets) for _ in range(3)), class_names=("0", "1"))
    metrics = {"accuracy": MulticlassAccuracy(2, average="micro")}
    details = details_of_test(Constant(), Split(pixels, targets), data, metrics, data.class_names, 0)
    assert [its.row for its in details.wrong[""]] == [1, 3, 5, 7, 9, 11, 13, 15]
    drawn = Image.open(io.BytesIO(base64.b64decode(details.wrong[""][1].image)))
    hidden = details_of_test(Constant(), Split(pixels, targets), data, metrics, data.class_names, 0, show_rows=False)
    assert (hidden.wrong, hidden.right, hidden.classes) == ({"": []}, {"": []}, details.classes)
    assert (drawn.size, drawn.mode, drawn.getpixel((7, 4)), drawn.getextrema()) == ((12, 9), "L", 255, (0, 255))


def test_a_regression_is_told_by_its_residuals():
    inputs, errors = torch.randn(1001, 1), torch.linspace(-1, 1, 1001)[:, None]
    details = details_of_test(
        nn.Identity(), Split(inputs + errors, inputs), _data(inputs, inputs), {"mse": MeanSquaredError()}, (), 0
    )
    assert details.residuals[""] == [pytest.approx([2 * share - 1 for share in QUANTILES], abs=1e-4)]
    assert details.classes == {}
    assert {its.row for its in details.wrong[""]} == {*range(4), *range(997, 1001)}
    assert all(its.given - its.wanted == pytest.approx(float(errors[its.row]), abs=1e-6) for its in details.right[""])
    assert len({its.row for its in (*details.wrong[""], *details.right[""])}) == 16


@pytest.mark.parametrize(
    "metric", [MeanSquaredError(), MeanSquaredError(squared=False), MeanAbsoluteError()], ids=["mse", "rmse", "mae"]
)
def test_a_mean_over_rows_has_the_interval_that_its_metric_gives(metric):
    class Unknown(type(metric)):
        """Is asked for each resample."""

    other = Unknown(squared=metric.squared) if hasattr(metric, "squared") else Unknown()
    targets = torch.randn(200, generator=torch.Generator().manual_seed(1))
    predicted = targets + torch.randn(200, generator=torch.Generator().manual_seed(2))
    counts, found = _bootstrap({"fast": metric, "slow": other}, predicted, targets, 200, seed=3)
    assert counts == {"fast": 1000, "slow": 1000}
    assert found["fast"] == pytest.approx(found["slow"], abs=0.03)
    # Of 95 % of samples of this size the interval holds what they come of; its width is that of the normal one.
    error = (predicted - targets).square().std() / 200**0.5 if "Squared" in type(metric).__name__ else None
    if error is not None and metric.squared:
        assert found["fast"][1] - found["fast"][0] == pytest.approx(2 * 1.96 * float(error), rel=0.15)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_interval_and_what_is_no_number_has_none():
    targets, predicted = torch.randn(50), torch.randn(50)
    first = _bootstrap({"r2": R2Score()}, predicted, targets, 50, seed=3)
    assert first == _bootstrap({"r2": R2Score()}, predicted, targets, 50, seed=3)
    assert first != _bootstrap({"r2": R2Score()}, predicted, targets, 50, seed=4)
    nothing = torch.full((50,), float("nan"))
    assert _bootstrap({"mse": MeanSquaredError()}, nothing, targets, 50, seed=3)[1] == {"mse": None}
