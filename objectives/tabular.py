"""What objectives on tables share: scikit-learn's data sets, and features standardised by the rows trained on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.data import Rows, downloading, tensors
from tuner.objective import Objective
from tuner.training import Epoch


def fetch(name: str, fetcher: Callable[..., Any], root: Path) -> tuple[Tensor, Tensor]:
    """Return features (n, d) and targets (n,) of one of scikit-learn's data sets, kept in root/scikit_learn.

    Raises DataError if it is neither there nor to be downloaded.
    """
    home = root / "scikit_learn"
    with downloading(name, home, pickled=True), warnings.catch_warnings(action="ignore"):  # that it tries a second time
        features, targets = fetcher(data_home=home, return_X_y=True, n_retries=1)
    return torch.tensor(features, dtype=torch.float32), torch.tensor(targets)


class Standardize(nn.Module):
    """Subtract each feature's mean and divide by its standard deviation, those of the rows that it learned from.

    It is a layer of the model, so that the exported model takes features as they are. A feature that never
    changes is only centred.
    """

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(n_features))
        self.std = nn.Buffer(torch.ones(n_features))

    def learn(self, features: Tensor) -> None:
        """Take over mean and standard deviation of `features`, (n, n_features)."""
        std, mean = torch.std_mean(features, dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        """Return the standardised features."""
        return (features - self.mean) / self.std


class Tabular(Objective):
    """An objective whose models have a `Standardize` for each input, in the order of the inputs.

    Inputs that come after those stay as they are.
    """

    def fit(self, model: nn.Module, train: Rows, *args: Any, **kwargs: Any) -> list[Epoch]:
        """Standardise by the rows that are trained on, and by no others, then train."""
        layers = [module for module in model.modules() if isinstance(module, Standardize)]
        for layer, features in zip(layers, tensors(train.rows(slice(None)).inputs), strict=False):
            layer.learn(features)
        return super().fit(model, train, *args, **kwargs)
