"""One attempt at a trial: train, report, prune, and say how it ended."""

from __future__ import annotations

import inspect
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import optuna
import torch
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError
from torch import nn

from storage.engine import is_outage
from storage.errors import LeaseLostError, StorageError, StudyHaltedError
from tuner import training
from tuner.data import Data
from tuner.errors import TunerError
from tuner.objective import Objective
from tuner.registry import FunctionObjective
from tuner.seeds import derive_seed, seed_everything
from tuner.spec import Spec

FailureClass: TypeAlias = Literal["nan", "oom", "user_error"]

MAX_MESSAGE_CHARS = 2000
MAX_STEP = 2**31 - 1  # a PostgreSQL integer


class Interrupted(Exception):  # noqa: N818 - not an error: a request, like KeyboardInterrupt
    """The attempt has to end now: the worker was asked to stop, or the lease on the trial was lost."""


class InvalidReportError(ValueError):
    """An objective reported or returned what a study cannot hold."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended: the trial's state and value, and the attributes to record with it."""

    state: TrialState
    value: float | None = None
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrialObjective:
    """What a slot runs for each trial: an objective with its data on the device, or a plain function."""

    spec: Spec
    objective: Objective | FunctionObjective
    device: torch.device
    data: Data | None = None

    @classmethod
    def load(
        cls, spec: Spec, objective: Objective | FunctionObjective, data_dir: Path, device: torch.device
    ) -> TrialObjective:
        """Load the objective's train and valid data once, onto the device. The test split stays behind."""
        if not isinstance(objective, Objective):
            return cls(spec=spec, objective=objective, device=device)
        import torchmetrics  # noqa: F401 - its 3 s are not to count as the first trial's

        data = load_data(objective, data_dir)
        resident = Data(data.train.to(device), data.valid.to(device), data.test, data.class_names)
        return cls(spec=spec, objective=objective, device=device, data=resident)


class CheckedTrial(optuna.Trial):
    """A trial that refuses what the database cannot hold, and that `check` can interrupt at each report."""

    def __init__(self, study: optuna.Study, trial_id: int, check: Callable[[], None]) -> None:
        super().__init__(study, trial_id)
        self._check = check

    def report(self, value: float, step: int) -> None:
        """Report as Optuna does.

        Raises Interrupted, DivergedError for NaN or infinity, InvalidReportError for a bad step.
        """
        self._check()
        if not 0 <= step <= MAX_STEP:
            raise InvalidReportError(f"a step needs to be in 0..{MAX_STEP}, got {step}")
        if not math.isfinite(float(value)):
            raise training.DivergedError(f"the reported value is {value} at step {step}")
        super().report(value, step)


def run_attempt(what: TrialObjective, trial: CheckedTrial) -> Outcome:
    """Run the trial to its end and return how it ended.

    Raises Interrupted if it has to be given back, and the storage's errors if the database failed: neither is
    the trial's fault.
    """
    seed = derive_seed(what.spec.seed, "trial", trial.number)
    seed_everything(seed)
    start = time.perf_counter()
    try:
        value, attrs = _run(what, trial, seed)
        outcome = Outcome(state=TrialState.COMPLETE, value=value, attrs=attrs)
    except optuna.TrialPruned:
        outcome = Outcome(state=TrialState.PRUNED)
    except (Interrupted, LeaseLostError, StudyHaltedError):
        raise
    except (StorageError, SQLAlchemyError) as error:
        if is_outage(error):
            raise
        outcome = _failed("user_error", f"the database refused it: {_first_line(error)}")
    except training.DivergedError as error:
        outcome = _failed("nan", str(error))
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        outcome = _failed("oom", str(error) or "out of memory")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code: what it raises fails its trial alone
        outcome = _failed("user_error", with_line(error, what.objective))
    always = {"seed": seed, "device": str(what.device), "seconds": round(time.perf_counter() - start, 3)}
    return Outcome(state=outcome.state, value=outcome.value, attrs={**outcome.attrs, **always})


def load_data(objective: Objective, data_dir: Path) -> Data:
    """Return the objective's data. Raises TunerError that says what went wrong in its `load_data`."""
    name = type(objective).__name__
    try:
        data = objective.load_data(data_dir)
    except (Exception, SystemExit) as error:
        raise TunerError(f"{name}.load_data({str(data_dir)!r}) failed: {with_line(error, objective)}") from error
    if not isinstance(data, Data):
        raise TunerError(f"{name}.load_data needs to return tuner.data.Data, got {data!r}: check its return")
    return data


def best_epoch(history: list[training.Epoch], metric: str, direction: str) -> training.Epoch:
    """Return the epoch with the best value of `metric`, the earliest of equals. Raises InvalidReportError."""
    if not history:
        raise InvalidReportError("fit needs to return the epochs that ended, got none")
    sign = 1 if direction == "maximize" else -1
    return max(history, key=lambda epoch: (sign * epoch.metrics[metric], -epoch.number))


def with_line(error: BaseException, objective: Objective | FunctionObjective) -> str:
    """Describe the error with the last line of the objective's own file that it passed, if it passed any."""
    try:
        file = inspect.getfile(type(objective) if isinstance(objective, Objective) else objective)
    except TypeError:
        file = ""  # a callable object, such as a functools.partial
    frames = traceback.extract_tb(error.__traceback__)
    place = ([frame for frame in frames if frame.filename == file] or frames)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"


def _run(what: TrialObjective, trial: CheckedTrial, seed: int) -> tuple[float, dict[str, Any]]:
    if not isinstance(what.objective, Objective):
        return _checked_value(what.objective(trial)), {}
    return _train(what, what.objective, trial, seed)


def _train(what: TrialObjective, objective: Objective, trial: CheckedTrial, seed: int) -> tuple[float, dict[str, Any]]:
    assert what.data is not None
    metric = what.spec.metric
    objective.suggest(trial)
    params = trial.params
    model = objective.build_model(params)
    if not isinstance(model, nn.Module):
        raise InvalidReportError(f"build_model needs to return a torch.nn.Module, got {model!r}")
    model.to(what.device)

    def on_epoch(epoch: training.Epoch) -> None:
        trial.report(epoch.metrics[metric], epoch.number)
        if epoch.number < what.spec.epochs and trial.should_prune():
            raise optuna.TrialPruned

    metrics = {name: its.to(what.device) for name, its in objective.build_metrics(what.data).items()}
    if metric not in metrics:
        raise InvalidReportError(
            f"build_metrics needs to return {metric!r}, the study's metric, got: {', '.join(metrics) or 'none'}"
        )
    history = objective.fit(
        model,
        what.data.train,
        what.data.valid,
        params,
        metrics=metrics,
        epochs=what.spec.epochs,
        seed=seed,
        on_epoch=on_epoch,
    )
    best = best_epoch(history, metric, what.spec.direction)
    # JSON has no NaN, and neither have the readers of these.
    others = {name: value for name, value in best.metrics.items() if name != metric and math.isfinite(value)}
    attrs = {**others, "epoch": best.number, "epochs": len(history), "train_loss": best.train_loss}
    return _checked_value(best.metrics[metric]), attrs


def _checked_value(value: object) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, str | torch.Tensor) or not hasattr(value, "__float__"):
        raise InvalidReportError(f"an objective needs to return one number, got {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise training.DivergedError(f"the objective returned {number}")
    return number


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _failed(kind: FailureClass, message: str) -> Outcome:
    attrs = {"failure": kind, "failure_message": message.replace("\0", "")[:MAX_MESSAGE_CHARS]}
    return Outcome(state=TrialState.FAIL, attrs=attrs)
