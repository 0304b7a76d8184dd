"""Writes into its directory, as one does that downloads, and goes elsewhere while it is imported and ever after."""

import os
import tempfile

import torch
from torch import nn

from tuner.data import split_rows
from tuner.objective import Objective

os.chdir(tempfile.gettempdir())


class Signs(Objective):
    epochs = 1

    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)

    def load_data(self, root):
        (root / "mirror.txt").write_text("nowhere")
        os.chdir("/")
        numbers = torch.linspace(-1, 1, 40)[:, None]
        return split_rows(numbers, (numbers[:, 0] > 0).long(), class_names=("below", "above"), seed=self.seed)

    def build_model(self, params):
        return nn.Linear(1, 2)
