"""Metrics that the test split does not define: nothing of the class that they ask for is in it."""

import torch
from torch import nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from tuner.data import Data, Split
from tuner.objective import Objective


class Share(Metric):
    """How many of the rows of the last class are found, or one divided by that."""

    def __init__(self, inverse):
        super().__init__()
        self.inverse = inverse
        self.add_state("found", torch.zeros(2))

    def update(self, outputs, targets):
        rows = targets == 1
        self.found += torch.tensor([(outputs.argmax(1)[rows] == 1).sum(), rows.sum()])

    def compute(self):
        hits, rows = self.found
        return (rows + 1) / rows if self.inverse else hits / rows


class Rare(Objective):
    epochs = 2

    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)

    def load_data(self, root):
        points = torch.rand(120, 4, generator=torch.Generator().manual_seed(2))
        classes = (points[:, 0] > 0.5).long()
        classes[90:] = 0
        parts = (slice(0, 60), slice(60, 90), slice(90, 120))
        return Data(*(Split(points[part], classes[part]) for part in parts), class_names=("often", "never here"))

    def build_model(self, params):
        return nn.Linear(4, 2)

    def build_metrics(self, data):
        accuracy = MulticlassAccuracy(num_classes=2, average="micro")
        return {"accuracy": accuracy, "share": Share(inverse=False), "inverse": Share(inverse=True)}
