"""Which device models are trained on. Knows nothing of Optuna or of a database."""

from __future__ import annotations

import re

import torch

from tuner.errors import BrokenDeviceError, UsageError


def choose_device(name: str | None = None) -> torch.device:
    """Return the device `name`, or the best there is: cuda, then mps, then cpu; a CUDA device becomes torch's current.

    Raises UsageError if there is no such device here, BrokenDeviceError if there is one that cannot be used.
    """
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name or best).device  # with its number, as its tensors have it
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        if not name or _is_listed(name):
            raise BrokenDeviceError(f"{name or best} cannot be used: {reason}") from error
        raise UsageError(f"--device needs a device of this machine, got {name!r}: {reason}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _is_listed(name: str) -> bool:
    """Whether the driver knows this CUDA device, though it may be full, or somebody else's alone."""
    cuda = re.fullmatch(r"cuda(?::(\d+))?", name)
    return cuda is not None and torch.cuda.is_available() and int(cuda[1] or 0) < torch.cuda.device_count()
