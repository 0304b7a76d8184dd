"""Inputs in double precision, which most models cannot be called with, found before the first trial."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tuner.data import Data, Inputs, map_inputs, tensors
from tuner.errors import DataError
from tuner.objective import Objective
from tuner.study.sampling import drawn
from tuner.training.steps import call


def check_doubles(objective: Objective, data: Data) -> None:
    """Raise DataError if a model of the objective takes its inputs in float32 and not in float64, as they are.

    A model that converts them, or computes in float64, takes them as they are; what else is wrong with it, its trials
    tell.
    """
    first = torch.zeros(2, dtype=torch.int64)  # the one row that is known to be sound, and two for batch norm
    inputs = data.train.rows(first).to(torch.device("cpu")).inputs
    if not any(tensor.dtype == torch.float64 for tensor in tensors(inputs)):
        return
    try:
        model = objective.build_model(drawn(objective))
    except Exception:  # noqa: BLE001 - foreign code: its trial tells what it raises
        return
    if isinstance(model, nn.Module) and not _takes(model, inputs) and _takes(model, map_inputs(_single, inputs)):
        raise DataError(
            "inputs need the type that the model computes in, got float64: use .float() in load_data, or in the model's"
            " forward"
        )


def _takes(model: nn.Module, inputs: Inputs) -> bool:
    model.eval()
    try:
        with torch.no_grad():
            call(model, inputs)
    except Exception:  # noqa: BLE001 - foreign code
        return False
    return True


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor
