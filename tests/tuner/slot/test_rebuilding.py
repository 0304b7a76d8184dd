"""Params of a trial that the objective as it is now would not run as they were."""

from __future__ import annotations

import pytest
from attempts import Signs
from torch import nn

from tuner.errors import TunerError
from tuner.slot.rebuilding import check_params


class More(Signs):
    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)
        trial.suggest_int("width", 1, 4)

    def build_model(self, params):
        if params["width"] == 3:
            raise ValueError("three is not built any more")
        return nn.Linear(2, params["width"])


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"lr": 0.05}, "suggest suggests width, which it has not"),
        ({"lr": 0.05, "width": 2, "depth": 1}, "suggest does not suggest its depth"),
        ({"lr": 0.5, "width": 2}, "lr: 0.01 to 0.1; got 0.5"),
        ({"lr": 0.05, "width": 3}, "build_model failed: ValueError: three is not built any more"),
    ],
)
def test_it_is_said_why_params_cannot_be_run_again(params, why):
    with pytest.raises(TunerError) as caught:
        check_params(More(), params, "trial 3 of study 's'")
    message = str(caught.value)
    assert message.startswith("trial 3 of study 's' cannot be run again by the code of More that is here: ")
    assert why in message
    assert message.endswith("; the code that it ran with can")


def test_params_that_are_suggested_and_built_are_as_well_as_they_were():
    check_params(More(), {"lr": 0.05, "width": 2}, "trial 3")
