"""What is recorded with each trial beside its value. Knows nothing of Optuna or of a database."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tuner.versions import versions

if TYPE_CHECKING:
    from tuner.training.fitting import Epoch


OWN_NAMES = frozenset(
    {
        *("train_loss", "lr", "epoch", "epochs", "seconds", "train_s", "evaluate_s", "wait_s", "samples_per_s"),
        *("seed", "device", "versions", "peak_memory_mb", "peak_reserved_mb"),
        *("parameters", "trained_parameters"),
    }
)
"""What is recorded of a trial and of its epochs beside the metrics, which cannot have these names."""


class Record:
    """Collects what a trial cost while it runs: `peak_memory_mb` is the device's, on a CPU the whole process's.

    On CUDA that is what tensors took, the data of the slot among them. `peak_reserved_mb` is what torch had taken from
    the device for them, with what was free between them and what CUDA graphs keep: a device has to have that, and some
    500 MB more for each process that uses it.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self._device = device
        self._seed = seed
        self._epochs: list[Epoch] = []
        self._counts: dict[str, int] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def count(self, model: nn.Module) -> None:
        """Count the model's weights, all of them and those that are trained."""
        if not self._counts:
            weights = list(model.parameters())
            self._counts = {
                "parameters": sum(weight.numel() for weight in weights),
                "trained_parameters": sum(weight.numel() for weight in weights if weight.requires_grad),
            }

    def add(self, epoch: Epoch) -> None:
        """Take an epoch that ended into the sums."""
        self._epochs.append(epoch)

    def attrs(self) -> dict[str, Any]:
        """Return the attributes by name; those of the epochs only if there were any."""
        always: dict[str, Any] = {
            "seed": self._seed,
            "device": str(self._device),
            "peak_memory_mb": round(_peak_bytes(self._device) / 2**20, 1),
            "versions": _recorded_versions(self._device),
            **self._counts,
        }
        if self._device.type == "cuda":
            always["peak_reserved_mb"] = round(torch.cuda.max_memory_reserved(self._device) / 2**20, 1)
        if not self._epochs:
            return always
        train_s = sum(epoch.train_s for epoch in self._epochs)
        rows = sum(epoch.rows for epoch in self._epochs)
        return {
            **always,
            "epochs": self._epochs[-1].number,
            "samples_per_s": round(rows / train_s, 1) if train_s else 0.0,
            "train_s": round(train_s, 3),
            "evaluate_s": round(sum(epoch.evaluate_s for epoch in self._epochs), 3),
            "wait_s": round(sum(epoch.wait_s for epoch in self._epochs), 3),
        }


def _recorded_versions(device: torch.device) -> dict[str, str]:
    known = {name: versions()[name] for name in ("python", "torch", "tuner")}
    return {**known, "device": torch.cuda.get_device_name(device)} if device.type == "cuda" else known


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
