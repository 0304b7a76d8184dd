"""Regression on the California housing data: 20,640 districts of the census of 1990, eight numbers each.

Pace and Barry 1997, "Sparse Spatial Autoregressions"; scikit-learn downloads it. Shows an own loss and metric, gradient
clipping, training on all rows at once by L-BFGS (`--set batch=full`), and - in `WideAndDeep` - two inputs by name and a
second output whose share of the loss is searched.
Targets are medians of house values in units of $100,000, 0.15 to 5: near enough to 1 to be learned as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from sklearn.datasets import fetch_california_housing
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from objectives.layers import hidden_layers, suggest_hidden_layers
from objectives.tabular import Standardize, Tabular, fetch
from tuner.data import Data, Inputs, Rows, split_rows
from tuner.objective import Loss, Params

if TYPE_CHECKING:
    import optuna
    from torchmetrics import Metric


ALL_ROWS = 2**31
"""A batch of more rows than there are is all of them."""


class CaliforniaHousing(Tabular):
    """Predict the value of houses by an MLP, or linearly; the RMSE on the validation split is minimized."""

    metric = "rmse"
    direction = "minimize"
    epochs = 30
    data_license = "none is stated: published by StatLib, from the US census of 1990"
    min_layers: ClassVar[int] = 0  # linear regression

    max_layers: int = Field(default=3, ge=0)
    batch: Literal["searched", "full"] = "searched"
    """`full`: each step is one of L-BFGS on all rows, of the mean squared error: a linear model's is least squares."""

    def suggest(self, trial: optuna.Trial) -> None:
        is_full = self.batch == "full"  # L-BFGS compares losses, which dropout would make random
        layers = (self.min_layers, self.max_layers)
        suggest_hidden_layers(trial, layers=layers, units=(16, 256), dropout=not is_full)
        if is_full:
            return
        trial.suggest_categorical("loss", ["mse", "huber"])
        trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True)
        trial.suggest_float("max_grad_norm", 0.1, 10.0, log=True)
        trial.suggest_categorical("batch_size", [32, 64, 128, 256])

    def load_data(self, root: Path) -> Data:
        features, targets = fetch("California housing", fetch_california_housing, root)
        return split_rows(self.inputs(features), targets.float(), seed=self.seed)

    def inputs(self, features: Tensor) -> Inputs:
        """Return what the model is called with, of the features (n, 8)."""
        return features

    def build_model(self, params: Params) -> nn.Module:
        layers, width = hidden_layers(8, params)
        return nn.Sequential(Standardize(8), *layers, nn.Linear(width, 1), nn.Flatten(0))  # (n,), as the targets

    def build_loss(self, params: Params, train: Rows) -> Loss:  # noqa: ARG002
        return nn.HuberLoss() if params.get("loss") == "huber" else nn.MSELoss()

    def build_optimizer(self, model: nn.Module, params: Params) -> Optimizer:
        if self.batch == "full":
            return LBFGS(model.parameters(), line_search_fn="strong_wolfe")
        return super().build_optimizer(model, params)

    def build_scheduler(self, optimizer: Optimizer, params: Params, epochs: int) -> LRScheduler | None:
        return None if self.batch == "full" else super().build_scheduler(optimizer, params, epochs)

    def batch_size(self, params: Params) -> int:
        return ALL_ROWS if self.batch == "full" else super().batch_size(params)

    def build_metrics(self, data: Data) -> dict[str, Metric]:  # noqa: ARG002
        from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

        return {"rmse": MeanSquaredError(squared=False), "mae": MeanAbsoluteError()}


class WideAndDeep(CaliforniaHousing):
    """Predict the value of houses by a linear model and an MLP, trained jointly; the RMSE is minimized.

    The wide part gets the features 0 to 4, the deep part the features 2 to 7.
    """

    min_layers: ClassVar[int] = 1

    max_layers: int = Field(default=3, ge=1)

    def suggest(self, trial: optuna.Trial) -> None:
        super().suggest(trial)
        trial.suggest_float("auxiliary_share", 0.0, 0.5)

    def inputs(self, features: Tensor) -> Inputs:
        return {"wide": features[:, :5], "deep": features[:, 2:]}

    def build_model(self, params: Params) -> nn.Module:
        return WideAndDeepModel(params)

    def build_loss(self, params: Params, train: Rows) -> Loss:
        of_one, share = super().build_loss(params, train), params["auxiliary_share"]

        def weighted(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
            main, auxiliary = (of_one(output, targets) for output in outputs)
            return torch.lerp(main, auxiliary, share)

        return weighted

    def prediction(self, outputs: Any) -> Tensor:
        main: Tensor = outputs[0]
        return main


class WideAndDeepModel(nn.Module):
    """The sum of a linear model of `wide` and an MLP of `deep` (Cheng et al. 2016, https://arxiv.org/abs/1606.07792).

    Returns that sum and, as the auxiliary output, a prediction of the deep part by itself.
    """

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.wide = Standardize(5)
        self.deep = Standardize(6)
        self.layers, width = hidden_layers(6, params)
        self.output = nn.Linear(5 + width, 1)
        self.auxiliary = nn.Linear(width, 1)

    def forward(self, wide: Tensor, deep: Tensor) -> tuple[Tensor, Tensor]:
        """Return (main, auxiliary), both (n,), for `wide` (n, 5) and `deep` (n, 6)."""
        hidden = self.layers(self.deep(deep))
        main: Tensor = self.output(torch.cat([self.wide(wide), hidden], dim=1))
        auxiliary: Tensor = self.auxiliary(hidden)
        return main.squeeze(1), auxiliary.squeeze(1)
