"""What the tests of tuner share."""

import optuna
import pytest


@pytest.fixture
def study():
    return optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner())
