"""A callback of the Trainer of transformers that reports, prunes and keeps checkpoints."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from torch import Tensor

from tuner import loops
from tuner.errors import TunerError
from tuner.slot.own_checkpoint import TrialCheckpoint
from tuner.training import DivergedError

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as _error:
    raise TunerError(
        f"tuner.callbacks.Transformers needs transformers, got no {_error.name}: pip install 'tuner[transformers]'"
    ) from _error

_LEFT_OUT = ("training_args.bin",)
"""What the Trainer writes for people, as a pickle, and does not read."""


class Transformers(TrainerCallback):  # type: ignore[misc, unused-ignore]  # of any type where it is not installed
    """Reports a metric after each evaluation, prunes the trial, and keeps the checkpoints of a Trainer.

        callback = tuner.callbacks.Transformers(trial, "eval_accuracy")
        arguments = TrainingArguments(callback.output_dir, eval_strategy="epoch", save_strategy="no")
        trainer = Trainer(model, arguments, callbacks=[callback], ...)
        trainer.train(resume_from_checkpoint=callback.resume_from_checkpoint)

    `output_dir` is a directory of this trial's own, gone with the callback: slots beside it would write to the same
    files in one of everybody's. `resume_from_checkpoint` is None until there is something to go on from, as after a
    worker was lost; without it the trial is trained anew then. The step of a report is the epoch, from 0, where each
    epoch is evaluated, and else the Trainer's. The Trainer trains on the slot's device alone.
    """

    def __init__(self, trial: optuna.Trial, monitor: str) -> None:
        self._trial = trial
        self._monitor = monitor
        self._checkpoint: TrialCheckpoint = loops.checkpoint(trial)
        self._device = loops.device(trial)
        self._folder = Path(tempfile.mkdtemp(prefix="tuner-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._path: str | None = None
        self._is_loaded = False
        self._trains = self._asked_to_save = self._has_reported = False
        self._others: set[str] = set()

    @property
    def output_dir(self) -> str:
        """A directory for the Trainer's files, as its `output_dir`."""
        return str(self._folder / "output")

    @property
    def resume_from_checkpoint(self) -> str | None:
        """The directory that `Trainer.train` goes on from; None if the trial begins.

        The Trainer unpickles no code of it (from transformers 5.0 on).
        """
        if not self._is_loaded:
            self._is_loaded = True
            state = self._checkpoint.load_all()
            if state is not None:
                directory = self._folder / "checkpoint"
                directory.mkdir()
                for name, content in state["own"].items():
                    if name not in _LEFT_OUT:
                        (directory / Path(name).name).write_bytes(content.numpy().tobytes())
                self._path = str(directory)
        return self._path

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - as it is called
        """Raise TunerError for a Trainer of several devices, or of another than the slot's."""
        n_devices = max(args.world_size, args.n_gpu)
        if n_devices > 1:
            raise TunerError(
                f"a trial has one device, got a Trainer of {n_devices}: the slots of 'tuner run' and 'tuner worker' see"
                " one each; elsewhere set CUDA_VISIBLE_DEVICES"
            )
        if args.device.type != self._device.type:
            hint = ": give TrainingArguments use_cpu=True" if self._device.type == "cpu" else ""
            raise TunerError(f"the trial's device is {self._device}, got a Trainer on {args.device}{hint}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """From here on an evaluation is one of the training."""
        self._trains = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """What is evaluated from here on is not reported."""
        self._trains = False
        self._check_metric()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Raise TunerError if the epoch before had other metrics only."""
        self._check_metric()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Report, raise TrialPruned, and have the Trainer save its state if it is time."""
        if not self._trains or state.global_step == 0:
            return
        found = metrics or {}
        value = found.get(self._monitor, found.get(f"eval_{self._monitor}"))
        if value is None:  # it may be of another of several data sets
            self._others |= found.keys()
            return
        self._has_reported = True
        is_of_epochs = str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "epoch"
        step = max(0, round(state.epoch) - 1) if is_of_epochs else state.global_step
        number = float(value)
        if math.isnan(number):
            raise DivergedError(f"{self._monitor} is NaN at step {step}")
        self._trial.report(number, step)
        if self._trial.should_prune():
            raise optuna.TrialPruned(f"pruned at step {step}")
        if self._checkpoint.is_due():
            self._asked_to_save = not control.should_save
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Keep what the Trainer has saved; a trial that is to be given back ends here."""
        if not self._checkpoint.is_due():
            return
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = [path for path in directory.iterdir() if path.is_file() and path.name not in _LEFT_OUT]
        content = {path.name: _bytes_of(path) for path in files}
        if self._asked_to_save:
            self._asked_to_save = False
            shutil.rmtree(directory)
        self._checkpoint.save(content)

    def _check_metric(self) -> None:
        if self._others and not self._has_reported:
            raise TunerError(
                f"tuner.callbacks.Transformers needs the metric {self._monitor!r}, which compute_metrics is to return,"
                f" got: {', '.join(sorted(self._others))}"
            )


def _bytes_of(path: Path) -> Tensor:
    return torch.from_numpy(np.frombuffer(path.read_bytes(), dtype=np.uint8).copy())
