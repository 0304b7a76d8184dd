"""Seeds that follow from the study's one seed, so that any trial can be run again."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *path: str | int) -> int:
    """Return a seed in [0, 2**32) for one use of a study's seed, such as `derive_seed(7, "trial", 12)`.

    Different paths give independent seeds; the same path gives the same seed on every machine and version.
    32 bits, because NumPy's legacy generator, which Optuna's samplers use, takes no more.
    """
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (all devices) for one trial."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_deterministic(on: bool) -> None:
    """Make torch use only algorithms that give the same result each time, or the fastest of all, in this process.

    To be called before anything has been computed on a CUDA device. An operation without such an algorithm then
    raises RuntimeError, which names it.
    """
    import os

    import torch

    torch.use_deterministic_algorithms(on)
    # With NaN, when deterministic: a kernel more for each tensor, for a result that does not depend on it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not on
    if on:
        # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
