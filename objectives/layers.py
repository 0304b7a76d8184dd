"""Hidden layers, as the objectives here search them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tuner.objective import Params

if TYPE_CHECKING:
    import optuna


class Pixels(nn.Module):
    """Images in uint8, 0 to 255, as floats from 0 to 1."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the images as floats."""
        return images.to(torch.float32) / 255


def suggest_hidden_layers(
    trial: optuna.Trial, *, layers: tuple[int, int], units: tuple[int, int], dropout: bool = True
) -> None:
    """Suggest how many hidden layers there are, the units of each, and with `dropout` its rate if there are any."""
    n_layers = trial.suggest_int("layers", *layers)
    for layer in range(n_layers):
        trial.suggest_int(f"units_{layer}", *units, log=True)
    if n_layers and dropout:
        trial.suggest_float("dropout", 0.0, 0.5)


def hidden_layers(n_inputs: int, params: Params, *, batch_norm: bool = False) -> tuple[nn.Sequential, int]:
    """Return the hidden layers of these params, and how many outputs they have: `n_inputs` without any layer.

    Each has its own units, or all have those of the param `units`; there is no dropout where none was suggested.
    """
    layers: list[nn.Module] = []
    width = n_inputs
    for layer in range(params["layers"]):
        units = params["units"] if "units" in params else params[f"units_{layer}"]
        layers += [nn.Linear(width, units, bias=not batch_norm)]
        layers += [nn.BatchNorm1d(units)] if batch_norm else []
        layers += [nn.ReLU(), nn.Dropout(params.get("dropout", 0.0))]
        width = units
    return nn.Sequential(*layers), width
