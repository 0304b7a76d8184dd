"""A callback of Lightning's Trainer that reports, prunes and keeps checkpoints."""

from __future__ import annotations

import functools
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import optuna
import torch

from tuner import loops
from tuner.errors import TunerError, first_line
from tuner.slot.own_checkpoint import TrialCheckpoint
from tuner.training import DivergedError
from tuner.training.checkpoint import set_generator_states

try:
    from lightning.pytorch import Callback, Trainer
except ModuleNotFoundError as _error:
    raise TunerError(
        f"tuner.callbacks.Lightning needs lightning, got no {_error.name}: pip install 'tuner[lightning]'"
    ) from _error

_FILE = "trainer.ckpt"
_fit = Trainer.fit


@functools.wraps(_fit)
def _fit_on_one_device(trainer: Any, *args: Any, **options: Any) -> Any:
    """Raise TunerError for a Trainer of several devices that trains a trial, which has one.

    No callback is asked before `fit` has started a process for each device: this very program again, as a worker or as
    the run of a study.
    """
    if trainer.world_size > 1 and any(isinstance(each, Lightning) for each in trainer.callbacks):
        raise TunerError(f"a trial has one device, got a Trainer of {trainer.world_size}: give it devices=1")
    return _fit(trainer, *args, **options)


Trainer.fit = _fit_on_one_device  # type: ignore[method-assign, assignment, unused-ignore]


class Lightning(Callback):  # type: ignore[misc, unused-ignore]  # of any type where Lightning is not installed
    """Reports a metric after each validation, prunes the trial, and saves the Trainer's state after each epoch.

        callback = tuner.callbacks.Lightning(trial, "val_acc")
        trainer = Trainer(max_epochs=5, callbacks=[callback])
        trainer.fit(model, data, ckpt_path=callback.ckpt_path)

    `ckpt_path` is None until there is something to go on from, as after a worker was lost; without it the trial is
    trained anew then. The step of a report is the epoch, from 0. The Trainer trains on one device.
    """

    def __init__(self, trial: optuna.Trial, monitor: str) -> None:
        super().__init__()
        self._trial = trial
        self._monitor = monitor
        self._checkpoint: TrialCheckpoint = loops.checkpoint(trial)
        self._device = loops.device(trial)
        self._generators: dict[str, Any] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="tuner-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._path: str | None = None
        self._is_loaded = False

    @property
    def ckpt_path(self) -> str | None:
        """The file that `Trainer.fit` goes on from, as its `ckpt_path`; None if the trial begins.

        It was read without unpickling code, and is as good as what Lightning writes itself.
        """
        if not self._is_loaded:
            self._is_loaded = True
            state = self._checkpoint.load_all()
            if state is not None:
                self._generators = state["generators"]
                path = self._folder / _FILE
                torch.save(state["own"], path)
                self._path = str(path)
        return self._path

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002 - as Lightning calls it
        """Have the random generators go on where they were: after this the order of the rows is drawn."""
        if self._generators is not None:
            set_generator_states(self._generators, self._device)
            self._generators = None

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Report, and raise TrialPruned."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(self._monitor)
        if value is None:
            found = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise TunerError(
                f"tuner.callbacks.Lightning needs the metric {self._monitor!r}, which validation_step is to log,"
                f" got: {found}"
            )
        step = trainer.current_epoch
        number = float(value)
        if number != number:
            raise DivergedError(f"{self._monitor} is NaN in epoch {step}")
        self._trial.report(number, step)
        if self._trial.should_prune():
            raise optuna.TrialPruned(f"pruned in epoch {step}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Save the Trainer's state if it is time; a trial that is to be given back ends here."""
        if not self._checkpoint.is_due():
            return
        path = self._folder / _FILE
        trainer.save_checkpoint(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise TunerError(
                "the Trainer's checkpoint has something in it that is neither tensor nor number nor text, such as a"
                f" hyperparameter (save_hyperparameters(ignore=[...])): {first_line(error)}"
            ) from error
        self._checkpoint.save(state)
