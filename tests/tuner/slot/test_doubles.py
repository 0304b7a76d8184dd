"""Inputs in double precision, before the first trial."""

import dataclasses

import pytest
import torch
from attempts import Signs, attempt
from optuna.trial import TrialState
from torch import nn

from tuner.data import Samples, map_inputs
from tuner.errors import TunerError


class InDouble(Signs):
    """Signs whose inputs are doubles, and a model that does with them what `how` says."""

    how: str = "nothing"
    samples: bool = False

    def load_data(self, root):
        data = super().load_data(root)
        splits = {
            name: dataclasses.replace(rows, inputs=map_inputs(torch.Tensor.double, rows.inputs))
            for name, rows in data.splits()
        }
        if self.samples:
            splits = {name: Samples(list(rows)) for name, rows in splits.items()}
        return dataclasses.replace(data, **splits)

    def build_model(self, params):
        model = Model(self.how)
        return model.double() if self.how == "doubles" else model


class Model(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
        self.how = how

    def forward(self, x):
        if self.how == "fails":
            raise ValueError("of its own")
        return self.layers(x.float() if self.how == "converts" else x)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("samples", [False, True])
def test_inputs_that_the_model_does_not_take_are_refused_before_the_first_trial(study, samples):
    with pytest.raises(TunerError) as caught:
        attempt(study, InDouble(samples=samples))
    assert str(caught.value) == (
        "InDouble: inputs need the type that the model computes in, got float64: use .float() in load_data, or in the"
        " model's forward"
    )
    assert study.trials == []


@pytest.mark.parametrize("how", ["converts", "doubles"])
def test_a_model_that_takes_them_is_trained_with_them(study, how):
    assert attempt(study, InDouble(how=how))[0].state == TrialState.COMPLETE


def test_what_else_is_wrong_the_trial_tells(study):
    outcome, _ = attempt(study, InDouble(how="fails"))
    assert "ValueError: of its own" in outcome.message
