"""The objective of `search_speed.py`: the data, the model and the space of `search_plain.py`, for `tuner run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.utils.data import random_split
from torchvision import datasets
from torchvision.transforms import v2

from tuner.data import Data, Split
from tuner.objective import Objective, Params, fastest

if TYPE_CHECKING:
    import optuna
    from torch.optim.lr_scheduler import LRScheduler


class FashionMLP(Objective):
    """Classify a piece of clothing by an MLP with one hidden layer, trained by SGD at a constant rate."""

    def suggest(self, trial: optuna.Trial) -> None:
        trial.suggest_float("lr", 1e-3, 0.3, log=True)
        trial.suggest_int("width", 32, 512, log=True)

    def load_data(self, root: Path) -> Data:
        images, test = (datasets.FashionMNIST(root, train=is_train) for is_train in (True, False))
        rows = Split(images.data, images.targets)
        parts = random_split(range(len(rows)), [0.8, 0.2], generator=torch.Generator().manual_seed(0))
        train, valid = (rows.rows(torch.tensor(part.indices)) for part in parts)
        return Data(train, valid, Split(test.data, test.targets), tuple(images.classes))

    def build_model(self, params: Params) -> nn.Module:
        pixels, width = v2.ToDtype(torch.float32, scale=True), params["width"]
        return nn.Sequential(pixels, nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))

    def build_optimizer(self, model: nn.Module, params: Params) -> Optimizer:
        return fastest(SGD, model.parameters(), lr=params["lr"])

    def build_scheduler(self, optimizer: Optimizer, params: Params, epochs: int) -> LRScheduler | None:  # noqa: ARG002
        return None

    def batch_size(self, params: Params) -> int:  # noqa: ARG002
        return 32
