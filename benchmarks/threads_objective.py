"""The objective of `threads.py`: small and large models on random rows, which `--set kind=...` chooses among."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn

from tuner.data import Data, Split
from tuner.objective import Objective, Params

if TYPE_CHECKING:
    from pathlib import Path

    import optuna


class Kind(NamedTuple):
    """A kind of model, with batches and epochs of so many rows."""

    shape: tuple[int, ...]
    batch: int
    rows: int


KINDS = {
    "mlp-32": Kind((64,), 32, 48_000),
    "mlp-512": Kind((64,), 512, 256_000),
    "cnn": Kind((1, 28, 28), 64, 4_000),
    "wide": Kind((1000,), 256, 16_000),
}


class OfAKind(Objective):
    """Classify random rows, `part` of its kind's, by a model of one kind; the rate is all that is searched."""

    kind: Literal["mlp-32", "mlp-512", "cnn", "wide"] = "mlp-32"
    part: float = 1.0

    def suggest(self, trial: optuna.Trial) -> None:
        trial.suggest_float("lr", 1e-4, 1e-3, log=True)

    def load_data(self, root: Path) -> Data:  # noqa: ARG002
        kind = KINDS[self.kind]
        generator = torch.Generator().manual_seed(self.seed)

        def split(n_rows: int) -> Split:
            n_rows = max(2 * kind.batch, int(n_rows * self.part))
            inputs = torch.randn(n_rows, *kind.shape, generator=generator)
            return Split(inputs, torch.randint(10, (n_rows,), generator=generator))

        return Data(split(kind.rows), split(kind.rows // 8), split(kind.rows // 8), tuple("0123456789"))

    def build_model(self, params: Params) -> nn.Module:  # noqa: ARG002
        match self.kind:
            case "cnn":
                maps = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU())
                return nn.Sequential(*maps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
            case "wide":
                return nn.Sequential(nn.Linear(1000, 1024), nn.ReLU(), nn.Linear(1024, 10))
            case _:
                return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def batch_size(self, params: Params) -> int:  # noqa: ARG002
        return KINDS[self.kind].batch
