"""Numbers of classes in other types than int64, in which tables and images have them."""

import torch
from torch import nn

from tuner.data import split_rows
from tuner.objective import Objective


class Int16(Objective):
    """Tell which of three numbers is the largest."""

    epochs = 5

    def suggest(self, trial):
        trial.suggest_float("lr", 0.1, 0.3)

    def load_data(self, root):
        rows = torch.randn(300, 3, generator=torch.Generator().manual_seed(2))
        return split_rows(rows, rows.argmax(1).to(torch.int16), class_names=("first", "second", "third"))

    def build_model(self, params):
        return nn.Linear(3, 3)
