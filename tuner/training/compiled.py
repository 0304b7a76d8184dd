"""Models that their objective compiled, whole or in parts: by the names and modules that they have uncompiled.

`torch.compile(module)` wraps a module, and its weights get the wrapper's name before theirs. What is written - a
checkpoint, an export - is to fit the model wherever it is built, compiled or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn

_WRAPPED = "_orig_mod"
_COMPILED = "_torchdynamo_orig_callable"
"""What a compiled function was made of."""


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return the model's state by the names that it has uncompiled."""
    return {_plain(name): value for name, value in model.state_dict().items()}


def load_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state of the model, compiled or not then or now. Raises RuntimeError, torch's, if it does not fit."""
    own = {_plain(name): name for name in model.state_dict()}
    model.load_state_dict({own.get(_plain(name), name): value for name, value in state.items()})


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model without the wrappers of `torch.compile`, also of its parts, which it loses in place.

    What a compiled `forward` was made of takes its place: torch 2.10 cannot trace a program through one.
    """
    model = _unwrapped(model)
    for module in model.modules():
        for name, child in module.named_children():
            setattr(module, name, _unwrapped(child))
        if (its_own := getattr(vars(module).get("forward"), _COMPILED, None)) is not None:
            module.forward = its_own
        elif (function := getattr(type(module).forward, _COMPILED, None)) is not None:
            module.forward = MethodType(function, module)
    return model


def _unwrapped(module: nn.Module) -> nn.Module:
    # By its class's name: to import the class is to import torch's compiler, for a second.
    while type(module).__name__ == "OptimizedModule":
        module = module.get_submodule(_WRAPPED)
    return module


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _WRAPPED)
