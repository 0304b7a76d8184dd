"""Objectives of which a method returns what cannot be used: the trial fails with the method, what it needs and gave."""

import math

import pytest
import torch
from attempts import Constant, Signs, attempt
from optuna.trial import TrialState
from torch import nn
from torchmetrics import ClasswiseWrapper
from torchmetrics.classification import MulticlassAccuracy

from tuner.training import Epoch, evaluate
from tuner.training.record import OWN_NAMES

NO_NUMBER = "the loss needs to return a tensor that is one number, got "
NO_GRADIENT = "the loss needs to follow from weights that are trained, got one without a gradient"
OF_EACH = MulticlassAccuracy(2, average=None)


def loss(function):
    return lambda *_: lambda outputs, targets: function(nn.functional.cross_entropy(outputs, targets))


@pytest.mark.parametrize(
    ("method", "returns", "told"),
    [
        ("build_model", lambda *_: None, "build_model needs to return a torch.nn.Module, got NoneType"),
        ("build_model", lambda *_: nn.Linear(2, 2).requires_grad_(False), NO_GRADIENT),
        ("build_optimizer", lambda *_: None, "build_optimizer needs to return an Optimizer, got NoneType"),
        ("build_scheduler", lambda *_: "cosine", "build_scheduler needs to return an LRScheduler, got str"),
        ("build_loss", lambda *_: None, "build_loss needs to return a function or module, got NoneType"),
        ("build_loss", loss(lambda _: None), NO_NUMBER + "NoneType"),
        ("build_loss", loss(lambda found: found.item()), NO_NUMBER + "float"),
        ("build_loss", loss(lambda found: found.repeat(3)), NO_NUMBER + "a tensor of shape [3]"),
        ("build_loss", loss(lambda found: found[None]), NO_NUMBER + "a tensor of shape [1]"),
        ("build_loss", loss(lambda found: found.detach()), NO_GRADIENT),
        ("batch_size", lambda *_: 0, "batch_size needs a whole number above 0, got 0"),
        ("batch_size", lambda *_: True, "batch_size needs a whole number above 0, got True"),
        ("batch_size", lambda *_: 2.5, "batch_size needs a whole number above 0, got 2.5"),
        ("max_grad_norm", lambda *_: -1.0, "max_grad_norm needs a number above 0, or None for no clipping, got -1.0"),
        ("max_grad_norm", lambda *_: math.nan, "max_grad_norm needs a number above 0"),
        ("prediction", lambda *_: None, "a prediction needs to be one tensor, got NoneType"),
        ("build_metrics", lambda *_: None, "build_metrics needs to return torchmetrics objects by name, got NoneType"),
        ("build_metrics", lambda *_: [OF_EACH], "build_metrics needs to return torchmetrics objects by name, got list"),
        ("build_metrics", lambda *_: {"accuracy": max}, "build_metrics needs to return torchmetrics objects by name"),
        ("build_metrics", lambda *_: {"acuracy": OF_EACH}, "build_metrics needs to return 'accuracy', the study's"),
        ("build_metrics", lambda *_: {"accuracy": OF_EACH}, "the metric 'accuracy' needs to compute one number, or"),
        (
            "build_metrics",
            lambda *_: {"accuracy": ClasswiseWrapper(OF_EACH, labels=["a", "b"], prefix="of ")},
            "the metrics of an epoch need 'accuracy', the study's metric, got: of a, of b",
        ),
        ("fit", lambda *_, **__: None, "fit needs to return the epochs that ended, got none"),
        ("fit", lambda *_, **__: [0.5], "fit needs to give tuner.training.Epoch objects, got float"),
        (
            "fit",
            lambda *_, **__: [Epoch(number=1, train_loss=0.0, metrics={"acc": 1.0})],
            "the metrics of an epoch need 'accuracy', the study's metric, got: acc",
        ),
    ],
)
@pytest.mark.parametrize("training", [{}, {"precision": "bf16"}])
def test_what_cannot_be_used_is_told_in_one_line(study, method, returns, told, training):
    objective = type("Odd", (Signs,), {method: returns, "__module__": __name__})
    outcome, trial = attempt(study, objective(), **training)
    assert (trial.state, outcome.failure) == (TrialState.FAIL, "user_error")
    assert outcome.message.startswith(f"Odd: {told}")
    assert "\n" not in outcome.message
    assert trial.intermediate_values == {}


def test_an_attribute_that_is_set_is_told_by_its_name_and_line(study):
    class Keeps(Signs):
        def build_model(self, params):
            self.width = torch.eye(2)
            return nn.Linear(2, 2)

    message = attempt(study, Keeps())[0].message
    assert message.startswith("ValidationError: width: instance is frozen, got tensor(")
    assert f"{__file__}, line " in message
    assert "\n" not in message


class WithItsOwnLoop(Signs):
    """Gives tensors where numbers are wanted, or no loss."""

    def fit(self, model, train, valid, params, *, metrics, epochs, seed, on_epoch=None, run=None):
        found = {name: torch.tensor(value) for name, value in evaluate(model, valid, metrics).items()}
        losses = [torch.tensor(0.5), math.nan, torch.tensor(math.nan)]
        history = [Epoch(number=n, train_loss=its, metrics=found) for n, its in enumerate(losses, 1)]
        for epoch in history:
            on_epoch(epoch)
        return history[seed % 2 :]

    def build_metrics(self, data):
        return {**super().build_metrics(data), "recall": Constant(0.25)}


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_what_an_own_loop_gives_is_recorded_as_numbers(study):
    found = [attempt(study, WithItsOwnLoop())[0] for _ in range(4)]
    assert {outcome.state for outcome in found} == {TrialState.COMPLETE}
    assert {outcome.attrs["recall"] for outcome in found} == {0.25}
    assert {type(outcome.attrs["recall"]) for outcome in found} == {float}
    losses = [outcome.attrs.get("train_loss") for outcome in found]
    assert set(losses) == {0.5, None}  # there is no NaN in JSON
    assert {type(its) for its in losses} == {float, type(None)}


class Wrapped(Constant):
    """Gives its value under a name that it tells when it computes."""

    def __init__(self, name):
        super().__init__(0.25)
        self.name = name

    def compute(self):
        return {self.name: super().compute()}


def test_a_metric_cannot_have_the_name_of_what_is_recorded_anyway(study):
    recorded = attempt(study, Signs())[0].attrs.keys()
    assert recorded <= OWN_NAMES
    for name in ("train_loss", "seconds", "lr"):
        for given in ({name: Constant(0.25)}, {"parts": Wrapped(name)}):

            class Named(Signs):
                def build_metrics(self, data, given=given):
                    return {**super().build_metrics(data), **given}

            outcome, _ = attempt(study, Named())
            assert outcome.message.startswith(f"Named: a metric cannot be named {name!r}, which is recorded")


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_a_metric_may_be_called_failure(study):
    class Parts(Signs):
        def build_metrics(self, data):
            return {**super().build_metrics(data), "failure": Constant(0.25)}

    outcome, trial = attempt(study, Parts())
    assert (trial.state, outcome.failure, outcome.attrs["failure"]) == (TrialState.COMPLETE, None, 0.25)
