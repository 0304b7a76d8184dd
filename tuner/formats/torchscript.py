"""A model as TorchScript, traced: for programs in C++, and for those that read nothing newer."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import torch
from torch import nn

from tuner.data import tensors
from tuner.errors import FormatError, first_line
from tuner.formats.calling import Names
from tuner.formats.program import Traced, reason_of, with_arguments


def write(traced: Traced) -> bytes:
    """Return the file of the model's trace. Raises FormatError with torch's reason.

    What it says of sizes and branches is decided by the rows it was traced on; whoever compares it with the model on
    other numbers of rows finds that out.
    """
    model, values = traced.model, tensors(traced.inputs)
    if isinstance(traced.inputs, dict):
        found = with_arguments(model, tuple(traced.inputs), by_name=True)
        if found is None:
            raise FormatError(f"TorchScript has arguments of Python's names, got {', '.join(traced.inputs)}")
        model = found
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            _silence()
            made = torch.jit.trace(model.eval(), values, strict=False, check_trace=False)  # strict wants no dict
            torch.jit.save(made, buffer)
    except Exception as error:
        raise FormatError(reason_of(error)) from error
    return buffer.getvalue()


def load(path: Path, names: Names) -> nn.Module:  # noqa: ARG001 - a trace has its own
    """Return the trace in a file. It is code, and runs when it is called. Raises FormatError if it cannot be read."""
    try:
        with warnings.catch_warnings():
            _silence()
            loaded: nn.Module = torch.jit.load(io.BytesIO(path.read_bytes()), map_location="cpu")
    except RuntimeError as error:
        raise FormatError(f"{path} needs to hold TorchScript, got what cannot be read: {first_line(error)}") from error
    return loaded


def _silence() -> None:
    """Silence that TorchScript is deprecated (torch 2.10 and later), and what a trace tells while it is made."""
    for kind in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)", category=kind)
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
