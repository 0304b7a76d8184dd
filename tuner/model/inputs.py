"""Inputs as somebody gives them, made those that the manifest describes, or refused by what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuner.data import Inputs, tensors
from tuner.errors import TunerError
from tuner.model.manifest import Manifest, TensorDescription

FAR = 10
"""How many times the range that an input had in the training split it may go beyond it, unremarked."""


class BadValueError(TunerError):
    """A value that an input cannot have; in which row and at which of the row's places it stands, counted from 0."""

    def __init__(self, its: TensorDescription, problem: str, row: int, place: int) -> None:
        at = [int(index) for index in np.unravel_index(place, its.shape)] if its.shape else []
        super().__init__(f"{_called(its.name)} needs {problem} in row {row}{f', at {at}' if at else ''}")
        self.its = its
        self.problem = problem
        self.row = row
        self.place = place


def model_inputs(given: Any, manifest: Manifest) -> Inputs:
    """Return what the model is called with, of arrays, tensors or nested lists with a row for each example.

    Several inputs are given in a dict by name, or in a tuple or list in their order, as the manifest has them. Types
    are converted where no value is lost but by rounding. Raises TunerError that says what was wanted.
    """
    described = manifest.inputs
    names = [its.name for its in described if its.name is not None]
    if names and len(names) == 1 and not isinstance(given, Mapping):
        given = {names[0]: given}
    if names:
        if not isinstance(given, Mapping) or given.keys() != set(names):
            found = f"those of {_listed(given)}" if isinstance(given, Mapping) else type(given).__name__
            raise TunerError(f"the model needs a dict of its inputs, {_listed(names)}, got {found}")
        made: Inputs = {name: _input(given[name], its) for name, its in zip(names, described, strict=True)}
    elif len(described) == 1:
        if isinstance(given, Mapping):
            raise TunerError(f"the model needs one array, as its input has no name, got a dict of {_listed(given)}")
        made = _input(given, described[0])
    else:
        if not isinstance(given, tuple | list) or len(given) != len(described):
            found = f"{len(given)}" if isinstance(given, tuple | list) else type(given).__name__
            raise TunerError(f"the model needs a tuple of {len(described)} inputs in their order, got {found}")
        made = tuple(_input(value, its) for value, its in zip(given, described, strict=True))
    lengths = [len(part) for part in tensors(made)]
    if len(set(lengths)) > 1:
        raise TunerError(f"all inputs need the same number of rows, got {', '.join(map(str, lengths))}")
    return made


def far_out(inputs: Inputs, manifest: Manifest) -> str | None:
    """Return what to say of inputs that are far from all that the training split had; None if they are not."""
    for its, tensor in zip(manifest.inputs, tensors(inputs), strict=True):
        if its.seen is None or tensor.is_complex() or tensor.numel() == 0:
            continue
        low, high = its.seen
        margin = FAR * ((high - low) or max(1.0, abs(high)))
        least, greatest = (float(value) for value in (tensor.min(), tensor.max()))
        if least < low - margin or greatest > high + margin:
            return (
                f"{_called(its.name)} goes from {least:g} to {greatest:g}, in the training split it went from {low:g}"
                f" to {high:g}: check that values are scaled as the objective's data is"
            )
    return None


def _input(given: Any, its: TensorDescription) -> Tensor:
    tensor = _tensor(given, its)
    if tuple(tensor.shape[1:]) != its.shape or tensor.ndim == 0:
        hint = "x[None] makes a batch of one row" if tuple(tensor.shape) == its.shape else "reshape it"
        wanted = ", ".join(["n", *map(str, its.shape)])
        raise TunerError(f"{_called(its.name)} needs the shape ({wanted}), got {tuple(tensor.shape)}: {hint}")
    if len(tensor) == 0:
        raise TunerError(f"{_called(its.name)} needs at least one row, got none")
    wanted_type = getattr(torch, its.dtype, None)
    if not isinstance(wanted_type, torch.dtype):
        raise TunerError(f"the manifest names {its.dtype!r}, which is no type of tensors: run 'tuner export' again")
    return _converted(tensor, wanted_type, its)


def _tensor(given: Any, its: TensorDescription) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach()
    try:
        array = np.asarray(given)
    except (ValueError, TypeError) as error:  # lists of different lengths
        raise TunerError(f"{_called(its.name)} needs rows of the same shape, {list(its.shape)}: {error}") from error
    if array.dtype.kind not in "biufc":
        raise TunerError(
            f"{_called(its.name)} needs numbers of type {its.dtype}, got {array.dtype}: convert them, as by"
            f" numpy.asarray(x, {its.dtype!r})"
        )
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:  # torch compares no such numbers
        array = array.astype(np.float64 if array.dtype.itemsize == 8 else np.int64)
    elif array.dtype.itemsize > (16 if array.dtype.kind == "c" else 8):
        array = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)).reshape(array.shape)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _converted(tensor: Tensor, wanted: torch.dtype, its: TensorDescription) -> Tensor:
    if tensor.is_complex() and not wanted.is_complex:
        raise TunerError(f"{_called(its.name)} needs {its.dtype}, got {tensor.dtype}: give real numbers")
    is_exact = wanted.is_floating_point or wanted.is_complex or tensor.dtype == wanted
    if tensor.is_floating_point() or tensor.is_complex():
        _require(tensor.isfinite(), "finite numbers", tensor, its)
    if not is_exact:
        low, high = (0, 1) if wanted == torch.bool else (torch.iinfo(wanted).min, torch.iinfo(wanted).max)
        whole = (tensor >= low) & (tensor <= high) if tensor.dtype != torch.bool else torch.ones_like(tensor)
        if tensor.is_floating_point():
            whole &= tensor == tensor.round()
        _require(whole, f"whole numbers from {low} to {high}", tensor, its)
    made = tensor.to(wanted)
    if made.is_floating_point():
        _require(made.isfinite(), f"numbers that {its.dtype} can hold", tensor, its)
    return made


def _require(good: Tensor, wanted: str, tensor: Tensor, its: TensorDescription) -> None:
    if bool(good.all()):
        return
    row, place = (int(index) for index in (~good).reshape(len(good), -1).nonzero()[0])
    found = tensor.reshape(len(tensor), -1)[row, place].item()
    raise BadValueError(its, f"{wanted}, got {found:.6g}", row, place)


def _called(name: str | None) -> str:
    return "the input" if name is None else f"input {name!r}"


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"
