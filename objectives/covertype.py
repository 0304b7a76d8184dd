"""An MLP with batch norm on Covertype: which trees cover 30 x 30 m of forest, 581,012 rows, seven classes.

Blackard and Dean 1999, https://archive.ics.uci.edu/dataset/31/covertype; scikit-learn downloads it. Shows two inputs in
order, and classes of unequal size whose weight in the loss is searched.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sklearn.datasets import fetch_covtype
from torch import Tensor, nn

from objectives.layers import hidden_layers, suggest_hidden_layers
from objectives.tabular import Standardize, Tabular, fetch
from tuner.data import Data, Rows, class_weights, split_rows
from tuner.objective import Loss, Params

if TYPE_CHECKING:
    import optuna
    from torchmetrics import Metric

COVERS = (
    "Spruce/Fir",
    "Lodgepole Pine",
    "Ponderosa Pine",
    "Cottonwood/Willow",
    "Aspen",
    "Douglas-fir",
    "Krummholz",
)


class Covertype(Tabular):
    """Classify which trees cover a patch of forest; the accuracy on the validation split is maximized."""

    data_license = "CC-BY-4.0"  # UCI

    def suggest(self, trial: optuna.Trial) -> None:
        suggest_hidden_layers(trial, layers=(1, 3), units=(32, 512))
        trial.suggest_float("class_balance", 0.0, 1.0)
        trial.suggest_float("lr", 1e-4, 3e-2, log=True)
        trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True)
        trial.suggest_categorical("batch_size", [128, 256, 512, 1024])

    def load_data(self, root: Path) -> Data:
        features, covers = fetch("Covertype", fetch_covtype, root)
        # Ten quantities, then 44 features that are 0 or 1, for which a byte will do.
        inputs = (features[:, :10], features[:, 10:].to(torch.uint8))
        return split_rows(inputs, covers.long() - 1, class_names=COVERS, seed=self.seed)

    def build_model(self, params: Params) -> nn.Module:
        return Model(params)

    def build_loss(self, params: Params, train: Rows) -> Loss:
        """Weigh classes between all the same (balance 0) and inversely to their share of the rows (balance 1)."""
        return nn.CrossEntropyLoss(class_weights(train, len(COVERS)) ** params["class_balance"])

    def build_metrics(self, data: Data) -> dict[str, Metric]:
        from torchmetrics.classification import MulticlassF1Score

        return {**super().build_metrics(data), "macro_f1": MulticlassF1Score(num_classes=len(COVERS), average="macro")}


class Model(nn.Module):
    """An MLP of the quantities, standardised, and of what is 0 or 1."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.standardize = Standardize(10)
        self.layers, width = hidden_layers(54, params, batch_norm=True)
        self.output = nn.Linear(width, len(COVERS))

    def forward(self, quantities: Tensor, flags: Tensor) -> Tensor:
        """Return the logits (n, 7) for `quantities` (n, 10) and `flags` (n, 44)."""
        features = torch.cat([self.standardize(quantities), flags.to(quantities.dtype)], dim=1)
        logits: Tensor = self.output(self.layers(features))
        return logits
