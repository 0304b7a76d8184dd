"""A step of optimization as a CUDA graph: captured once, and launched as a whole from then on."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tuner.data import Batch
from tuner.errors import first_line

WARM_UP_STEPS = 3
"""Steps that are run before the next is captured: libraries choose their algorithms in the first ones."""

_SYNC = "called a synchronizing CUDA operation"  # what torch says of a step that waits for the device


class CannotCaptureError(Exception):
    """A step does what a graph cannot hold; the message says what."""


class CapturedStep:
    """A step that was captured for one shape of batch.

    The learning rates are read from the device, so that a schedule may change them. Other numbers of the optimizer
    are part of what is captured: where one has changed, the step is captured anew.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._numbers: list[dict[str, Any]] = []
        self._rates: dict[int, tuple[float, Tensor]] = {}  # of a group: its rate as it was last, and where it is read
        self._steps = 0
        self._shapes: list[torch.Size] = []

    def fits(self, batch: Batch) -> bool:
        """Whether the captured step can run this batch."""
        return self._graph is not None and self._shapes == _shapes(batch) and self._numbers == self._captured_numbers()

    def is_due(self, batch: Batch) -> bool:
        """Whether to capture now: the step has run a few times, and the batch is no smaller last one."""
        return self._steps >= WARM_UP_STEPS and self._shapes == _shapes(batch)

    def warm_up(self, batch: Batch, step: Callable[[Batch], Tensor]) -> tuple[Tensor, str | None]:
        """Run the step as it is, on the stream that capturing needs it on; return its loss.

        The last of these steps is watched: if it waits for the device, which cannot be captured, the place in the
        code that waits is returned too.
        """
        shapes = _shapes(batch)
        # An epoch's first batch is as big as any, unless it was resumed at its last one.
        if not self._shapes or shapes[-1][0] > self._shapes[-1][0]:
            self._shapes, self._steps, self._graph = shapes, 0, None
        self._steps += shapes == self._shapes
        with _on(side_stream(self._device)):
            if not self.is_due(batch):
                return step(batch), None
            with _syncs() as found:
                loss = step(batch)
        return loss, f"as it waits for the device in {found[0]}" if found else None

    def capture(self, batch: Batch, step: Callable[[Batch], Tensor], update: Callable[[], None]) -> Tensor:
        """Capture `step`, which gives gradients, and `update`, which uses them, and run both once on the batch.

        Raises CannotCaptureError if they cannot be captured; nothing of them has been run then.
        """
        self._graph = None  # frees the memory of an earlier one
        self._numbers = self._captured_numbers()
        self._rates = {
            number: (rate := _number(group["lr"]), torch.full((), rate, device=self._device))
            for number, group in enumerate(self._optimizer.param_groups)
            if _reads_rate_on_device(self._optimizer, group)
        }
        self._batch = batch.map(torch.clone)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        before = torch.cuda.current_stream(self._device)
        try:
            # Thread-local: what the threads of a DataLoader do meanwhile is no part of it.
            with torch.cuda.graph(
                graph, pool=pool, stream=side_stream(self._device), capture_error_mode="thread_local"
            ):
                self._loss = step(self._batch)
                with self._rates_on_device():
                    update()
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # torch leaves its own as it is when a capture fails
            self._optimizer.zero_grad(set_to_none=True)
            _clear_failed_capture(pool, self._device)
            raise CannotCaptureError(_reason(error)) from error
        self._optimizer.zero_grad(set_to_none=True)  # the graph keeps its own gradients
        self._graph = graph
        return self.replay(batch)

    def replay(self, batch: Batch) -> Tensor:
        """Run the captured step on the batch. Its loss is overwritten by the next one."""
        assert self._graph is not None
        for mine, its in zip(self._batch.columns, batch.columns, strict=True):
            mine.copy_(its, non_blocking=True)
        self._put_rates()
        self._graph.replay()
        return self._loss

    def _captured_numbers(self) -> list[dict[str, Any]]:
        return [
            {
                name: _number(value)
                for name, value in group.items()
                if _is_number(value) and not (name == "lr" and _reads_rate_on_device(self._optimizer, group))
            }
            for group in self._optimizer.param_groups
        ]

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Give the optimizer its learning rates as tensors on the device, for as long as it is captured."""
        groups = self._optimizer.param_groups
        its = [group.get("lr") for group in groups]
        for number, group in enumerate(groups):
            if number in self._rates:
                group["lr"] = self._rates[number][1]
        try:
            yield
        finally:
            for group, rate in zip(groups, its, strict=True):
                if rate is not None:
                    group["lr"] = rate

    def _put_rates(self) -> None:
        for number, group in enumerate(self._optimizer.param_groups):
            if number in self._rates:
                known, tensor = self._rates[number]
                if (rate := _number(group["lr"])) != known:
                    tensor.fill_(rate)
                    self._rates[number] = rate, tensor


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return this process's one stream for capturing: libraries keep workspaces for each stream they ever saw."""
    return torch.cuda.Stream(device)


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run a block on another stream, in order with what comes before and after it."""
    usual = torch.cuda.current_stream(stream.device)
    stream.wait_stream(usual)
    with torch.cuda.stream(stream):
        yield
    usual.wait_stream(stream)


@contextmanager
def _syncs() -> Iterator[list[str]]:
    """Collect the places of the code in which the block waits for the device."""
    found: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if _SYNC in str(warning.message):
            found.append(f"{warning.filename}, line {warning.lineno}")
        elif "prototype feature" not in str(warning.message):  # of the mode itself
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _reason(error: BaseException) -> str:
    """Say why a capture failed: torch's own error says only that there was another one, which came first."""
    first = error.__context__ or error
    return f"{type(first).__name__}: {first_line(first)}"


def _clear_failed_capture(pool: tuple[int, int], device: torch.device) -> None:
    """Let the process go on after a capture that failed, which torch leaves half open.

    Its allocator would believe in a capture for ever, and give no memory back when it runs out of it; up to torch
    2.12 its generator would refuse to draw anything outside of one (pytorch issues 180395 and 176752).
    """
    end_pool = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end_pool is not None:
        with suppress(RuntimeError):  # it had been ended
            end_pool(device.index or 0, pool)
    nothing = torch.zeros((), device=device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side_stream(device), capture_error_mode="thread_local"):
        nothing.add_(1)  # a capture that succeeds closes the generator's


def _reads_rate_on_device(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the optimizer takes this group's learning rate as a tensor on the device, without waiting for it."""
    rate = group.get("lr")
    if isinstance(rate, Tensor) and rate.device.type != "cpu":
        return False  # it is there already, and schedules change it there
    own = type(optimizer).__module__.startswith("torch.optim")
    return _is_number(rate) and own and bool(group.get("fused") or group.get("capturable"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | tuple) or (
        isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1
    )


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _shapes(batch: Batch) -> list[torch.Size]:
    return [tensor.shape for tensor in batch.columns]
