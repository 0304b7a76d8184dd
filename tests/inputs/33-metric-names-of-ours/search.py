"""Metrics that have the names of what is recorded of each trial."""

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

from tuner.data import split_rows
from tuner.objective import Objective


class Renamed(Objective):
    """Tell by three numbers whether the first is positive."""

    epochs = 1

    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)

    def load_data(self, root):
        rows = torch.randn(90, 3, generator=torch.Generator().manual_seed(3))
        return split_rows(rows, (rows[:, 0] > 0).long(), class_names=("no", "yes"))

    def build_model(self, params):
        return nn.Linear(3, 2)

    def build_metrics(self, data):
        return {"accuracy": MulticlassAccuracy(2), "seconds": MulticlassRecall(2)}


class Searched(Renamed):
    """Searches for one of them."""

    metric = "epochs"
