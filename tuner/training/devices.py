"""Which device models are trained on, and what torch tells of it: `torch.accelerator` decides, whatever its kind.

CUDA, which is what torch calls AMD's devices (ROCm) too, XPU, MPS, or none. Knows nothing of Optuna or of a database.
"""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from tuner.errors import BrokenDeviceError, UsageError


def choose_device(name: str | None = None) -> torch.device:
    """Return the device `name`, or the best there is: the accelerator that torch finds, else cpu.

    One of several accelerators becomes torch's current. Raises UsageError if there is no such device here,
    BrokenDeviceError if there is one that cannot be used.
    """
    best = _accelerator() or "cpu"
    try:
        device = torch.empty(0, device=name or best).device  # with its number, as its tensors have it
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        if not name or _is_listed(name):
            raise BrokenDeviceError(f"{name or best} cannot be used: {reason}") from error
        raise UsageError(f"--device needs a device of this machine, got {name!r}: {reason}") from error
    if _has_several(device):
        torch.accelerator.set_device_index(device)
    return device


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which this device is torch's current."""
    return torch.accelerator.device_index(device.index) if _has_several(device) else nullcontext()


def name_of(device: torch.device) -> str | None:
    """Return what the device calls itself, None where torch does not tell."""
    get_name = getattr(torch.get_device_module(device), "get_device_name", None) if _has_several(device) else None
    return None if get_name is None else str(get_name(device))


def memory_of(device: torch.device) -> tuple[int, int]:
    """Return how many bytes of the device's memory are free, and how many there are."""
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type != "cpu":
        with suppress(RuntimeError, AttributeError):  # not every kind tells, nor torch 2.10 of every kind
            return torch.accelerator.get_memory_info(device)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:  # macOS tells what there is, not what is free of it
        return total, total
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), total


def start_peak(device: torch.device) -> None:
    """Forget how much memory torch has taken at most from the device."""
    if _has_several(device):
        with suppress(RuntimeError):
            torch.accelerator.reset_peak_memory_stats(device)


def peak_of(device: torch.device) -> tuple[int, int] | None:
    """Return how many bytes of the device tensors took at most, and torch for them; None where it does not tell."""
    if device.type == "mps":
        taken = torch.mps.driver_allocated_memory()
        return taken, taken
    if _has_several(device):
        with suppress(RuntimeError):
            return torch.accelerator.max_memory_allocated(device), torch.accelerator.max_memory_reserved(device)
    return None


def empty_cache() -> None:
    """Give what torch keeps of the accelerator's memory, and nobody uses, back to it."""
    kind = _accelerator()
    if kind == "mps":
        torch.mps.empty_cache()
    elif kind is not None:
        torch.accelerator.empty_cache()


def generator_state(device: torch.device) -> Tensor | None:
    """Return the state of the device's own random generator, None for the CPU, whose is torch's."""
    if device.type in ("cpu", "meta"):
        return None
    module: Any = torch.get_device_module(device)
    state: Tensor = module.get_rng_state(device) if _has_several(device) else module.get_rng_state()
    return state


def set_generator_state(state: Tensor, device: torch.device) -> None:
    """Set the device's own random generator to what `generator_state` returned."""
    module: Any = torch.get_device_module(device)
    if _has_several(device):
        module.set_rng_state(state, device)
    else:
        module.set_rng_state(state)


def _accelerator() -> str | None:
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def _has_several(device: torch.device) -> bool:
    """Whether it is of a kind that a machine may have several of, with functions that take its number."""
    return device.type not in ("cpu", "mps", "meta")


def _is_listed(name: str) -> bool:
    """Whether the driver knows this device, though it may be full, or somebody else's alone."""
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", name)
    return match is not None and match[1] == _accelerator() and int(match[2] or 0) < torch.accelerator.device_count()
