"""A step of optimization as one function that torch's compiler can follow from the rows to the new weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_FOLLOWED = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax),
    *(torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta),
)
"""Optimizers whose update is by `_init_group` and a function of lists of tensors, which they change in place."""
_FLAGS = ("foreach", "fused", "capturable", "differentiable")


def why_not_whole(optimizer: Optimizer) -> str | None:
    """Return why the optimizer's update cannot be compiled with the gradients, None if it can."""
    if type(optimizer) not in _FOLLOWED:
        return f"torch's compiler cannot follow the update of {type(optimizer).__name__}"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has hooks"
    if any(group["differentiable"] for group in optimizer.param_groups):
        return "the optimizer is differentiable"
    return None


class ChangedError(Exception):
    """What was compiled as a constant is none; the message says what."""


class WholeStep:
    """A loss, its gradients and an optimizer's update of the params that have some, with state from steps before.

    `function(inputs, targets)` takes the step and returns the mean loss. It reads learning rates as tensors, so that
    a schedule may change them; other numbers of the optimizer are part of what is compiled.
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        optimizer: Optimizer,
        trained: list[Tensor],
        max_grad_norm: float | None,
        device: torch.device,
    ) -> None:
        self._optimizer = optimizer
        self._stand_in = _StandIn(optimizer, trained)
        self._rates: list[tuple[Any, Tensor]] = []
        for group, mine in zip(optimizer.param_groups, self._stand_in.param_groups, strict=True):
            rate = group["lr"]
            mine["lr"] = rate if isinstance(rate, Tensor) else torch.full((), rate, device=device)
            self._rates.append((rate, mine["lr"]))
        update = inspect.unwrap(type(optimizer).step)
        self.function = _function(loss, self._stand_in, update, max_grad_norm, device)

    def put_rates(self) -> None:
        """Give the compiled step the rates as they are now. Raises ChangedError if other numbers changed."""
        for number, group in enumerate(self._optimizer.param_groups):
            mine = self._stand_in.param_groups[number]
            known, tensor = self._rates[number]
            if group["lr"] is not tensor and group["lr"] != known:
                tensor.fill_(group["lr"])
                self._rates[number] = group["lr"], tensor
            for name in self._stand_in.numbers[number]:
                if mine[name] != group[name]:
                    raise ChangedError(f"{name} of the optimizer changes, from {mine[name]} to {group[name]}")


class _StandIn:
    """What an optimizer's `step` is called with instead of the optimizer: its settings, params and their state."""

    def __init__(self, optimizer: Optimizer, trained: list[Tensor]) -> None:
        settings: Any = optimizer
        for param in trained:
            param.grad = param.detach()  # optimizers take no others into their lists
        n_lists = len(inspect.signature(settings._init_group).parameters) - 1
        self.param_groups: list[dict[str, Any]] = []
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.state = _Nowhere()
        self.numbers = [
            [name for name in group if name not in ("params", "lr", "initial_lr", *_FLAGS)]
            for group in optimizer.param_groups
        ]
        self._found: list[tuple[Any, list[list[Any]], slice]] = []
        for number, group in enumerate(optimizer.param_groups):
            lists: list[list[Any]] = [[] for _ in range(n_lists)]
            told = settings._init_group(group, *lists)
            mine = {name: value for name, value in group.items() if name != "params"}
            # Of an update by one fused kernel the compiler sees nothing.
            mine |= {"number": number, "foreach": True, "fused": False}
            if "capturable" in mine:
                mine["capturable"] = True  # the count of steps is a tensor, as is the rate
            self.param_groups.append(mine)
            self._found.append((told, lists, slice(len(self.params), len(self.params) + len(lists[0]))))
            self.params += lists[0]
        for param in trained:
            param.grad = None

    def _init_group(self, group: dict[str, Any], params: list[Any], grads: list[Any], *others: list[Any]) -> Any:
        told, lists, which = self._found[group["number"]]
        params.extend(lists[0])
        grads.extend(self.grads[which])
        for wanted, its in zip(others, lists[2:], strict=True):
            wanted.extend(its)
        return told

    def _accelerator_graph_capture_health_check(self) -> None:
        pass

    _cuda_graph_capture_health_check = _accelerator_graph_capture_health_check


class _Nowhere:
    """The state that an optimizer puts its tensors into again after they have changed, in place, in its own."""

    def __getitem__(self, _: Tensor) -> dict[str, Any]:
        return {}


def _function(
    loss: Callable[[Any, Any], Tensor],
    stand_in: _StandIn,
    update: Callable[..., Any],
    max_grad_norm: float | None,
    device: torch.device,
) -> Callable[[Any, Any], Tensor]:
    params = stand_in.params
    # Gradients are multiplied by a number that the compiler does not know: torch 2.14's takes `weight.add_(a @ b,
    # alpha=-rate)` for a product that is added to the weight, and forgets alpha.
    one = torch.ones((), device=device)

    def step(inputs: Any, targets: Any) -> Tensor:
        value = loss(inputs, targets)
        grads = torch.autograd.grad(value, params)
        scale = one
        if max_grad_norm is not None:
            scale = torch.clamp(max_grad_norm / (nn.utils.get_total_norm(grads) + 1e-6), max=1.0) * one
        stand_in.grads = [grad * scale for grad in grads]
        with torch.no_grad():
            update(stand_in, None)
        stand_in.grads = []
        return value.detach()

    return step
