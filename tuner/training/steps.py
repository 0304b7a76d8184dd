"""One step of optimization: forward, backward, update. Knows nothing of Optuna or of a database."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tuner.data import Batch, Inputs, map_inputs, tensors
from tuner.errors import ObjectiveError, first_line
from tuner.spec import Precision

Loss: TypeAlias = Callable[[Any, Tensor], Tensor]
"""A mean over the rows, of (what the model returned, targets)."""

WARM_UP_STEPS = 3
"""Steps that are run before the next is captured: libraries choose their algorithms in the first ones."""

# Optimizers whose update does not depend on how many there were; a count on the host would be captured as it is.
_WITHOUT_COUNT = {torch.optim.SGD, getattr(torch.optim, "Muon", torch.optim.SGD)}  # not every torch has Muon
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call the model with one tensor, with a tuple's tensors in order, or with a dict's by name."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


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
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=_HALF[precision])


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
        compiled: bool = False,
        cuda_graphs: bool = False,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._model: Any = model  # or its compiled form
        self._loss = loss
        self._optimizer = optimizer
        self._params = [param for group in optimizer.param_groups for param in group["params"]]
        self._device = device
        self._precision = precision
        self._max_grad_norm = max_grad_norm
        self._channels_last = channels_last
        self._log = log
        self._take = self._eager
        if compiled:
            self._eager_model = model
            torch.compiler.reset()  # or it stops after 8 models of a process, as all are called by the same code
            self._model = torch.compile(model)
            self._take = self._first_compiled
        self._graph: _Graph | None = None
        if cuda_graphs:
            self._capture_later()

    def __call__(self, batch: Batch) -> Tensor:
        """Take one step on the batch's rows."""
        if self._graph is not None:
            return self._replay(self._graph, batch)
        return self._take(batch)

    def _eager(self, batch: Batch) -> Tensor:
        loss = self._gradients(batch)
        self._update()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def _gradients(self, batch: Batch) -> Tensor:
        inputs = map_inputs(_channels_last, batch.inputs) if self._channels_last else batch.inputs
        with autocast(self._device, self._precision):
            loss = self._loss(call(self._model, inputs), batch.targets)
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

    def _first_compiled(self, batch: Batch) -> Tensor:
        """Take the first step with the compiled model, or, if it cannot be compiled, with the model as it is."""
        self._take = self._eager
        try:
            loss = self._gradients(batch)
        except RuntimeError as error:  # what torch.compile raises, and what the model itself may
            self._optimizer.zero_grad(set_to_none=True)
            self._model = self._eager_model
            loss = self._gradients(batch)
            self._log(f"--compile: not compiled, {type(error).__name__}: {first_line(error)}")
        self._update()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def _capture_later(self) -> None:
        if reason := self._cannot_capture():
            self._log(f"--cuda-graphs: each step is launched by itself, {reason}")
            return
        for group in self._optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True  # keeps its count of steps on the device
        # The first steps and an epoch's last are not captured, of which torch warns those who forgot to capture any.
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
        self._graph = _Graph(self._optimizer, self._device)

    def _cannot_capture(self) -> str | None:
        if self._device.type != "cuda":
            return f"as this device is {self._device} and not CUDA"
        if self.scaler.is_enabled():
            return "as fp16's scaling decides on the host whether to update; bf16 needs none"
        kind = type(self._optimizer)
        if kind not in _WITHOUT_COUNT and any("capturable" not in group for group in self._optimizer.param_groups):
            return f"as {kind.__name__} cannot keep its count of steps on the device; SGD and AdamW can"
        return None

    def _replay(self, graph: _Graph, batch: Batch) -> Tensor:
        if graph.fits(batch):
            return graph.replay(batch)
        if not graph.is_due(batch):
            with graph.warm_up(batch):
                return self._take(batch)
        try:
            return graph.capture(batch, lambda: self._captured(graph.batch))
        except RuntimeError as error:  # a sync, an allocation or a library call that cannot be captured
            self._graph = None
            self._optimizer.zero_grad(set_to_none=True)
            self._log(f"--cuda-graphs: each step is launched by itself, {type(error).__name__}: {first_line(error)}")
            return self._take(batch)

    def _captured(self, batch: Batch) -> Tensor:
        loss = self._gradients(batch)
        self._update()
        return loss


class _Graph:
    """A step that was captured once for one shape of batch, and is launched as a whole.

    Numbers of the optimizer, such as its learning rate, are part of what is captured: when a scheduler has changed
    one, the step is captured anew.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._settings: list[dict[str, Any]] = []
        self._steps = 0
        self._shapes: list[torch.Size] = []

    def fits(self, batch: Batch) -> bool:
        """Whether the captured step can run this batch."""
        return self._graph is not None and self._shapes == _shapes(batch) and self._settings == self._numbers()

    def is_due(self, batch: Batch) -> bool:
        """Whether to capture now: the step has run a few times, and the batch is no smaller last one."""
        return self._steps >= WARM_UP_STEPS and self._shapes == _shapes(batch)

    def warm_up(self, batch: Batch) -> AbstractContextManager[object]:
        """Return a context for a step that is not captured, on the stream that capturing needs it on."""
        shapes = _shapes(batch)
        # An epoch's first batch is as big as any, unless it was resumed at its last one.
        if not self._shapes or shapes[-1][0] > self._shapes[-1][0]:
            self._shapes, self._steps, self._graph = shapes, 0, None
        self._steps += 1
        return _on(self._stream)

    def capture(self, batch: Batch, step: Callable[[], Tensor]) -> Tensor:
        """Capture `step`, which is to read `self.batch`, and run it once. Raises RuntimeError if it cannot be."""
        self._graph = None  # frees the memory of an earlier one
        self._settings = self._numbers()
        self.batch = Batch(map_inputs(torch.clone, batch.inputs), batch.targets.clone())
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream()
        try:
            # Thread-local: what the threads of a DataLoader do meanwhile is no part of it.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._loss = step()
        finally:
            torch.cuda.set_stream(before)  # torch leaves its own as it is when a capture fails
        self._optimizer.zero_grad(set_to_none=True)  # the graph keeps its own gradients
        self._graph = graph
        return self.replay(batch)

    def replay(self, batch: Batch) -> Tensor:
        """Run the captured step on the batch."""
        assert self._graph is not None
        for mine, its in zip(_tensors(self.batch), _tensors(batch), strict=True):
            mine.copy_(its, non_blocking=True)
        self._graph.replay()
        return self._loss

    def _numbers(self) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in group.items() if isinstance(value, int | float | tuple)}
            for group in self._optimizer.param_groups
        ]


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run a block on another stream, in order with what comes before and after it."""
    usual = torch.cuda.current_stream(stream.device)
    stream.wait_stream(usual)
    with torch.cuda.stream(stream):
        yield
    usual.wait_stream(stream)


def _why_no_loss(loss: object) -> str:
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        return f"the loss needs to return a tensor that is one number, got {found}: take the mean over the rows"
    return (
        "the loss needs to follow from weights that are trained, got one without a gradient:"
        " look for requires_grad_(False), detach(), no_grad() and argmax()"
    )


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return (*tensors(batch.inputs), batch.targets)


def _shapes(batch: Batch) -> list[torch.Size]:
    return [tensor.shape for tensor in _tensors(batch)]


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
