"""What a model's outputs mean: names of classes, probabilities, numbers. Pure functions of outputs and manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from tuner import training
from tuner.data import Inputs, Tensors, map_inputs, tensors
from tuner.errors import TunerError, UsageError, first_line
from tuner.model.manifest import Kind, Manifest, TensorDescription

Ranked: TypeAlias = list[tuple[str, float]]
"""Classes with their probabilities, the most probable one first."""


class BadOutputError(TunerError):
    """A row, counted from 0, that the model gives no numbers for."""

    def __init__(self, problem: str, row: int) -> None:
        super().__init__(f"{problem}, in row {row}")
        self.problem = problem
        self.row = row


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's outputs (n, ...) for one target, and what they mean. `target` is "" for the only one.

    `kind` is "number" as well where nothing is known of the outputs: they are given as they are.
    """

    target: str
    outputs: Tensor
    kind: Kind
    classes: tuple[str, ...] = ()
    are_probabilities: bool = False

    def probabilities(self) -> Tensor:
        """Return the probabilities (n, classes, ...), in float64; those of a binary target are of both classes.

        Raises TunerError for what has none, and for outputs that are no numbers, as of an overflow.
        """
        if self.kind == "number":
            raise TunerError(f"{self._name} has no probabilities: its predictions are numbers, which predict() gives")
        if not self.outputs.is_floating_point():
            raise TunerError(
                f"{self._name} has no probabilities: the model gives the numbers of classes; let the objective's"
                " prediction(outputs) return logits"
            )
        outputs = self.outputs.double()
        if self.kind == "classes":
            shares = outputs if self.are_probabilities else outputs.softmax(1)
        else:
            shares = outputs if self.are_probabilities else outputs.sigmoid()
            if self.kind == "binary":
                shares = torch.stack([1 - shares, shares], 1)
        return self._finite(shares)

    def predictions(self) -> Any:
        """Return an array (n, ...) of names or numbers, or for a multilabel target a tuple of names for each row."""
        if self.kind == "number":
            return self._finite(self.outputs).numpy()
        if self.kind == "multilabel":
            if self.has_places:
                raise TunerError(f"{self._name} has several classes for each place of a row: see predict_proba()")
            chosen = self.probabilities() > 0.5 if self.outputs.is_floating_point() else self.outputs.bool()
            return [tuple(name for name, its in zip(self.classes, row, strict=True) if its) for row in chosen.tolist()]
        numbers = self.probabilities().argmax(1) if self.outputs.is_floating_point() else self.outputs.long()
        if bool(((numbers < 0) | (numbers >= len(self.classes))).any()):
            raise TunerError(
                f"{self._name} has {len(self.classes)} classes, got the number {int(numbers.max())} of one"
            )
        return np.array(self.classes)[numbers.numpy()]

    def top(self, k: int) -> list[Ranked]:
        """Return the `k` most probable classes of each row, all of them where there are fewer."""
        shares = self.probabilities()
        if shares.ndim > 2:
            raise TunerError(f"{self._name} has classes for each place of a row, and no top {k}: see predict_proba()")
        values, numbers = (part[:, :k] for part in shares.sort(dim=1, descending=True, stable=True))
        return [
            [(self.classes[number], value) for number, value in zip(*row, strict=True)]
            for row in zip(numbers.tolist(), values.tolist(), strict=True)
        ]

    @property
    def has_probabilities(self) -> bool:
        """Whether it is of classes, and the outputs are no bare numbers of them."""
        return self.kind != "number" and self.outputs.is_floating_point()

    @property
    def has_places(self) -> bool:
        """Whether a row has several predictions, as the pixels of an image."""
        has_each = self.kind == "multilabel" or (self.kind == "classes" and self.outputs.is_floating_point())
        return self.outputs.ndim > (2 if has_each else 1)

    @property
    def _name(self) -> str:
        return f"target {self.target!r}" if self.target else "this model"

    def _finite(self, values: Tensor) -> Tensor:
        if values.is_floating_point() and not bool(values.isfinite().all()):
            row = int((~values.isfinite()).reshape(len(values), -1).any(1).nonzero()[0])
            raise BadOutputError(f"{self._name} needs outputs that are numbers, got NaN or infinity", row)
        return values


def outputs_of(model: nn.Module, inputs: Inputs) -> Tensors:
    """Return the model's outputs for all rows, some at a time. Raises TunerError for what it cannot be called on."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), tensors(inputs)[0].device)
    try:
        outputs = training.predict(model, map_inputs(lambda tensor: tensor.to(device), inputs))
    except (ValueError, IndexError, RuntimeError) as error:  # such as of an index that a table does not have
        raise TunerError(f"the model cannot be called on these rows: {first_line(error)}") from error
    if wrong := [len(part) for part in tensors(outputs) if len(part) != len(tensors(inputs)[0])]:
        raise TunerError(
            f"the model needs to give an output for each of {len(tensors(inputs)[0])} rows, got {wrong[0]}"
        )
    return outputs


def answers(outputs: Tensors, manifest: Manifest) -> list[Answer]:
    """Return what a model's outputs mean for each target. Raises TunerError if they are not those of the manifest."""
    parts = tensors(outputs)
    names = list(outputs) if isinstance(outputs, dict) else [None] * len(parts)
    described = manifest.outputs or [
        TensorDescription(name=name, shape=tuple(part.shape[1:]), dtype="")
        for name, part in zip(names, parts, strict=True)
    ]
    if len(described) != len(parts):
        raise TunerError(f"the manifest tells of {len(described)} outputs, got {len(parts)}: run 'tuner export' again")
    is_one = len(parts) == 1 and not isinstance(manifest.class_names, Mapping)
    return [
        _answer(part.detach().cpu(), "" if is_one else str(number) if its.name is None else its.name, its, manifest)
        for number, (its, part) in enumerate(zip(described, parts, strict=True))
    ]


def predictions(outputs: Tensors, manifest: Manifest) -> Any:
    """Return names of classes, or numbers, for each row; of several targets by the target's name."""
    return _by_target(answers(outputs, manifest), Answer.predictions)


def probabilities(outputs: Tensors, manifest: Manifest) -> Any:
    """Return an array (n, classes, ...) of probabilities; of several targets by name, of those that have classes."""
    found = answers(outputs, manifest)
    with_classes = [answer for answer in found if answer.kind != "number"]
    return _by_target(with_classes or found, lambda answer: answer.probabilities().numpy())


def top_k(outputs: Tensors, manifest: Manifest, k: int) -> Any:
    """Return the `k` most probable classes of each row; of several targets by name, of those that have classes."""
    if k < 1:
        raise UsageError(f"the top k needs a k of at least 1, got {k}")
    found = answers(outputs, manifest)
    with_classes = [answer for answer in found if answer.kind != "number"]
    return _by_target(with_classes or found, lambda answer: answer.top(k))


def _by_target(found: list[Answer], function: Callable[[Answer], Any]) -> Any:
    if len(found) == 1 and not found[0].target:
        return function(found[0])
    return {answer.target: function(answer) for answer in found}


def _answer(outputs: Tensor, target: str, described: TensorDescription, manifest: Manifest) -> Answer:
    named = manifest.class_names
    classes = named.get(target, ()) if isinstance(named, Mapping) else named
    if outputs.dtype in (torch.bfloat16, torch.float16):
        outputs = outputs.float()
    kind = described.kind or _likely_kind(outputs, classes)
    if kind == "binary":
        classes = classes if len(classes) == 2 else (f"not {classes[0]}", classes[0])
        if outputs.ndim > 1 and outputs.shape[1] == 1:
            outputs = outputs.squeeze(1)
    elif kind == "number":
        classes = ()
        if outputs.ndim == 2 and outputs.shape[1] == 1:
            outputs = outputs.squeeze(1)
    elif (outputs.is_floating_point() or kind == "multilabel") and (
        outputs.ndim < 2 or outputs.shape[1] != len(classes)
    ):
        raise TunerError(
            f"a model of {len(classes)} classes needs to give an output for each, got shape {list(outputs.shape)};"
            " call the model itself for its outputs"
        )
    return Answer(
        target=target,
        outputs=outputs,
        kind=kind,
        classes=classes,
        are_probabilities=described.values == "probabilities",
    )


def _likely_kind(outputs: Tensor, classes: tuple[str, ...]) -> Kind:
    """Return the kind of a target that an older export does not tell; several classes a row cannot be told then."""
    if not classes:
        return "number"
    has_one_each = outputs.ndim > 1 and outputs.shape[1] == len(classes)
    return "classes" if has_one_each or len(classes) > 2 or not outputs.is_floating_point() else "binary"
