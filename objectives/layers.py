"""Hidden layers, as the objectives here search them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from tuner.objective import Params

if TYPE_CHECKING:
    import optuna


def suggest_hidden_layers(trial: optuna.Trial, *, layers: tuple[int, int], units: tuple[int, int]) -> None:
    """Suggest how many hidden layers there are, the units of each, and a dropout rate if there are any."""
    n_layers = trial.suggest_int("layers", *layers)
    for layer in range(n_layers):
        trial.suggest_int(f"units_{layer}", *units, log=True)
    if n_layers:
        trial.suggest_float("dropout", 0.0, 0.5)


def hidden_layers(n_inputs: int, params: Params, *, batch_norm: bool = False) -> tuple[nn.Sequential, int]:
    """Return the hidden layers of these params, and how many outputs they have: `n_inputs` without any layer."""
    layers: list[nn.Module] = []
    width = n_inputs
    for layer in range(params["layers"]):
        units = params[f"units_{layer}"]
        layers += [nn.Linear(width, units, bias=not batch_norm)]
        layers += [nn.BatchNorm1d(units)] if batch_norm else []
        layers += [nn.ReLU(), nn.Dropout(params["dropout"])]
        width = units
    return nn.Sequential(*layers), width
