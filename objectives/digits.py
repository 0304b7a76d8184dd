"""An MLP on scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, ten classes.

The example to copy: search space, data, model. Everything else is the default of `Objective`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import PositiveInt
from sklearn.datasets import load_digits
from torch import nn

from tuner.data import Data, split_rows
from tuner.objective import Objective, Params

if TYPE_CHECKING:
    import optuna


class Digits(Objective):
    """Classify a digit from its 64 pixels; the accuracy on the validation split is maximized."""

    data_license = "CC-BY-4.0"  # UCI

    max_layers: PositiveInt = 2
    max_units: PositiveInt = 512

    def suggest(self, trial: optuna.Trial) -> None:
        for layer in range(trial.suggest_int("layers", 1, self.max_layers)):
            trial.suggest_int(f"units_{layer}", min(64, self.max_units), self.max_units, log=True)
        trial.suggest_float("dropout", 0.0, 0.5)
        trial.suggest_float("lr", 3e-4, 3e-2, log=True)
        trial.suggest_categorical("batch_size", [32, 64, 128])

    def load_data(self, root: Path) -> Data:  # noqa: ARG002 - scikit-learn carries these images itself
        digits = load_digits()
        return split_rows(
            torch.tensor(digits.data, dtype=torch.float32),
            torch.tensor(digits.target),
            class_names=tuple(str(name) for name in digits.target_names),
            seed=self.seed,
        )

    def build_model(self, params: Params) -> nn.Module:
        layers: list[nn.Module] = [nn.BatchNorm1d(64)]  # takes pixels as they are, 0 to 16
        width = 64
        for layer in range(params["layers"]):
            units = params[f"units_{layer}"]
            layers += [nn.Linear(width, units), nn.ReLU(), nn.Dropout(params["dropout"])]
            width = units
        return nn.Sequential(*layers, nn.Linear(width, 10))
