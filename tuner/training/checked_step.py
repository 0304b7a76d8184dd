"""A step compiled, and held against the same one uncompiled before it is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tuner.data import Batch
from tuner.spec import CompileBackend, CompileMode, Precision
from tuner.training.checkpoint import generator_states, set_generator_states
from tuner.training.whole_step import WholeStep

MAX_LOSS_ERROR, MAX_CHANGE_ERROR = 0.02, 0.5
"""How far a compiled step may be from the same one uncompiled, as parts of the loss and of what the step changes.

That is far more than rounding, whose noise a first update by Adam magnifies; what a compiler gets wrong is more still.
"""

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
            # It recommends another precision than --precision has.
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
        torch.compiler.reset()  # or it stops after 8 models of a process, as all are called by the same code
        compiled: Forward = torch.compile(function, **how)
        return compiled


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a step consists of. `gradients` leaves those of a batch in the params, by the loss that it is given."""

    model: nn.Module
    loss: object
    optimizer: Optimizer
    device: torch.device
    max_grad_norm: float | None
    precision: Precision
    """With fp16 gradients are scaled, which decides on the host whether to update."""
    prepared: Callable[[Any], Any]
    """Lays inputs out in memory as the model wants them."""
    forward: Forward
    gradients: Callable[[Batch, Forward], Tensor]
    update: Callable[[], None]


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


class Proof:
    """One step that is taken as it is, and compiled as well, from where it began.

    What is compiled is the whole of it, or only the model and the loss.
    """

    def __init__(self, parts: Parts, batch: Batch, *, whole: bool) -> None:
        self._parts, self._batch, self._is_whole = parts, batch, whole
        self._began = _Kept(parts)
        with self._began.put_back_after_error():
            self._loss = parts.gradients(batch, parts.forward).clone()
            self._trained = [p for group in parts.optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._grads: list[Any] = [] if whole else [param.grad for param in self._trained]
            if whole:
                parts.update()
            self._ended = _Kept(parts)

    def compiled(self, by: By) -> Callable[[Batch], Tensor]:
        """Return the compiled step. Raises NotTheSameError and what a compiler raises."""
        self._parts.optimizer.zero_grad(set_to_none=True)
        self._began.put_back()
        return self._compiled_whole(by) if self._is_whole else self._compiled_model(by)

    def end(self) -> Tensor:
        """Go on from the step as it is, and return its loss."""
        optimizer = self._parts.optimizer
        optimizer.zero_grad(set_to_none=True)
        self._ended.put_back()
        if not self._is_whole:
            for param, grad in zip(self._trained, self._grads, strict=True):
                param.grad = grad
            self._parts.update()
            optimizer.zero_grad(set_to_none=True)
        return self._loss

    def _compiled_model(self, by: By) -> Callable[[Batch], Tensor]:
        parts, forward = self._parts, by.compiled(self._parts.forward)
        loss = parts.gradients(self._batch, forward)
        nothing = [torch.zeros_like(grad) for grad in self._grads]
        _check_same(self._loss, loss, nothing, self._grads, [param.grad for param in self._trained])

        def take(batch: Batch) -> Tensor:
            loss = parts.gradients(batch, forward)
            parts.update()
            parts.optimizer.zero_grad(set_to_none=True)
            return loss

        return take

    def _compiled_whole(self, by: By) -> Callable[[Batch], Tensor]:
        parts = self._parts
        whole = WholeStep(parts.forward, parts.optimizer, self._trained, parts.max_grad_norm, parts.device)
        with _traced_gradients():
            function = by.compiled(whole.function, whole=True)
            loss = function(parts.prepared(self._batch.inputs), self._batch.targets)
        now = [param.detach() for param in self._trained]
        _check_same(self._loss, loss, self._began.of(self._trained), self._ended.of(self._trained), now)
        known = {shapes_of(self._batch)}

        def take(batch: Batch) -> Tensor:
            whole.put_rates()
            inputs, shapes = parts.prepared(batch.inputs), shapes_of(batch)
            if shapes in known:
                return function(inputs, batch.targets)
            known.add(shapes)
            with _traced_gradients():
                return function(inputs, batch.targets)

        return take


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


def shapes_of(batch: Batch) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in batch.columns)


def _traced_gradients() -> Any:
    """Have torch's compiler follow the computation of gradients. Raises RuntimeError where it is too old for that."""
    import torch._dynamo.config as config

    its: Any = config
    if not hasattr(its, "trace_autograd_ops"):
        raise RuntimeError(
            f"the compiler of torch {torch.__version__} does not follow the computation of gradients, as from 2.11 on"
        )
    return its.patch(trace_autograd_ops=True)
