"""Params that have to be of the right type to be used at all."""

import torch
from torch import nn

from tuner.data import split_rows
from tuner.objective import Objective


class Typed(Objective):
    """Tell by four numbers whether their sum is positive."""

    epochs = 1

    def suggest(self, trial):
        trial.suggest_int("width", 4, 32)
        trial.suggest_float("drop", 0.0, 0.5)
        trial.suggest_categorical("release", ["2023", "2024"])

    def load_data(self, root):
        rows = torch.randn(90, 4, generator=torch.Generator().manual_seed(2))
        return split_rows(rows, (rows.sum(1) > 0).long(), class_names=("no", "yes"))

    def build_model(self, params):
        assert params["release"].startswith("20")
        hidden = nn.Linear(4, params["width"])
        return nn.Sequential(hidden, nn.Dropout(params["drop"]), nn.Linear(params["width"], 2))
