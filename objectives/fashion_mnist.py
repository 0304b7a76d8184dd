"""An MLP or a small CNN on Fashion-MNIST: 70,000 grey images of 28 x 28 pixels, ten kinds of clothing.

Xiao, Rasul and Vollgraf 2017, https://arxiv.org/abs/1708.07747; torchvision downloads it. Shows a conditional space,
images that stay in uint8 up to the model's first layer, own optimizers, schedules and metrics.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchvision import datasets

from objectives.layers import Pixels, hidden_layers, suggest_hidden_layers
from tuner.data import Data, Split, downloading, split_in_two
from tuner.objective import Objective, Params, fastest

if TYPE_CHECKING:
    import optuna
    from torchmetrics import Metric

OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "momentum": SGD, "adam": Adam, "adamw": AdamW}


class FashionMNIST(Objective):
    """Classify a piece of clothing from its image; the accuracy on the validation split is maximized."""

    data_license = "MIT"
    epochs = 15

    models: Literal["all", "mlp"] = "all"
    """`mlp`: the two params of a textbook's search, for two hidden layers of one width that SGD trains."""

    def suggest(self, trial: optuna.Trial) -> None:
        if self.models == "mlp":  # Géron, Hands-On Machine Learning with Scikit-Learn and PyTorch, chapter 10
            trial.suggest_float("lr", 1e-5, 1e-1, log=True)
            trial.suggest_int("units", 20, 300)
            return
        if trial.suggest_categorical("model", ["mlp", "cnn"]) == "mlp":
            suggest_hidden_layers(trial, layers=(1, 3), units=(20, 512))
        else:
            trial.suggest_int("channels", 8, 32, log=True)
            trial.suggest_float("dropout", 0.0, 0.5)
        if trial.suggest_categorical("optimizer", list(OPTIMIZERS)) == "momentum":
            trial.suggest_float("momentum", 0.5, 0.99)
        trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        trial.suggest_categorical("schedule", ["constant", "cosine"])
        trial.suggest_float("weight_decay", 1e-6, 1e-2, log=True)
        trial.suggest_float("label_smoothing", 0.0, 0.2)
        trial.suggest_categorical("batch_size", [32, 64, 128, 256])

    def load_data(self, root: Path) -> Data:
        with downloading("Fashion-MNIST's training part", root):
            train = datasets.FashionMNIST(root, train=True, download=True)
        with downloading("Fashion-MNIST's test part", root):
            test = datasets.FashionMNIST(root, train=False, download=True)
        images = Split(train.data.unsqueeze(1), train.targets)
        # A twelfth of the 60,000 are 5,000: as many as half of the test images.
        rows, valid = split_in_two(images, 1 / 12, stratified=True, seed=self.seed)
        return Data(rows, valid, Split(test.data.unsqueeze(1), test.targets), tuple(train.classes))

    def build_model(self, params: Params) -> nn.Module:
        if params.get("model") == "cnn":
            return nn.Sequential(Pixels(), *_convolutions(params["channels"], params["dropout"]))
        layers, width = hidden_layers(28 * 28, {"layers": 2, **params})
        return nn.Sequential(Pixels(), nn.Flatten(), *layers, nn.Linear(width, 10))

    def build_optimizer(self, model: nn.Module, params: Params) -> Optimizer:
        settings = {name: params[name] for name in ("lr", "weight_decay", "momentum") if name in params}
        return fastest(OPTIMIZERS[params.get("optimizer", "sgd")], model.parameters(), **settings)

    def build_scheduler(self, optimizer: Optimizer, params: Params, epochs: int) -> LRScheduler | None:
        return super().build_scheduler(optimizer, params, epochs) if params.get("schedule") == "cosine" else None

    def batch_size(self, params: Params) -> int:
        return 32 if self.models == "mlp" else super().batch_size(params)

    def build_metrics(self, data: Data) -> dict[str, Metric]:
        from torchmetrics import ClasswiseWrapper
        from torchmetrics.classification import MulticlassAccuracy

        n = len(data.class_names)
        of_each = MulticlassAccuracy(num_classes=n, average=None)
        return {
            **super().build_metrics(data),
            "top_3_accuracy": MulticlassAccuracy(num_classes=n, top_k=3, average="micro"),
            "accuracy_of_each": ClasswiseWrapper(of_each, labels=list(map(str, data.class_names)), prefix="accuracy "),
        }


def _convolutions(channels: int, dropout: float) -> list[nn.Module]:
    def block(n_in: int, n_out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
        return [convolution, nn.MaxPool2d(2), nn.BatchNorm2d(n_out), nn.ReLU()]

    features = 2 * channels * 7 * 7
    return [
        *block(1, channels),
        *block(channels, 2 * channels),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(features, 10),
    ]
