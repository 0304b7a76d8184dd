"""For loops of one's own: what a plain function asks of tuner by its trial.

In a slot of a worker they do what they say. Under `study.optimize`, where nobody would go on with a trial, nothing is
kept, which is told once, and the device is the best there is.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

import optuna

from tuner.errors import TunerError
from tuner.slot.checked_trial import CheckedTrial
from tuner.slot.kept_model import take
from tuner.slot.own_checkpoint import TrialCheckpoint
from tuner.training import choose_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from tuner.data import Inputs
    from tuner.slot.own_loop import OwnLoop

_log = logging.getLogger(__name__)


def device(trial: optuna.trial.BaseTrial) -> torch.device:
    """Return the device that the trial's slot is for; outside of one the best that there is here."""
    if isinstance(trial, CheckedTrial):
        return _loop_of(trial, "device").device
    if not isinstance(trial, optuna.trial.BaseTrial):
        raise TunerError(f"tuner.device needs the function's trial, got {type(trial).__name__}")
    return choose_device()


def checkpoint(trial: optuna.trial.BaseTrial) -> TrialCheckpoint:
    """Return the trial's checkpoint, to `load` before the loop and to `save` within it.

    Under `study.optimize` nothing is there to be loaded and nothing is kept. Raises TunerError for a trial that does
    not run here.
    """
    loop = _running(trial, "checkpoint")
    if loop is not None:
        return loop.checkpoint
    _tell_nothing_kept("checkpoint")
    return TrialCheckpoint(None, None, choose_device())


def keep_model(
    trial: optuna.trial.BaseTrial, model: nn.Module, example_inputs: Inputs, *, class_names: Sequence[str] = ()
) -> None:
    """Keep the model as it is now, if the trial turns out to be the study's best so far; it may be trained further.

    The last call of a trial counts. `example_inputs` is a batch that the model takes, in order or by name, on its
    device, some rows of which are kept: `tuner export` makes a program of the model by them and compares it. What the
    model gives by names keeps them; what is no tensor in it is left out. `class_names` are for a model whose outputs
    are of classes, in their order. Under `study.optimize` nothing is kept. Raises TunerError for a model that cannot be
    called so or a trial that does not run here, and DivergedError for weights that are NaN or infinite.
    """
    loop = _running(trial, "keep_model")
    kept = take(model, example_inputs, class_names)
    if loop is not None:
        loop.kept = kept
    else:
        _tell_nothing_kept("keep_model")


def _running(trial: Any, name: str) -> OwnLoop | None:
    """Return what the trial's slot has for it, None under `study.optimize`. Raises TunerError if it does not run."""
    if isinstance(trial, CheckedTrial):
        return _loop_of(trial, name)
    if not isinstance(trial, optuna.Trial):
        raise TunerError(
            f"tuner.{name} needs the trial that a function is given while it runs, got {type(trial).__name__}:"
            " 'tuner run', 'tuner worker' and study.optimize give one"
        )
    if trial.study._storage.get_trial(trial._trial_id).state.is_finished():
        raise TunerError(f"tuner.{name} needs a trial that runs, and trial {trial.number} has ended")
    return None


def _loop_of(trial: CheckedTrial, name: str) -> OwnLoop:
    if trial.loop is None:
        raise TunerError(
            f"tuner.{name} is for plain functions: an Objective's model, device and checkpoints are seen to, and"
            " its fit gets them as model and run"
        )
    if not trial.loop.is_here():
        raise TunerError(
            f"tuner.{name} needs the trial that runs now, in the process that runs it, and trial {trial.number} does"
            " not: ask before other processes are started, and while the function runs"
        )
    return trial.loop


@cache
def _tell_nothing_kept(name: str) -> None:
    """Tell it once a process."""
    _log.warning("tuner.%s keeps nothing outside of tuner's workers: 'tuner run file.py:FUNCTION' starts some", name)
