"""The versions that a result may depend on, read without importing the packages."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import cache

_VERSIONED = ("torch", "torchvision", "torchmetrics", "optuna", "safetensors", "scikit-learn", "numpy", "tuner")


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result may depend on, by name."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _VERSIONED}}
