"""Train one model and evaluate it. Knows nothing of Optuna or of a database."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tuner.caches import compiled_directory
from tuner.data import Rows
from tuner.errors import ObjectiveError
from tuner.seeds import derive_seed
from tuner.spec import CompileBackend, CompileMode, DataPlace, Direction, Precision
from tuner.training.batches import Batches, batches_of
from tuner.training.checked_step import By
from tuner.training.checkpoint import Checkpoint, State, generator_states, set_generator_states
from tuner.training.compile_aside import Aside, can_compile_aside
from tuner.training.compiled import load_state, state_of
from tuner.training.compiling import Gain
from tuner.training.devices import current
from tuner.training.evaluation import Evaluation, Predictions, device_of
from tuner.training.schedules import Rates, Schedule
from tuner.training.steps import Loss, Step, materialize, matrix_products

if TYPE_CHECKING:
    from torchmetrics import Metric

CHECKED_EVERY = 16
"""After how many batches a loss on a CUDA device is looked at."""


class DivergedError(ArithmeticError):
    """The training loss became NaN or infinite."""


class Interrupted(Exception):  # noqa: N818 - not an error: a request, like KeyboardInterrupt
    """Raised by a callback of a training to end it here, to be resumed from its checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to train, whatever the objective. `channels_last` None: for models with 2-d convolutions on CUDA.

    Training ends `patience` epochs after the best one so far. With `train_metrics` the training split is evaluated
    after each epoch as the validation split is: in eval mode, and as it is read, with whatever is random in that.
    `data`, `readers`, `prefetch` and `deterministic` are seen to before, by `tuner.training.batches.place`,
    `tuner.data.Data.read_by` and `tuner.seeds.set_deterministic`.
    """

    precision: Precision = "fp32"
    compile: bool = False
    compile_mode: CompileMode = "default"
    compile_backend: CompileBackend = "inductor"
    cuda_graphs: bool = False
    channels_last: bool | None = None
    deterministic: bool = False
    patience: int | None = None
    data: DataPlace = "auto"
    readers: int | None = None
    prefetch: int | None = None
    train_metrics: bool = False


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch gave: its number, counted from 1; the mean training loss over its rows; and each metric
    over the whole validation split (empty without one), and over the training split (where that is asked for). `rows`
    is how many were trained on, `train_s` how long that took, `wait_s` of it waiting for rows to be read, `evaluate_s`
    how long the evaluation took. `rates` are the learning rates that it was trained with, which `follow_metric` if the
    schedule does."""

    number: int
    train_loss: float
    metrics: Mapping[str, float]
    train_metrics: Mapping[str, float] = field(default_factory=dict)
    rates: Rates = ()
    follow_metric: bool = False
    rows: int = 0
    train_s: float = field(default=0.0, compare=False)
    wait_s: float = field(default=0.0, compare=False)
    evaluate_s: float = field(default=0.0, compare=False)


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training as its caller sees it: how to train, what to watch, and what to call meanwhile.

    `metric` and `direction` say which epoch is best, for `patience`. Training ends after the epoch `until` of the
    schedule's; `rates`, of each epoch, are what one that follows a metric gave before, and gives again. `check` is
    called before each batch, and ends the training by what it raises; `alive` before each batch of an evaluation.
    Where this process `may_fork` the step is compiled by a fork while it trains, unless it is deterministic.
    With a `checkpoint` the training goes on where it was saved; `on_resume` is called once with the epochs that had
    ended then, `on_compiled` at the end with what compiling gained, if anything was compiled. What is `resumable` and
    raised by a callback has the checkpoint written before it passes through. `log` takes a line for people.
    """

    options: Options = Options()
    metric: str | None = None
    direction: Direction = "maximize"
    until: int | None = None
    rates: Sequence[Sequence[float]] = ()
    may_fork: bool = False
    checkpoint: Checkpoint | None = None
    resumable: tuple[type[Exception], ...] = (Interrupted,)
    check: Callable[[], None] = _nothing
    alive: Callable[[], None] = _nothing
    on_resume: Callable[[Sequence[Epoch]], None] = _nothing
    on_compiled: Callable[[Gain], None] = _nothing
    log: Callable[[str], None] = _nothing


def fit(
    model: nn.Module,
    train: Rows,
    valid: Rows | None = None,
    *,
    optimizer: Optimizer,
    loss: Loss,
    metrics: Mapping[str, Metric],
    epochs: int,
    batch_size: int,
    seed: int,
    scheduler: LRScheduler | None = None,
    max_grad_norm: float | None = None,
    predictions: Predictions | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    run: Run = Run(),
) -> list[Epoch]:
    """Train `model` in place and return one `Epoch` for each epoch that ended.

    Model, splits and metrics are on one device already; samples are read and copied to it as needed. `loss` gets
    what the model returns and the targets, metrics get `predictions` of what it returns. The order of the rows
    follows `seed` alone. `scheduler` is stepped once an epoch. `on_epoch` is called after each epoch's evaluation;
    whatever it raises ends the training and passes through, which is how a caller prunes.

    Raises DivergedError if the loss became NaN or infinite, at the end of the epoch at the latest, DataError if
    model and data are on different devices, and ObjectiveError if the loss, a metric or a setting cannot be used.
    """
    if not _is_whole(batch_size) or batch_size < 1:
        raise ObjectiveError(f"batch_size needs a whole number above 0, got {batch_size!r}")
    batch_size = int(batch_size)  # torch splits by no other
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ObjectiveError(f"max_grad_norm needs a number above 0, or None for no clipping, got {max_grad_norm!r}")
    device = device_of(model, train)
    if isinstance(loss, nn.Module):
        loss.to(device)  # class weights
    materialize(model, train)
    options = run.options
    channels_last = _wants_channels_last(model, device) if options.channels_last is None else options.channels_last
    if channels_last:
        model.to(memory_format=torch.channels_last)
    compiled = By(backend=options.compile_backend, mode=options.compile_mode) if options.compile else None
    step = Step(
        model,
        loss,
        optimizer,
        device,
        precision=options.precision,
        max_grad_norm=max_grad_norm,
        channels_last=channels_last,
        compiled=compiled,
        aside=None if compiled is None else _aside(compiled, device, run),
        cuda_graphs=options.cuda_graphs,
        log=run.log,
        alive=run.alive,
    )
    training = _Training(model, train, optimizer, scheduler, step, device, batch_size=batch_size, seed=seed, run=run)
    evaluation, on_train = (
        None
        if rows is None
        else Evaluation(
            model,
            rows,
            device,
            at_least=batch_size,
            predictions=predictions,
            precision=options.precision,
            alive=run.alive,
            log=run.log,
        )
        for rows in (valid, train if options.train_metrics and valid is not None else None)
    )
    with ExitStack() as stack:
        stack.enter_context(current(device))
        stack.enter_context(matrix_products(options.precision))
        for opened in (run.checkpoint, training, evaluation, on_train):
            if opened is not None:
                stack.callback(opened.close)
        stack.callback(training.tell_gain)
        try:
            training.resume()
            last = epochs if run.until is None else min(epochs, run.until)
            while len(training.history) < last and not training.has_stalled():
                trained = training.train_epoch()
                started_at = time.perf_counter()
                train_values = {} if on_train is None else on_train.metrics(metrics)
                values = {} if evaluation is None else evaluation.metrics(metrics)
                seconds = time.perf_counter() - started_at
                epoch = dataclasses.replace(trained, metrics=values, train_metrics=train_values, evaluate_s=seconds)
                training.end_epoch(epoch)
                if on_epoch is not None:
                    on_epoch(epoch)
        except run.resumable:
            training.save(last=True)
            raise
    return training.history


class _Training:
    """A training under way: the loop over an epoch's batches, and all that a checkpoint holds of it."""

    def __init__(
        self,
        model: nn.Module,
        train: Rows,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        step: Step,
        device: torch.device,
        *,
        batch_size: int,
        seed: int,
        run: Run,
    ) -> None:
        self.history: list[Epoch] = []
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._schedule = Schedule(scheduler, optimizer, run.rates, run.log)
        self._step = step
        self._device = device
        self._batch_size = batch_size
        self._seed = seed
        self._run = run
        self._n_rows = len(train)
        self._batches: Batches = batches_of(train, batch_size, device)
        self._generator = torch.Generator(self._batches.order_device).manual_seed(seed)
        self._order_state = self._generator.get_state()  # as it was before this epoch's order was drawn
        self._n_done = 0  # batches of this epoch
        self._losses = RunningLoss(device)

    def train_epoch(self) -> Epoch:
        """Train on all rows once, or on what is left of an epoch that was interrupted; metrics are still empty.

        Raises DivergedError, and whatever `run.check` raises.
        """
        number = len(self.history) + 1
        checkpoint = self._run.checkpoint
        started_at, waited_s = time.perf_counter(), self._batches.waited_s
        rates = self._schedule.start_epoch(number)
        self._model.train()
        if self._step.compiling is not None:
            self._step.compiling.start_epoch()
        for batch in self._batches.shuffled(self._order(), self._n_done, derive_seed(self._seed, "epoch", number)):
            self._run.check()
            # Before a step, so that resuming makes one before the epoch ends: torch warns of a schedule stepped first.
            if checkpoint is not None and checkpoint.is_due():
                self.save()
            self._losses.add(self._step(batch), batch.n_rows)
            self._n_done += 1
            if self._losses.is_broken():
                break
        train_loss = self._losses.mean()
        if not math.isfinite(train_loss):
            raise DivergedError(f"the training loss is {train_loss} in epoch {number}")
        if self._step.compiling is not None:
            self._step.compiling.end_epoch()
        return Epoch(
            number=number,
            train_loss=train_loss,
            metrics={},
            rates=rates,
            follow_metric=self._schedule.follows_metric,
            rows=self._losses.rows,
            train_s=time.perf_counter() - started_at,
            wait_s=self._batches.waited_s - waited_s,
        )

    def tell_gain(self) -> None:
        """Tell what compiling gained, or that it came too late."""
        compiling = self._step.compiling
        if compiling is None:
            return
        if (line := compiling.told()) is not None:
            self._run.log(line)
        if (gain := compiling.gain()) is not None:
            self._run.on_compiled(gain)

    def close(self) -> None:
        """End the processes that read the rows, and let go of what was compiled."""
        self._batches.close()
        self._step.close()

    def end_epoch(self, epoch: Epoch) -> None:
        """Take the epoch into the history, and step the schedule."""
        self._schedule.end_epoch(epoch.number, epoch.train_loss, epoch.metrics.get(self._run.metric or ""))
        self.history.append(epoch)
        self._n_done = 0
        self._losses = RunningLoss(self._device)
        self._order_state = self._generator.get_state()
        if self._run.checkpoint is not None and self._run.checkpoint.is_due():
            self.save()

    def has_stalled(self) -> bool:
        """Whether the best epoch is `patience` epochs ago."""
        patience, metric = self._run.options.patience, self._run.metric
        if patience is None or metric is None or not self.history or metric not in self.history[-1].metrics:
            return False
        return len(self.history) - best_epoch(self.history, metric, self._run.direction).number >= patience

    def save(self, *, last: bool = False) -> None:
        """Save a checkpoint, if there is a place for it; `last` if the training ends here for now."""
        if self._run.checkpoint is None:
            return
        self._run.checkpoint.save(
            {
                "model": state_of(self._model),
                "optimizer": self._optimizer.state_dict(),
                "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
                "scaler": self._step.scaler.state_dict(),
                "generators": generator_states(self._device),
                "order": self._order_state,
                "order_device": self._generator.device.type,
                "history": [dataclasses.asdict(epoch) for epoch in self.history],
                "n_done": self._n_done,
                "loss_sum": self._losses.sum,
                "rows": self._losses.rows,
            },
            (len(self.history), self._n_done),
            last=last,
        )

    def resume(self) -> None:
        """Go on where the checkpoint was saved, if there is one of this model."""
        state = None if self._run.checkpoint is None else self._run.checkpoint.load()
        if state is None:
            return
        if not _fits(self._model, state):
            self._run.log("the checkpoint is of another model, starting again")
            return
        load_state(self._model, state["model"])
        _load_optimizer(self._optimizer, state["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        if state["scaler"]:  # a device without one saves nothing
            self._step.scaler.load_state_dict(state["scaler"])
        self.history.extend(Epoch(**epoch) for epoch in state["history"])
        self._n_done = state["n_done"]
        self._losses = RunningLoss(self._device, state["loss_sum"], state["rows"])
        if state["order_device"] == self._generator.device.type:
            self._generator.set_state(state["order"])
        else:
            self._generator.manual_seed(derive_seed(self._seed, "order", len(self.history)))
            self._run.log("the checkpoint is of another kind of device, the order of the rows is another from here on")
        self._order_state = self._generator.get_state()
        set_generator_states(state["generators"], self._device)
        self._run.log(f"resumed after epoch {len(self.history)}, batch {self._n_done}")
        self._run.on_resume(self.history)

    def _order(self) -> Tensor:
        order = torch.randperm(self._n_rows, generator=self._generator, device=self._generator.device)
        if self._n_rows > self._batch_size > 1 == self._n_rows % self._batch_size:
            return order[:-1]  # batch norm has no variance of one row; the next epoch shuffles anew
        return order


class RunningLoss:
    """The sum of an epoch's losses over its rows; it stays on the device, and `mean` is the one wait for it."""

    def __init__(self, device: torch.device, start: Tensor | float = 0.0, rows: int = 0) -> None:
        self.sum = torch.zeros((), device=device) + start
        self.rows = rows
        # What the host sees of the sum: itself on a CPU, a copy from some batches ago on a CUDA device.
        self._copied: torch.cuda.Event | None = None
        self._seen = self.sum if device.type == "cpu" else torch.zeros(())
        if device.type == "cuda":
            self._seen, self._copied = _seen_on_host(device)
            self._copied.synchronize()  # an earlier epoch's
            self._seen.zero_()
        self._value = self._seen.numpy()
        self._n_batches = 0

    def add(self, loss: Tensor, rows: int) -> None:
        """Add the mean loss of one batch."""
        self.sum.add_(loss, alpha=rows)
        self.rows += rows

    def is_broken(self) -> bool:
        """Whether the sum is known to be NaN or infinite, without waiting for the device to tell."""
        if self._copied is not None:
            self._n_batches += 1
            if self._n_batches % CHECKED_EVERY or not self._copied.query():
                return False
            broken = not math.isfinite(self._value.item())
            self._seen.copy_(self.sum, non_blocking=True)
            self._copied.record()
            return broken
        return not math.isfinite(self._value.item())

    def mean(self) -> float:
        """Return the mean loss over the rows, waiting for the device."""
        return self.sum.item() / self.rows


@functools.cache
def _seen_on_host(_: torch.device) -> tuple[Tensor, torch.cuda.Event]:
    """Return a pinned number for a device, and the event of the last copy to it, as long as the process lives.

    To free pinned memory is a call to the device, and one that failed then ends the process (pytorch issue 178154).
    """
    return torch.zeros((), pin_memory=True), torch.cuda.Event()


def best_epoch(history: Sequence[Epoch], metric: str, direction: Direction) -> Epoch:
    """Return the epoch with the best value of `metric`, the earliest of equals; NaN is never better."""
    sign = 1 if direction == "maximize" else -1

    def goodness(epoch: Epoch) -> tuple[float, int]:
        value = sign * epoch.metrics[metric]
        return (-math.inf if math.isnan(value) else value, -epoch.number)

    return max(history, key=goodness)


def _is_whole(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)  # NumPy's as well


def _aside(compiled: By, device: torch.device, run: Run) -> Aside | None:
    """Return what compiles beside the training; None where that waits for the compiler, after its first epoch.

    With deterministic algorithms it does, as which epoch is the first compiled one would depend on who is faster.
    """
    directory = compiled_directory()
    if not run.may_fork or run.options.deterministic or directory is None or not can_compile_aside(device, compiled):
        return None
    return Aside(directory)


def _wants_channels_last(model: nn.Module, device: torch.device) -> bool:
    return device.type == "cuda" and any(isinstance(module, nn.Conv2d) for module in model.modules())


def _fits(model: nn.Module, state: State) -> bool:
    wanted = {name: tensor.shape for name, tensor in state_of(model).items()}
    return wanted == {name: tensor.shape for name, tensor in state["model"].items()}


def _load_optimizer(optimizer: Optimizer, state: State) -> None:
    """Load the state, but keep how it is computed and how it lies in memory, which depend on the device.

    Fused kernels walk through a weight and its moments side by side: moments that lie otherwise, as those of
    convolutions from another kind of device do, would be mixed up.
    """
    how = ("fused", "foreach", "capturable")
    kept = [{name: group[name] for name in how if name in group} for group in optimizer.param_groups]
    groups = [{**group, **flags} for group, flags in zip(state["param_groups"], kept, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for param, its_state in optimizer.state.items():
        for name, value in its_state.items():
            if isinstance(value, Tensor) and value.shape == param.shape and value.stride() != param.stride():
                its_state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)
