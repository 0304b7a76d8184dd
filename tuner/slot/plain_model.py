"""A model of whatever form as one that takes and gives tensors: in order, or by their names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuner.data import Inputs
from tuner.training.steps import call


def plain(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Return the model itself if it takes and gives tensors, else what does; the model is called, in the mode it is in.

    That is called by the inputs' names, or on them in order, also where the model's forward takes all of a batch as one
    dict or tuple, and gives what `plain_outputs` makes of the outputs.
    """
    takes_all_as_one = _takes_all_as_one(model, inputs)
    with torch.no_grad():
        outputs = model(inputs) if takes_all_as_one else call(model, inputs)
    parts = outputs.values() if type(outputs) is dict else outputs if type(outputs) is tuple else (outputs,)
    is_plain = all(isinstance(part, Tensor) for part in parts)
    return model if is_plain and not takes_all_as_one else PlainModel(model, takes_all_as_one=takes_all_as_one)


class PlainModel(nn.Module):
    """What `plain` returns for a model of another form."""

    def __init__(self, model: nn.Module, *, takes_all_as_one: bool) -> None:
        super().__init__()
        self.model = model
        self._takes_all_as_one = takes_all_as_one
        self.training = model.training

    def forward(self, *args: Any, **named: Any) -> Any:
        """Return the model's outputs for a batch."""
        return plain_outputs(self.model(named or args) if self._takes_all_as_one else self.model(*args, **named))


def plain_outputs(outputs: Any) -> Any:
    """Return a tensor, or the tensors of what a model gives: by their names where those have any, else in order.

    Names are of a dict's keys, or of the fields of a dataclass or a named tuple; what lies deeper has those of the way
    to it, with dots. What is no tensor, as None and a cache, is left out.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if _named_parts(outputs) is None:
        found = [part for _, part in _tensors(outputs, "")]
        return tuple(found) if isinstance(outputs, tuple | list) else outputs
    return dict(_tensors(outputs, ""))


def _tensors(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
        return
    parts = _named_parts(value)
    if parts is None:
        parts = dict(enumerate(value)) if isinstance(value, tuple | list) else {}
    for name, part in parts.items():
        yield from _tensors(part, f"{place}.{name}" if place else str(name))


def _named_parts(value: Any) -> Mapping[Any, Any] | None:
    """Return what a value holds by names, None if it has none."""
    if isinstance(value, Mapping):  # before dataclasses: that of transformers is both, and holds no None as a dict
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    return None


def _takes_all_as_one(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the model's forward can take the inputs as one argument only."""
    if isinstance(inputs, Tensor):
        return False
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # written in C
        return False
    args, named = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    return not _binds(signature, *args, **named) and _binds(signature, inputs)


def _binds(signature: inspect.Signature, *args: Any, **named: Any) -> bool:
    try:
        signature.bind(*args, **named)
    except TypeError:
        return False
    return True
