"""What is recorded with each trial beside its value. Knows nothing of Optuna or of a database."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tuner.training.devices import name_of, peak_of, start_peak
from tuner.versions import versions

if TYPE_CHECKING:
    from tuner.training.compiling import Gain
    from tuner.training.fitting import Epoch


OWN_NAMES = frozenset(
    {
        *("train_loss", "lr", "epoch", "epochs", "seconds", "train_s", "evaluate_s", "wait_s", "samples_per_s"),
        *("seed", "device", "versions", "peak_memory_mb", "peak_reserved_mb", "threads"),
        *("parameters", "trained_parameters", "confirms"),
        *("audit.pruned_at", "audit.value", "audit.seconds"),
        *("compiled", "compile_s", "compile_slowed_s", "step_ms_uncompiled", "step_ms_compiled"),
    }
)
"""What is recorded of a trial and of its epochs beside the metrics, which cannot have these names."""


def count_weights(model: nn.Module) -> dict[str, int]:
    """Return how many numbers the model's weights are, as `parameters`, and those trained, `trained_parameters`."""
    weights = list(model.parameters())
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "trained_parameters": sum(weight.numel() for weight in weights if weight.requires_grad),
    }


class Record:
    """Collects what a trial cost while it runs: `peak_memory_mb` is the device's, on a CPU the whole process's.

    On CUDA and XPU that is what tensors took, the data of the slot among them. `peak_reserved_mb` is what torch had
    taken from the device for them, with what was free between them and what CUDA graphs keep: a device has to have
    that, and some 500 MB more for each process that uses it.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self._device = device
        self._seed = seed
        self._epochs: list[Epoch] = []
        self._counts: dict[str, int] = {}
        self._compiled: dict[str, Any] = {}
        start_peak(device)

    def count(self, model: nn.Module) -> None:
        """Count the model's weights, all of them and those that are trained."""
        self._counts = self._counts or count_weights(model)

    def add(self, epoch: Epoch) -> None:
        """Take an epoch that ended into the sums."""
        self._epochs.append(epoch)

    def compiled(self, gain: Gain) -> None:
        """Take in what compiling gained."""
        self._compiled = gain.attrs()

    def attrs(self) -> dict[str, Any]:
        """Return the attributes by name; those of the epochs only if there were any."""
        peak = peak_of(self._device)
        always: dict[str, Any] = {
            "seed": self._seed,
            "device": str(self._device),
            "peak_memory_mb": _mb(_process_peak() if peak is None else peak[0]),
            "versions": _recorded_versions(self._device),
            **self._counts,
            **self._compiled,
        }
        if self._device.type == "cpu":
            always["threads"] = torch.get_num_threads()
        if peak is not None and self._device.type != "mps":  # which tells of one figure only
            always["peak_reserved_mb"] = _mb(peak[1])
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
    name = name_of(device)
    return known if name is None else {**known, "device": name}


def _mb(n_bytes: int) -> float:
    return round(n_bytes / 2**20, 1)


def _process_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
