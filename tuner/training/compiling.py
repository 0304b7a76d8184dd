"""The steps of a training compiled: when, how it is made sure that they are the same, and what that gained."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tuner.data import Batch
from tuner.errors import first_line
from tuner.spec import CompileBackend, CompileMode
from tuner.training.checkpoint import generator_states, set_generator_states
from tuner.training.whole_step import ChangedError, WholeStep, why_not_whole

STEP, MODEL = "the whole step", "model and loss"
SKIPPED = 2
"""Steps that are not timed after a change of what runs: libraries choose their algorithms in the first ones."""
MAX_LOSS_ERROR, MAX_CHANGE_ERROR = 0.02, 0.5
"""How far a compiled step may be from the same one uncompiled, as parts of the loss and of what the step changes.

That is far more than rounding, whose noise a first update by Adam magnifies; what a compiler gets wrong is more still.
"""
BEAT_S, BEATS = 5.0, 360
"""How often it is told that a compilation goes on, and for how long that is believed: half an hour."""

Forward = Callable[[Any, Any], Tensor]
"""The mean loss of (inputs, targets)."""


@dataclass(frozen=True, kw_only=True)
class By:
    """What compiles, and how thoroughly."""

    backend: CompileBackend = "inductor"
    mode: CompileMode = "default"

    def compiled(self, function: Forward, *, whole: bool = False) -> Forward:
        """Return the function, which is compiled once it is called. What is random in it is drawn as uncompiled."""
        how: dict[str, Any] = {"backend": self.backend, "fullgraph": whole}
        if self.backend == "inductor":
            # Graphs are for --cuda-graphs. Random numbers of inductor's own would be others, and are slow on a CPU.
            how["options"] = {"triton.cudagraphs": False, "fallback_random": True}
            if self.mode == "max-autotune":
                modes: Any = torch._inductor
                how["options"] = {**modes.list_mode_options("max-autotune-no-cudagraphs"), **how["options"]}
        torch.compiler.reset()  # or it stops after 8 models of a process, as all are called by the same code
        compiled: Forward = torch.compile(function, **how)
        return compiled


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What compiling gave one training: seconds a step before and after, None where no step was timed."""

    what: str
    compile_s: float
    before_s: float | None
    after_s: float | None
    n_steps: int
    """Steps that were taken after."""

    def __str__(self) -> str:
        if self.before_s is None or self.after_s is None:
            return f"--compile: {self.what} was compiled in {self.compile_s:.1f} s, and ran too little to say its gain"
        saved_s = self.n_steps * (self.before_s - self.after_s) - self.compile_s
        return (
            f"--compile: a step took {1000 * self.before_s:.3g} ms, and {1000 * self.after_s:.3g} ms with {self.what}"
            f" compiled, x {self.before_s / self.after_s:.2f}, for {self.n_steps} steps; compiling took"
            f" {self.compile_s:.1f} s, {abs(saved_s):.1f} s {'saved' if saved_s > 0 else 'lost'} in all"
        )

    def attrs(self) -> dict[str, Any]:
        """Return what is recorded of it with a trial."""
        found = {"step_ms_uncompiled": self.before_s, "step_ms_compiled": self.after_s}
        told = {name: round(1000 * value, 4) for name, value in found.items() if value is not None}
        return {"compiled": self.what, "compile_s": round(self.compile_s, 3), **told}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a step consists of. `gradients` leaves those of a batch in the params, by the loss that it is given."""

    model: nn.Module
    loss: object
    optimizer: Optimizer
    device: torch.device
    max_grad_norm: float | None
    is_scaled: bool
    """Whether gradients are scaled, which decides on the host whether to update."""
    prepared: Callable[[Any], Any]
    """Lays inputs out in memory as the model wants them."""
    forward: Forward
    gradients: Callable[[Batch, Forward], Tensor]
    update: Callable[[], None]


class Compiling:
    """Takes the steps of one training: as they are in its first epoch, and compiled as a whole after it.

    What cannot be compiled so has its model and loss compiled, or nothing. Batches of fewer rows, as an epoch's last,
    are trained on as they are.
    """

    def __init__(
        self,
        parts: Parts,
        by: By,
        step: Callable[[Batch], Tensor],
        log: Callable[[str], None],
        alive: Callable[[], None],
    ) -> None:
        """`step` takes one uncompiled; `alive` is called now and then while the compiler works."""
        self._parts = parts
        self._by = by
        self._step = step
        self._log = log
        self._alive = alive
        self._why_less = why_not_whole(parts.optimizer) if not parts.is_scaled else "fp16's scaling decides on the host"
        self._what = STEP if self._why_less is None else MODEL
        self._compiled: Callable[[Batch], Tensor] | None = None
        self._is_due = self._is_over = False
        self._n_rows = 0
        self._compile_s = 0.0
        self._before, self._after = _Pace(parts.device), _Pace(parts.device)

    def start_epoch(self) -> None:
        """An epoch begins, and the device has nothing to do."""
        self._is_due = self._compiled is None and not self._is_over and self._before.n_steps > 0
        if not self._is_over:
            self._pace.start_epoch()

    def end_epoch(self) -> None:
        """The device has done all steps of an epoch."""
        self._pace.end_epoch()

    def gain(self) -> Gain | None:
        """Return what compiling gained so far, None if nothing was compiled."""
        if self._compiled is None:
            return None
        return Gain(
            what=self._what,
            compile_s=self._compile_s,
            before_s=self._before.step_s,
            after_s=self._after.step_s,
            n_steps=self._after.n_steps,
        )

    def __call__(self, batch: Batch) -> Tensor:
        """Take one step on the batch's rows."""
        if self._is_over:
            return self._step(batch)
        if self._is_due and batch.n_rows >= self._n_rows:
            return self._compile(batch)
        loss = self._step(batch) if self._compiled is None else self._by_compiled(self._compiled, batch)
        self._pace.count()
        return loss

    @property
    def _pace(self) -> _Pace:
        return self._before if self._compiled is None else self._after

    def _by_compiled(self, step: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        if batch.n_rows != self._n_rows:
            return self._step(batch)
        try:
            return step(batch)
        except (ChangedError, _dynamo_error()) as error:  # of compiling for another shape or setting: nothing has run
            why = str(error) if isinstance(error, ChangedError) else f"{type(error).__name__}: {first_line(error)}"
        self._is_over = True
        self._pace.drop_epoch()
        self._parts.optimizer.zero_grad(set_to_none=True)
        self._log(f"--compile: uncompiled from here on, as {why}")
        return self._step(batch)

    def _compile(self, batch: Batch) -> Tensor:
        """Take the step as it is, and have it compiled for those to come."""
        self._is_due = False
        started_at = time.perf_counter()
        self._n_rows = batch.n_rows
        try:
            trial = _WholeTrial(self._parts, batch) if self._what == STEP else _ModelTrial(self._parts, batch)
        except (RuntimeError, MemoryError) as error:  # of memory for a copy, or the step's own, which will come again
            self._is_over = True
            self._log(f"--compile: not compiled, {type(error).__name__}: {first_line(error)}")
        if self._is_over:
            return self._step(batch)
        try:
            with _told(self._alive):
                self._compiled = trial.compiled(self._by)
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises: without it the step has just run
            why = f"{type(error).__name__}: {first_line(error)}"
            if self._what == STEP:
                self._what, self._why_less, self._is_due = MODEL, why, True  # with the next batch
            else:
                self._is_over = True
                self._log(f"--compile: not compiled, {why}")
        else:
            if self._why_less is not None:
                self._log(f"--compile: {self._what} alone, as {self._why_less}")
        loss = trial.end()
        gc.collect()  # what the compiler has followed lies about in cycles, and holds the weights
        self._compile_s += time.perf_counter() - started_at
        return loss


class _Pace:
    """Seconds a step, without the first ones: there the device is waited for, once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._n_skipped = 0
        self._began_at: float | None = None
        self._n_here = 0
        self._seconds, self._n_timed, self.n_steps = 0.0, 0, 0

    @property
    def step_s(self) -> float | None:
        return self._seconds / self._n_timed if self._n_timed else None

    def start_epoch(self) -> None:
        self._n_here = 0
        self._began_at = time.perf_counter() if self._n_skipped == SKIPPED else None

    def count(self) -> None:
        self.n_steps += 1
        if self._began_at is not None:
            self._n_here += 1
            return
        self._n_skipped += 1
        if self._n_skipped == SKIPPED:
            if self._device.type != "cpu":
                torch.accelerator.synchronize(self._device)
            self._began_at = time.perf_counter()

    def drop_epoch(self) -> None:
        self._began_at = None

    def end_epoch(self) -> None:
        if self._began_at is not None and self._n_here:
            self._seconds += time.perf_counter() - self._began_at
            self._n_timed += self._n_here


class NotTheSameError(Exception):
    """A compiled step computes something else than the step itself."""


class _Kept:
    """What a step changes, as it is now, to be put back."""

    def __init__(self, parts: Parts) -> None:
        modules = [part for its in (parts.model, parts.loss) if isinstance(its, nn.Module) for part in its.modules()]
        self._buffers = [(its._buffers, name, value) for its in modules for name, value in its._buffers.items()]
        found = [value for _, _, value in self._buffers if value is not None]
        found += [param for group in parts.optimizer.param_groups for param in group["params"]]
        for state in parts.optimizer.state.values():
            found += [value for value in state.values() if isinstance(value, Tensor)]
        self._values = {id(tensor): (tensor, tensor.detach().clone()) for tensor in found}
        self._optimizer = parts.optimizer
        self._device = parts.device
        self._generators = generator_states(parts.device)

    @contextmanager
    def put_back_after_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._optimizer.zero_grad(set_to_none=True)
            self.put_back()
            raise

    def of(self, tensors: list[Tensor]) -> list[Tensor]:
        return [self._values[id(tensor)][1] for tensor in tensors]

    def put_back(self) -> None:
        for buffers, name, value in self._buffers:
            buffers[name] = value
        with torch.no_grad():
            for tensor, value in self._values.values():
                tensor.copy_(value)
        set_generator_states(self._generators, self._device)


class _ModelTrial:
    """One step whose gradients are computed by the compiled model and loss as well, from where it began."""

    def __init__(self, parts: Parts, batch: Batch) -> None:
        self._parts, self._batch = parts, batch
        self._began = _Kept(parts)
        with self._began.put_back_after_error():
            self._loss = parts.gradients(batch, parts.forward).clone()
            self._trained = [p for group in parts.optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._grads = [param.grad for param in self._trained]
            self._ended = _Kept(parts)

    def compiled(self, by: By) -> Callable[[Batch], Tensor]:
        """Return the compiled step. Raises NotTheSameError and what a compiler raises."""
        forward = by.compiled(self._parts.forward)
        self._parts.optimizer.zero_grad(set_to_none=True)
        self._began.put_back()
        loss = self._parts.gradients(self._batch, forward)
        nothing = [torch.zeros_like(grad) for grad in self._grads if grad is not None]
        _check_same(self._loss, loss, nothing, self._grads, [param.grad for param in self._trained])
        return lambda batch: self._take(batch, forward)

    def end(self) -> Tensor:
        """Go on from the step as it is, and return its loss."""
        self._ended.put_back()
        self._parts.optimizer.zero_grad(set_to_none=True)
        for param, grad in zip(self._trained, self._grads, strict=True):
            param.grad = grad
        self._parts.update()
        self._parts.optimizer.zero_grad(set_to_none=True)
        self._forget()
        return self._loss

    def _forget(self) -> None:
        """Let go of the copies, as the compiled step lives for as long as the training."""
        del self._began, self._ended, self._grads, self._batch

    def _take(self, batch: Batch, forward: Forward) -> Tensor:
        loss = self._parts.gradients(batch, forward)
        self._parts.update()
        self._parts.optimizer.zero_grad(set_to_none=True)
        return loss


class _WholeTrial:
    """One step that is taken as a compiled whole as well, from where it began."""

    def __init__(self, parts: Parts, batch: Batch) -> None:
        self._parts, self._batch = parts, batch
        self._began = _Kept(parts)
        with self._began.put_back_after_error():
            self._loss = parts.gradients(batch, parts.forward).clone()
            self._trained = [p for group in parts.optimizer.param_groups for p in group["params"] if p.grad is not None]
            parts.update()
            self._ended = _Kept(parts)

    def compiled(self, by: By) -> Callable[[Batch], Tensor]:
        """Return the compiled step. Raises NotTheSameError and what a compiler raises."""
        parts = self._parts
        whole = WholeStep(parts.forward, parts.optimizer, self._trained, parts.max_grad_norm, parts.device)
        function = by.compiled(whole.function, whole=True)
        parts.optimizer.zero_grad(set_to_none=True)
        self._began.put_back()
        with _traced_gradients():
            loss = function(parts.prepared(self._batch.inputs), self._batch.targets)
        now = [param.detach() for param in self._trained]
        _check_same(self._loss, loss, self._began.of(self._trained), self._ended.of(self._trained), now)
        known = {_shapes(self._batch)}

        def take(batch: Batch) -> Tensor:
            whole.put_rates()
            inputs, shapes = parts.prepared(batch.inputs), _shapes(batch)
            if shapes in known:
                return function(inputs, batch.targets)
            known.add(shapes)
            with _traced_gradients():
                return function(inputs, batch.targets)

        return take

    def end(self) -> Tensor:
        """Go on from the step as it is, and return its loss."""
        self._parts.optimizer.zero_grad(set_to_none=True)
        self._ended.put_back()
        del self._began, self._ended, self._batch
        return self._loss


def _check_same(
    loss: Tensor, compiled_loss: Tensor, began: list[Tensor], ended: list[Any], compiled: list[Any]
) -> None:
    wanted, got = float(loss), float(compiled_loss)
    if not abs(wanted - got) <= MAX_LOSS_ERROR * max(1.0, abs(wanted)):
        raise NotTheSameError(f"a compiled step has a loss of {got:.4g} instead of {wanted:.4g}")
    change = _norm([end - begin for begin, end in zip(began, ended, strict=True)])
    error = _norm([other - end for other, end in zip(compiled, ended, strict=True)])
    if not error <= MAX_CHANGE_ERROR * change + 1e-6 * _norm(began):
        raise NotTheSameError(f"a compiled step changes by {error:.4g} more or less what changes by {change:.4g}")


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.float().norm() for tensor in tensors]).norm())


def _shapes(batch: Batch) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in batch.columns)


def _traced_gradients() -> Any:
    """Have torch's compiler follow the computation of gradients. Raises RuntimeError where it is too old for that."""
    import torch._dynamo.config as config

    its: Any = config
    if not hasattr(its, "trace_autograd_ops"):
        raise RuntimeError(f"the compiler of torch {torch.__version__} does not follow the computation of gradients")
    return its.patch(trace_autograd_ops=True)


def _dynamo_error() -> type[Exception]:
    import torch._dynamo.exc

    return torch._dynamo.exc.TorchDynamoException


@contextmanager
def _told(alive: Callable[[], None]) -> Iterator[None]:
    """Call `alive` now and then while the block runs, which may take longer than an epoch took."""
    ended = threading.Event()

    def beat() -> None:
        for _ in range(BEATS):
            if ended.wait(BEAT_S):
                return
            alive()

    thread = threading.Thread(target=beat, name="compiling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
