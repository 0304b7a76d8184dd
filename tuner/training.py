"""Train one model and evaluate it. Knows nothing of Optuna or of a database."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tuner.data import Inputs, Split
from tuner.errors import UsageError

if TYPE_CHECKING:
    from torchmetrics import Metric

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# Evaluation needs no gradients, so bigger batches than training's fit; 4,096 rows of 784 floats are 13 MB.
EVALUATION_ROWS = 4096


class DivergedError(ArithmeticError):
    """The training loss became NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch gave: its number, counted from 1; the mean training loss over its rows; and each metric
    over the whole validation split (empty without one)."""

    number: int
    train_loss: float
    metrics: Mapping[str, float]


def choose_device(name: str | None = None) -> torch.device:
    """Return the device `name`, or the best there is: cuda, then mps, then cpu.

    Raises UsageError if there is no such device here.
    """
    if name:
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"--device needs a device of this machine, got {name!r}: {reason}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fit(
    model: nn.Module,
    train: Split,
    valid: Split | None = None,
    *,
    optimizer: Optimizer,
    loss: Loss,
    metrics: Mapping[str, Metric],
    epochs: int,
    batch_size: int,
    seed: int,
    scheduler: LRScheduler | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Train `model` in place and return one `Epoch` for each epoch that ended.

    Model, splits and metrics are on one device already. The order of the rows follows `seed` alone. `scheduler`
    is stepped once an epoch. `on_epoch` is called after each epoch's evaluation; whatever it raises ends the
    training and passes through, which is how a caller prunes.

    Raises DivergedError at the end of the epoch in which the loss became NaN or infinite.
    """
    device = train.targets.device
    generator = torch.Generator(device).manual_seed(seed)
    history: list[Epoch] = []
    for number in range(1, epochs + 1):
        model.train()
        total = torch.zeros((), device=device)
        batches = torch.randperm(len(train), generator=generator, device=device).split(batch_size)
        if len(batches) > 1 and len(batches[-1]) == 1 < batch_size:
            batches = batches[:-1]  # batch norm has no variance of one row; the next epoch shuffles anew
        for rows in batches:
            batch = train.rows(rows)
            batch_loss = loss(call(model, batch.inputs), batch.targets)
            batch_loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += batch_loss.detach() * len(rows)  # stays on the device; one .item() an epoch
        if scheduler is not None:
            scheduler.step()
        train_loss = total.item() / sum(map(len, batches))
        if not math.isfinite(train_loss):
            raise DivergedError(f"the training loss is {train_loss} in epoch {number}")
        values = {} if valid is None else evaluate(model, valid, metrics)
        epoch = Epoch(number=number, train_loss=train_loss, metrics=values)
        history.append(epoch)
        if on_epoch is not None:
            on_epoch(epoch)
    return history


@torch.inference_mode()
def predict(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the model's outputs (n, ...) for all rows of `inputs`, in eval mode, on their device."""
    model.eval()
    first = (
        inputs if isinstance(inputs, Tensor) else next(iter(inputs.values() if isinstance(inputs, dict) else inputs))
    )
    whole = Split(inputs, first)
    return torch.cat(
        [
            call(model, whole.rows(slice(start, start + EVALUATION_ROWS)).inputs)
            for start in range(0, len(first), EVALUATION_ROWS)
        ]
    )


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Return each metric over the whole split - not a mean over batches - with the model in eval mode."""
    model.eval()
    for metric in metrics.values():
        metric.reset()
    for start in range(0, len(split), EVALUATION_ROWS):
        batch = split.rows(slice(start, start + EVALUATION_ROWS))
        outputs = call(model, batch.inputs)
        for metric in metrics.values():
            metric.update(outputs, batch.targets)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """Call the model with one tensor, with a tuple's tensors in order, or with a dict's by name."""
    if isinstance(inputs, dict):
        outputs: Tensor = model(**inputs)
    elif isinstance(inputs, tuple):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    return outputs
