"""One step of optimization: forward, backward, update. Knows nothing of Optuna or of a database."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tuner.data import Batch, Inputs, Rows, map_inputs
from tuner.errors import ObjectiveError, first_line
from tuner.spec import Precision
from tuner.training.checked_step import By, Forward, Parts
from tuner.training.compile_aside import Aside
from tuner.training.compiling import Compiling
from tuner.training.graphs import CannotCaptureError, CapturedStep

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""A mean over the rows, of (what the model returned, targets)."""

# Optimizers whose update does not depend on how many there were; a count on the host would be captured as it is.
_WITHOUT_COUNT = {torch.optim.SGD, getattr(torch.optim, "Muon", torch.optim.SGD)}  # not every torch has Muon
_NO_GRAPH = "--cuda-graphs: each step is launched by itself"
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call the model with one tensor, with a tuple's tensors in order, or with a dict's by name."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def materialize(model: nn.Module, rows: Rows) -> None:
    """Give the weights of lazy modules their shapes, by calling the model on two rows; other models stay as they are.

    Until then they can neither be loaded nor counted nor laid out otherwise in memory.
    """
    if not any(nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        return
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        call(model, rows.rows(slice(0, 2)).to(device).inputs)
    model.train(was_training)


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step has to be given a function that computes the loss, as that of LBFGS has to."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def fastest(kind: type[Optimizer], params: Iterable[Any], **settings: Any) -> Optimizer:
    """Return an optimizer of this kind in its fastest form: fused where there is one, else the default.

    The default is foreach on a CUDA device, and a loop over the tensors elsewhere.
    """
    params = list(params)
    try:
        return kind(params, fused=True, **settings)  # type: ignore[call-arg]  # not every kind takes it
    except (TypeError, RuntimeError):  # this kind has none, or not for these params' device or type
        return kind(params, **settings)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the context in which a model is called at this precision."""
    half = _HALF.get(precision)
    return nullcontext() if half is None else torch.autocast(device.type, dtype=half)


@contextmanager
def matrix_products(precision: Precision) -> Iterator[None]:
    """Let matrix products of the block round their factors to TF32 at that precision, which CUDA devices of 2020 and
    later compute several times as fast: 10 bits of mantissa instead of 23. Convolutions do so at fp32 too, as is
    torch's default.
    """
    if precision != "tf32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Step:
    """Takes the model one step further for each batch that it is called with, and returns the batch's mean loss.

    The loss stays on the device and is overwritten by the next step. Nothing here waits for the device, with one
    exception that is torch's: fp16 with an optimizer that is not fused.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        device: torch.device,
        *,
        precision: Precision = "fp32",
        max_grad_norm: float | None = None,
        channels_last: bool = False,
        compiled: By | None = None,
        aside: Aside | None = None,
        cuda_graphs: bool = False,
        log: Callable[[str], None] = lambda _: None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._model = model
        self._loss = loss
        self._optimizer = optimizer
        self._params = [param for group in optimizer.param_groups for param in group["params"]]
        self._device = device
        self._precision = precision
        self._max_grad_norm = max_grad_norm
        self._channels_last = channels_last
        self._log = log
        self._needs_closure = needs_closure(optimizer)
        if self._needs_closure:
            self._check_closure()
        self._compiled_loss: Forward | None = None
        self._captured: CapturedStep | None = self._to_capture() if cuda_graphs else None
        self.compiling: Compiling | None = None
        self._is_compiled_first = compiled is not None and (self._captured is not None or self._needs_closure)
        if compiled is not None and self._is_compiled_first:
            self._compiled_loss = compiled.compiled(self._mean_loss)
        elif compiled is not None:
            self.compiling = Compiling(self._parts(loss), compiled, self._by_itself, log, alive, aside)

    def __call__(self, batch: Batch) -> Tensor:
        """Take one step on the batch's rows."""
        if self._captured is not None:
            return self._by_graph(self._captured, batch)
        return self._by_itself(batch) if self.compiling is None else self.compiling(batch)

    def close(self) -> None:
        """Let go of what is or was compiled and holds this step: only garbage collection would free the model."""
        if self.compiling is not None:
            self.compiling.close()
        self._compiled_loss = self.compiling = None

    def _parts(self, loss: Loss) -> Parts:
        return Parts(
            model=self._model,
            loss=loss,
            optimizer=self._optimizer,
            device=self._device,
            max_grad_norm=self._max_grad_norm,
            precision=self._precision,
            prepared=self._prepared,
            forward=self._mean_loss,
            gradients=self._gradients_by,
            update=self._update,
        )

    def _by_itself(self, batch: Batch) -> Tensor:
        loss = self._first_compiled(batch) if self._is_compiled_first else self._gradients(batch)
        if self._needs_closure:
            self._update_by_closure(batch)
        else:
            self._update_first(batch)
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def _prepared(self, inputs: Inputs) -> Inputs:
        return map_inputs(_channels_last, inputs) if self._channels_last else inputs

    def _mean_loss(self, inputs: Inputs, targets: Any) -> Tensor:
        with autocast(self._device, self._precision):
            return self._loss(call(self._model, inputs), targets)

    def _gradients(self, batch: Batch) -> Tensor:
        return self._gradients_by(batch, self._compiled_loss or self._mean_loss)

    def _gradients_by(self, batch: Batch, forward: Forward) -> Tensor:
        loss = forward(self._prepared(batch.inputs), batch.targets)
        if not isinstance(loss, Tensor) or loss.dim() > 0 or not loss.requires_grad:
            raise ObjectiveError(_why_no_loss(loss))
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _update(self) -> None:
        if self._max_grad_norm is not None:
            self.scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._params, self._max_grad_norm)
        self.scaler.step(self._optimizer)
        self.scaler.update()

    def _update_first(self, batch: Batch) -> None:
        """Update; where the optimizer says that it needs a closure which its signature leaves open, with one."""
        try:
            self._update()
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            if "closure" not in str(error) or self.scaler.is_enabled():
                raise
            self._needs_closure = True
            self._check_closure()
            if self.compiling is not None:
                self.compiling = None
                self._log(f"--compile: not compiled, as {type(self._optimizer).__name__} needs a closure")
            self._update_by_closure(batch)

    def _update_by_closure(self, batch: Batch) -> None:
        """Update by an optimizer that asks for the loss and its gradients as often as it wants, of this batch."""

        def closure() -> Tensor:
            self._optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                return self._gradients(batch)

        self._optimizer.step(closure)  # type: ignore[arg-type]  # torch's loss may be a tensor

    def _check_closure(self) -> None:
        """Raise ObjectiveError for what such an optimizer cannot be combined with."""
        kind = type(self._optimizer).__name__
        why = f"as {kind} computes the loss several times a step"
        if self.scaler.is_enabled():
            raise ObjectiveError(f"--precision fp16 cannot scale gradients here, {why}: use bf16, tf32 or fp32")
        if self._max_grad_norm is not None:
            raise ObjectiveError(f"max_grad_norm cannot clip gradients here, {why}: let max_grad_norm return None")

    def _first_compiled(self, batch: Batch) -> Tensor:
        """Return the gradients by the compiled model and loss, or, if they cannot be compiled, by those as they are."""
        self._is_compiled_first = False
        try:
            return self._gradients(batch)
        except RuntimeError as error:  # what torch.compile raises, and what the model itself may
            self._optimizer.zero_grad(set_to_none=True)
            self._compiled_loss = None
            loss = self._gradients(batch)
            self._log(f"--compile: not compiled, {type(error).__name__}: {first_line(error)}")
            return loss

    def _to_capture(self) -> CapturedStep | None:
        if reason := self._cannot_capture():
            self._log(f"{_NO_GRAPH}, {reason}")
            return None
        for group in self._optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True  # keeps its count of steps on the device
        # The first steps and an epoch's last are not captured, of which torch warns those who forgot to capture any.
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
        return CapturedStep(self._optimizer, self._device)

    def _cannot_capture(self) -> str | None:
        if self._device.type != "cuda":
            return f"as this device is {self._device} and not CUDA"
        if self.scaler.is_enabled():
            return "as fp16's scaling decides on the host whether to update; bf16 needs none"
        kind = type(self._optimizer)
        if self._needs_closure:
            return f"as {kind.__name__} computes the loss several times a step, as often as it decides on the host"
        if kind not in _WITHOUT_COUNT and any("capturable" not in group for group in self._optimizer.param_groups):
            return f"as {kind.__name__} cannot keep its count of steps on the device; SGD and AdamW can"
        return None

    def _by_graph(self, captured: CapturedStep, batch: Batch) -> Tensor:
        if captured.fits(batch):
            return captured.replay(batch)
        if not captured.is_due(batch):
            loss, reason = captured.warm_up(batch, self._by_itself)
            if reason is not None:
                self._stop_capturing(reason)
            return loss
        try:
            return captured.capture(batch, self._gradients, self._update)
        except CannotCaptureError as error:
            self._stop_capturing(str(error))
        return self._by_itself(batch)  # once the error is gone, and with it what it held of the failed capture

    def _stop_capturing(self, reason: str) -> None:
        self._captured = None
        self._log(f"{_NO_GRAPH}, {reason}")


def _why_no_loss(loss: object) -> str:
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        return f"the loss needs to return a tensor that is one number, got {found}: take the mean over the rows"
    return (
        "the loss needs to follow from weights that are trained, got one without a gradient:"
        " look for requires_grad_(False), detach(), no_grad() and argmax()"
    )


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
