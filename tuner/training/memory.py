"""Running out of memory: what libraries say of it, and giving back what is used no more."""

from __future__ import annotations

import gc

import torch

from tuner.training.devices import empty_cache

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: of a device, which has an error of its own, or of the host, which has none."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OUT_OF_MEMORY)


def free_memory() -> None:
    """Give the memory of what is used no more back to the device, for other processes."""
    gc.collect()
    empty_cache()
