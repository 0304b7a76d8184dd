"""What a plain function may ask of the slot that runs it, for as long as its trial runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from tuner.slot.own_checkpoint import TrialCheckpoint

if TYPE_CHECKING:
    from tuner.slot.checked_trial import CheckedTrial
    from tuner.slot.kept_model import KeptModel
    from tuner.training.checkpoint import Checkpoint


class OwnLoop:
    """The device, the checkpoint and the kept model of a trial that is a function's own to train.

    `trial.loop` is this while the function runs, and is of no use afterwards, nor in another process.
    """

    def __init__(self, trial: CheckedTrial, device: torch.device, checkpoint: Callable[[], Checkpoint | None]) -> None:
        self.device = device
        self.kept: KeptModel | bytes | None = None
        """The model that is to be kept if the trial is the best; as bytes, one of an attempt before this one."""
        self._trial = trial
        self._make = checkpoint
        self._checkpoint: TrialCheckpoint | None = None
        self._process: int | None = os.getpid()

    def is_here(self) -> bool:
        """Whether the function runs now, and in this process."""
        return self._process == os.getpid()

    @property
    def checkpoint(self) -> TrialCheckpoint:
        """The trial's checkpoint."""
        if self._checkpoint is None:
            self._checkpoint = TrialCheckpoint(self._make(), self._trial, self.device)
        return self._checkpoint

    def close(self) -> None:
        """End what the function had of its slot, and have written what it saved."""
        self._process = None
        if self._checkpoint is not None:
            self._checkpoint.close()
