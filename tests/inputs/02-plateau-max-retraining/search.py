"""A rate that falls when the accuracy stops growing, by torch's schedule or by one that is written by hand."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tuner.data import split_rows
from tuner.objective import Objective


class ByHand(LRScheduler):
    """Takes a tenth off the rate after each epoch that did not get better."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.best = 0.0

    def step(self, accuracy):
        if accuracy <= self.best:
            self.optimizer.param_groups[0]["lr"] *= 0.9
        self.best = max(self.best, accuracy)


class Plateau(Objective):
    epochs = 6
    by_hand: bool = False

    def suggest(self, trial):
        trial.suggest_float("lr", 0.3, 0.31)

    def load_data(self, root):
        points = torch.randn(500, 6, generator=torch.Generator().manual_seed(4))
        return split_rows(points, points[:, :4].argmax(1), class_names=tuple("abcd"), seed=self.seed)

    def build_model(self, params):
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))

    def build_optimizer(self, model, params):
        return torch.optim.SGD(model.parameters(), lr=params["lr"])

    def build_scheduler(self, optimizer, params, epochs):
        if self.by_hand:
            return ByHand(optimizer)
        return ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.1)
