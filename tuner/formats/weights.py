"""A model's weights as safetensors."""

from __future__ import annotations

from typing import Any, Final

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from tuner.formats.names import FILES
from tuner.training.compiled import state_of

WEIGHTS: Final = FILES["safetensors"]


def weights_file(model: nn.Module) -> tuple[bytes, dict[str, str]]:
    """Return the file with all of the model's state that safetensors can hold, and why by name for what it cannot."""
    held: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, value in state_of(model).items():
        reason = _why_not(value)
        if reason is None:
            held[name] = value.detach().resolve_conj().resolve_neg().clone().contiguous()
        else:
            left_out[name] = reason
    return save(held), left_out


def differing(data: bytes, model: nn.Module) -> str | None:
    """Return the name of a tensor that the file does not give back bit by bit, None if there is none."""
    found = load(data)
    for name, wanted in state_of(model).items():
        if name in found and not _is_same(found[name], wanted.detach().resolve_conj().resolve_neg()):
            return name
    return None


def _why_not(value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return f"it is {type(value).__name__} and no tensor"
    kind = str(value.dtype).removeprefix("torch.")
    if value.is_quantized or value.layout is not torch.strided:
        return f"safetensors holds no {'quantized' if value.is_quantized else str(value.layout)} tensors"
    if value.is_meta or nn.parameter.is_lazy(value):
        return "it has no values"
    return None if _is_held(value.dtype) else f"safetensors holds no {kind}"


def _is_held(dtype: torch.dtype) -> bool:
    try:
        return load(save({"": torch.empty(1, dtype=dtype)}))[""].dtype == dtype
    except (KeyError, ValueError, TypeError):  # how it says so depends on its version
        return False


def _is_same(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # As bytes: NaN is no other than itself here.
    bytes_of_one, bytes_of_other = (its.cpu().contiguous().reshape(-1).view(torch.uint8) for its in (one, other))
    return torch.equal(bytes_of_one, bytes_of_other)
