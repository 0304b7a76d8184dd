"""One attempt at a trial: train, report, prune, and say how it ended."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import optuna
import torch
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError
from torch import nn

from storage.database.engine import is_outage
from storage.database.errors import LeaseLostError, StorageError, StudyHaltedError, UnreachableError
from storage.files import UntrustedError, own_directory
from tuner import training
from tuner.data import BROKEN_ERRNOS, Data, DataError
from tuner.errors import BrokenDeviceError, ObjectiveError, TunerError, first_line, is_debugging
from tuner.objective import Objective
from tuner.seeds import seed_everything, set_deterministic
from tuner.slot.checked_trial import CheckedTrial, InvalidReportError
from tuner.slot.curve import Curve
from tuner.slot.doubles import check_doubles
from tuner.slot.own_loop import OwnLoop
from tuner.slot.read_params import ReadParams
from tuner.slot.threads import Threads
from tuner.slot.where import with_line
from tuner.spec import Spec, TrainingSpec
from tuner.study.registry import FunctionObjective
from tuner.training import Interrupted
from tuner.training.batches import place
from tuner.training.checkpoint import Checkpoint, Shared
from tuner.training.devices import memory_of
from tuner.training.loaders import DeadReaderError
from tuner.training.memory import free_memory, is_out_of_memory
from tuner.training.overlap import overlaps
from tuner.training.record import OWN_NAMES, Record

if TYPE_CHECKING:
    from torchmetrics import Metric

    from tuner.slot.kept_model import KeptModel

FailureClass: TypeAlias = Literal["nan", "oom", "user_error", "infrastructure"]

MAX_MESSAGE_CHARS = 2000
_BY_THE_TRIAL = ("device-side assert",)  # an index out of range, as a rule
_DEVICE_ERRORS = (
    "CUDA error:",
    "CUDA driver error",
    "Triton Error [CUDA]",
    "cuDNN error",
    "CUDNN_STATUS_",
    "CUBLAS_STATUS_",
    "HIP error:",
)
# What libraries that allocate by themselves say, of a full device as of a broken one.
_OUT_OF_MEMORY_IF_FULL = ("CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR")
_FULL_BELOW = 0.05
"""The part of a device's memory below which it is full: such libraries want some hundred megabytes."""


_APART = (
    *("budget", "history", "retry", "sampler", "pruner", "audit", "checkpoints", "checkpoint_every_s"),
    *("trial_timeout_s", "watchdog"),
)
"""The settings of a study that no training follows from."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended: the trial's state and value, and the attributes to record with it.

    `is_poisoned` if this process can use its device no more. `error` is then what the trial failed by: what its frames
    hold must not be freed, as torch ends the process (SIGABRT) where that needs the device.
    """

    state: TrialState
    value: float | None = None
    attrs: dict[str, Any] = field(default_factory=dict)
    is_poisoned: bool = False
    error: BaseException | None = field(default=None, repr=False, compare=False)
    kept: KeptModel | bytes | None = field(default=None, repr=False, compare=False)
    """The model that a plain function gave to keep."""

    @property
    def failure(self) -> FailureClass | None:
        """The class of what the attempt failed by; a metric may be called so too."""
        failure: FailureClass | None = self.attrs.get("failure") if self.state == TrialState.FAIL else None
        return failure

    @property
    def message(self) -> str:
        """What the attempt failed by."""
        return str(self.attrs.get("failure_message", ""))


@dataclass(frozen=True, kw_only=True)
class TrialObjective:
    """What a slot runs for each trial: an objective with its data where it is trained on, or a plain function.

    `identical` names two splits of the same rows, if there are any.

    `checkpoints` is the directory for those of the study's trials, None for none; `shared` is where other machines
    find that of the trial at hand. `threads` are this process's. `log` takes a line for people.
    """

    spec: Spec
    objective: Objective | FunctionObjective
    device: torch.device
    data: Data | None = None
    identical: tuple[str, str] | None = None
    checkpoints: Path | None = None
    shared: Shared | None = None
    threads: Threads = field(default_factory=Threads)
    log: Callable[[str], None] = lambda _: None

    @classmethod
    def load(
        cls,
        spec: Spec,
        objective: Objective | FunctionObjective,
        data_dir: Path,
        device: torch.device,
        *,
        data: Data | None = None,
        share: float = 1.0,
        checkpoints: Path | None = None,
        log: Callable[[str], None] = lambda _: None,
    ) -> TrialObjective:
        """Load the objective's train and valid data once, onto the device if it fits. The test split stays behind.

        `data` are what it has loaded already. `share` is the part of the device that others leave.

        Raises TunerError that says what is wrong with the data, BrokenDeviceError.
        """
        if not isinstance(objective, Objective):
            return cls(spec=spec, objective=objective, device=device, checkpoints=checkpoints, log=log)
        import torchmetrics  # noqa: F401 - its 3 s are not to count as the first trial's

        set_deterministic(spec.training.deterministic)
        name = type(objective).__name__
        try:
            if data is None:
                data = load_data(objective, data_dir, spec.training)
            check_doubles(objective, data)
            overlapping = overlaps(data)
            for overlap in overlapping:
                log(str(overlap))
            data = place(data, device, spec.training.data, log, share=share)
        except DataError as error:
            raise TunerError(f"{name}: {error}") from error
        except (RuntimeError, TypeError, MemoryError, OSError, DeadReaderError) as error:
            if _is_of_device(error):
                raise BrokenDeviceError(first_line(error)) from error
            raise TunerError(
                f"{name}: the data cannot be put on {device}: {type(error).__name__}: {first_line(error)};"
                " where memory is short, try --data stream or fewer slots"
            ) from error
        return cls(
            spec=spec,
            objective=objective,
            device=device,
            data=data,
            identical=next(((its.first, its.second) for its in overlapping if its.is_identical), None),
            checkpoints=checkpoints,
            log=log,
        )

    def checkpoint(self, number: int, params: dict[str, Any]) -> Checkpoint | None:
        """Return the checkpoint of a trial, None where none are kept.

        One that another trial left under this number, of a database that is no more, is not taken for this one's.
        """
        if self.checkpoints is None:
            return None
        apart = dict.fromkeys(_APART, True)
        if self.spec.confirms is None:  # a study of before there were confirmations goes on from its checkpoints
            apart["confirms"] = True
        of_reading = {"readers", "prefetch", "train_metrics"}  # whoever reads, the rows are the same
        fixed = self.spec.model_dump(mode="json", exclude={**apart, "training": of_reading})
        text = json.dumps([number, params, fixed], sort_keys=True, default=str)
        return Checkpoint(
            self.checkpoints / f"trial-{number}.pt",
            identity=text,
            shared=self.shared,
            every_s=self.spec.checkpoint_every_s,
            log=self.log,
        )


def run_attempt(what: TrialObjective, trial: CheckedTrial) -> Outcome:
    """Run the trial to its end and return how it ended.

    Raises Interrupted if it has to be given back, and the storage's errors if the database failed: neither is
    the trial's fault.
    """
    seed = what.spec.trial_seed(trial.number)
    seed_everything(seed)
    record = Record(what.device, seed)
    start = time.perf_counter()
    try:
        value, attrs = _run(what, trial, seed, record)
        kept = None if trial.loop is None else trial.loop.kept
        outcome = Outcome(state=TrialState.COMPLETE, value=value, attrs=attrs, kept=kept)
    except optuna.TrialPruned:
        outcome = Outcome(state=TrialState.PRUNED)
    except (Interrupted, LeaseLostError, StudyHaltedError):
        raise
    except (StorageError, SQLAlchemyError) as error:
        if is_outage(error):
            raise
        outcome = failed("user_error", f"the database refused it: {first_line(error)}")
    except training.DivergedError as error:
        outcome = failed("nan", str(error))
    except (DataError, ObjectiveError) as error:
        _show(error)
        outcome = failed("user_error", f"{type(what.objective).__name__}: {error}")
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001 - foreign code: it fails its trial alone
        _show(error)
        outcome = _by(error, what)
    always = {**record.attrs(), "seconds": round(time.perf_counter() - start, 3)}
    outcome = replace(outcome, attrs={**outcome.attrs, **always})
    if not outcome.is_poisoned and (outcome.failure == "oom" or what.device.type != "cpu"):
        try:
            free_memory()  # here the error is gone, and with it the frames that held the tensors
        except RuntimeError as error:  # of a kernel that was still running
            return replace(outcome, is_poisoned=True, error=error)
    return outcome


def check_device(device: torch.device) -> None:
    """Compute something on the device. Raises BrokenDeviceError if it cannot."""
    try:
        ones = torch.ones(16, 16, device=device)
        found = (ones @ ones).sum().item()
    except (RuntimeError, AssertionError) as error:
        raise BrokenDeviceError(f"{device} does not compute: {first_line(error)}") from error
    if found != 4096:
        raise BrokenDeviceError(f"{device} computes wrong: 16 x 16 ones multiplied sum to {found}, and not to 4096")


def warm_up(device: torch.device) -> None:
    """Have a CUDA device load what most models need, cuBLAS and cuDNN, so that no trial waits for it.

    What fails here is left to the trials that need it to tell.
    """
    if device.type != "cuda":
        return
    with suppress(RuntimeError):
        shapes = ((2, 1, 8, 8), (4, 1, 3, 3), (8, 4), (8,))
        images, kernel, weight, bias = (torch.ones(shape, device=device, requires_grad=True) for shape in shapes)
        maps = nn.functional.conv2d(images, kernel)
        nn.functional.linear(maps.mean((2, 3)), weight, bias).sum().backward()
        torch.cuda.synchronize(device)


def load_data(
    objective: Objective,
    data_dir: Path,
    training_spec: TrainingSpec = TrainingSpec(),  # noqa: B008 - frozen
) -> Data:
    """Return the objective's data, its samples to be read as the spec says, after making the directory it may write to.

    Raises TunerError that says what went wrong in its `load_data`.
    """
    name = type(objective).__name__
    try:
        own_directory(data_dir)
    except UntrustedError as error:
        raise TunerError(str(error)) from error
    except OSError:
        pass  # not all need it
    try:
        data = objective.load_data(data_dir)
    except (Exception, SystemExit) as error:
        raise TunerError(f"{name}.load_data({str(data_dir)!r}) failed: {with_line(error, objective)}") from error
    if not isinstance(data, Data):
        raise TunerError(f"{name}.load_data needs to return tuner.data.Data, got {type(data).__name__}")
    return data.read_by(training_spec.readers, training_spec.prefetch)


def _run(what: TrialObjective, trial: CheckedTrial, seed: int, record: Record) -> tuple[float, dict[str, Any]]:
    if not isinstance(what.objective, Objective):
        # Of whatever params: a function may ask for its checkpoint before it has suggested all.
        trial.loop = OwnLoop(trial, what.device, partial(what.checkpoint, trial.number, {}))
        with closing(trial.loop):
            return _checked_value(what.objective(trial)), {}
    return _train(what, what.objective, trial, seed, record)


def _train(
    what: TrialObjective, objective: Objective, trial: CheckedTrial, seed: int, record: Record
) -> tuple[float, dict[str, Any]]:
    assert what.data is not None
    metric = what.spec.metric
    objective.suggest(trial)
    params = ReadParams(trial.params)
    model = built_model(objective, params, what.device)

    def on_epoch(epoch: training.Epoch) -> None:
        what.threads.apart()
        _value_of(epoch, metric)
        record.count(model)  # lazy layers have no weights before
        record.add(epoch)
        trial.report_point(curve.point(epoch))
        if epoch.number < epochs and trial.should_prune():
            raise optuna.TrialPruned

    def check() -> None:
        trial.alive()
        trial.check()
        what.threads.batch()

    def alive() -> None:
        what.threads.apart()
        trial.alive()

    def on_resume(history: Sequence[training.Epoch]) -> None:
        record.count(model)
        for epoch in history:  # the reports of an attempt go when its trial is given back
            record.add(epoch)
            trial.report_point(curve.point(epoch))

    metrics = built_metrics(objective, what.data, metric)
    epochs = epochs_of(params, what.spec)
    curve = Curve(metric)
    history = objective.fit(
        model,
        what.data.train,
        what.data.valid,
        params,
        metrics={name: its.to(what.device) for name, its in metrics.items()},
        epochs=epochs,
        seed=seed,
        on_epoch=on_epoch,
        run=training.Run(
            options=training.Options(**what.spec.training.model_dump()),
            metric=metric,
            direction=what.spec.direction,
            may_fork=True,
            checkpoint=what.checkpoint(trial.number, trial.params),
            resumable=(Interrupted, StudyHaltedError, UnreachableError),
            check=check,
            alive=alive,
            on_resume=on_resume,
            on_compiled=record.compiled,
            log=lambda line: what.log(f"trial {trial.number}: {line}"),
        ),
    )
    if trial.number == 0 and (unread := ", ".join(params.unread)):
        what.log(f"trial 0: no method has read {unread}: a param that is read by another name, or not at all?")
    if not history:
        raise ObjectiveError("fit needs to return the epochs that ended, got none")
    for epoch in history:
        _value_of(epoch, metric)
    best = training.best_epoch(history, metric, what.spec.direction)
    others = {name: value for name, value in best.metrics.items() if name != metric}
    others["train_loss"] = best.train_loss
    # An own loop may give tensors. JSON has no NaN, and neither have the readers of these.
    numbers = {name: float(value) for name, value in others.items() if math.isfinite(value)}
    return _checked_value(best.metrics[metric]), {**numbers, "epoch": best.number, "epochs": len(history)}


def epochs_of(params: Mapping[str, Any], spec: Spec) -> int:
    """Return how many epochs a trial has: the param of this name where suggested, else as the spec says."""
    epochs = params.get("epochs", spec.epochs)
    if not isinstance(epochs, int) or epochs < 1:
        raise ObjectiveError(f"the param 'epochs' needs a whole number above 0, got {epochs!r}: use suggest_int")
    return epochs


def built_model(objective: Objective, params: dict[str, Any], device: torch.device) -> nn.Module:
    """Return the objective's model on the device. Raises ObjectiveError or DataError if it is none, or cannot be."""
    model = objective.build_model(params)
    if not isinstance(model, nn.Module):
        raise ObjectiveError(f"build_model needs to return a torch.nn.Module, got {type(model).__name__}")
    try:
        return model.to(device)
    except NotImplementedError as error:  # of a model on the device "meta", which has no weights
        raise DataError(f"build_model's model cannot be moved to {device}: {first_line(error)}") from error


def built_metrics(objective: Objective, data: Data, metric: str) -> dict[str, Metric]:
    """Return the objective's metrics. Raises ObjectiveError if they are none, or `metric` is not among them."""
    built: Any = objective.build_metrics(data)
    metrics = dict(built.items()) if isinstance(built, Mapping | nn.ModuleDict) else {"": built}
    if wrong := [type(its).__name__ for its in metrics.values() if not isinstance(its, nn.Module)]:
        raise ObjectiveError(f"build_metrics needs to return torchmetrics objects by name, got {wrong[0]}")
    _check_names(metrics)
    if metric not in metrics:
        raise ObjectiveError(
            f"build_metrics needs to return {metric!r}, the study's metric, got: {', '.join(metrics) or 'none'}"
        )
    return metrics


def _value_of(epoch: object, metric: str) -> float:
    if not isinstance(epoch, training.Epoch):
        raise ObjectiveError(f"fit needs to give tuner.training.Epoch objects, got {type(epoch).__name__}")
    if metric not in epoch.metrics:
        raise ObjectiveError(
            f"the metrics of an epoch need {metric!r}, the study's metric, got: {', '.join(epoch.metrics) or 'none'}"
        )
    _check_names(epoch.metrics)
    return epoch.metrics[metric]


def _check_names(metrics: Mapping[str, object]) -> None:
    if taken := sorted(OWN_NAMES & metrics.keys()):
        raise ObjectiveError(
            f"a metric cannot be named {taken[0]!r}, which is recorded of each trial anyway: give it another name"
        )


def _checked_value(value: object) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, str | torch.Tensor) or not hasattr(value, "__float__"):
        raise InvalidReportError(f"an objective needs to return one number, got {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise training.DivergedError(f"the objective returned {number}")
    return number


def _show(error: BaseException) -> None:
    if is_debugging():
        traceback.print_exception(error)


def _by(error: BaseException, what: TrialObjective) -> Outcome:
    """Return how an attempt ended by what its objective raised."""
    if is_out_of_memory(error) or (_may_be_out_of_memory(error) and _is_full(what.device)):
        return failed("oom", first_line(error) or "out of memory")
    message = with_line(error, what.objective)
    told = str(error)
    if not _is_of_device(error):
        broken = _found_broken(what.device)
        if broken is None:
            return failed("user_error", message)
        told = str(broken)
        message = f"{message}; afterwards {told}"
    by_trial = any(part in told for part in _BY_THE_TRIAL)
    outcome = failed("user_error" if by_trial else "infrastructure", message)
    return replace(outcome, is_poisoned=True, error=error)


def _found_broken(device: torch.device) -> BrokenDeviceError | None:
    """Return how an accelerator is broken for this process, None if it computes or has no memory to tell."""
    if device.type == "cpu":
        return None
    try:
        check_device(device)
    except BrokenDeviceError as error:
        return None if is_out_of_memory(error.__cause__ or error) else error
    return None


def _is_of_device(error: BaseException) -> bool:
    """Whether a device, a disk or a reader of samples failed, and not the trial.

    After a CUDA error no call of the process succeeds.
    """
    if isinstance(error, OSError):
        return error.errno in BROKEN_ERRNOS
    text = str(error)
    return isinstance(error, torch.AcceleratorError | DeadReaderError) or (
        isinstance(error, RuntimeError) and any(part in text for part in _DEVICE_ERRORS)
    )


def _may_be_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OUT_OF_MEMORY_IF_FULL)


def _is_full(device: torch.device) -> bool:
    if device.type == "cpu":
        return False
    try:
        free, total = memory_of(device)
    except RuntimeError:  # it is broken
        return False
    return free < _FULL_BELOW * total


def failed(kind: FailureClass, message: str) -> Outcome:
    """Return the outcome of an attempt that failed, with its message as a database can hold it."""
    text = message.replace("\0", "").encode(errors="backslashreplace").decode()
    attrs = {"failure": kind, "failure_message": text[:MAX_MESSAGE_CHARS]}
    return Outcome(state=TrialState.FAIL, attrs=attrs)
