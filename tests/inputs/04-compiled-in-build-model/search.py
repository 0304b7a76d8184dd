"""A model that its objective compiles, as scripts do that know nothing of --compile."""

import torch
from torch import nn

from tuner.data import split_rows
from tuner.objective import Objective


class Compiled(Objective):
    epochs = 2

    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)

    def load_data(self, root):
        points = torch.rand(150, 6, generator=torch.Generator().manual_seed(1))
        return split_rows(points, (points[:, 0] > points[:, 1]).long(), class_names=("below", "above"), seed=self.seed)

    def build_model(self, params):
        inner = torch.compile(nn.Linear(6, 6), backend="eager")
        return torch.compile(nn.Sequential(inner, nn.Tanh(), nn.Linear(6, 2)), backend="eager")
