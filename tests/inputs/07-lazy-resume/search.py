"""Layers that learn their widths from the first batch, in a trial that is given back and taken up again."""

import threading

import torch
from torch import nn

from tuner.data import split_rows
from tuner.objective import Objective


def _takes_as_long_as_a_larger_one(*_):
    threading.Event().wait(0.2)


class Lazy(Objective):
    """Tell by six numbers whether the first is positive."""

    epochs = 12

    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)

    def load_data(self, root):
        rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
        return split_rows(rows, (rows[:, 0] > 0).long(), class_names=("below", "above"))

    def build_model(self, params):
        model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(2))
        model.register_forward_pre_hook(_takes_as_long_as_a_larger_one)
        return model

    def build_optimizer(self, model, params):
        matrices = [weight for weight in model.parameters() if weight.dim() > 1]
        others = [weight for weight in model.parameters() if weight.dim() == 1]
        return torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=params["lr"])
