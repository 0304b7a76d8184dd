"""The labels of a classification: which form they have, and whether they can be trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tuner.errors import DataError

Form: TypeAlias = Literal["one", "several", "binary"]
"""One class a row or a place in it, by its number; several of them, by a column for each; or how much a row is the
second of two."""
_OFTEN_NONE = (-100, -1, 255)
"""What labels that are none often are: torch's default, and what images of one byte a pixel have left."""


@dataclass(frozen=True)
class Labels:
    """What is known of the targets of a split whose classes have names; `ignored` is the label that is none."""

    n_classes: int
    ignored: int | None = None
    form: Form = "one"

    def of(self, targets: Any) -> Labels:
        """Return what is known with the form of these targets, which were checked."""
        if not targets.is_floating_point():
            return replace(self, form="one")
        return replace(self, form="several" if self._has_a_column_each(targets) else "binary")

    def known(self, targets: Tensor) -> Tensor:
        """Return where there is a label."""
        return torch.ones_like(targets, dtype=torch.bool) if self.ignored is None else targets != self.ignored

    def checked(self, targets: Any, split: str) -> Tensor:
        """Return the targets as losses take them, numbers of classes as int64 and all else as float32.

        Raises DataError that says what is wrong with them, and with which split.
        """
        if not isinstance(targets, Tensor):
            raise DataError(
                f"class_names need the names of each of several targets, got those of one for the {split} split: give"
                " a dict of them by the target's name, or a tuple of tuples in the targets' order"
            )
        if targets.is_complex():
            raise DataError(f"class labels need an integer type, got {targets.dtype} in the {split} split: use .long()")
        if targets.is_floating_point() or (targets.dtype == torch.bool and self._has_a_column_each(targets)):
            return self._checked_shares(targets.float(), split)
        if targets.shape[1:] == (1,):
            raise DataError(
                f"class labels need the shape [n], got [n, 1] in the {split} split:"
                " use .squeeze(1), or .float() for binary cross entropy"
            )
        numbers = targets.long()
        low, high = self._range(numbers)
        if low < 0 or high >= self.n_classes:
            raise DataError(
                f"labels need to be in 0..{self.n_classes - 1}, got {low:g}..{high:g} in the {split} split:"
                f" check class_names{self._advice(numbers)}"
            )
        return numbers

    def check_form(self, targets: Any, split: str) -> None:
        """Raise DataError if numbers of classes are rather a column for each class, as only many rows can show."""
        if targets.is_floating_point() or targets.dim() != 2 or not self._has_a_column_each(targets):
            return
        is_one_hot = bool((targets.sum(1) == 1).all())
        if int(targets.min()) >= 0 and int(targets.max()) == 1 and (is_one_hot or self.n_classes > 2):
            raise DataError(
                f"class labels need the number of a class, got a column of 0 and 1 for each of {self.n_classes} in the"
                f" {split} split: use .argmax(1) for one class a row, .float() where a row may have several"
            )

    def _checked_shares(self, targets: Tensor, split: str) -> Tensor:
        if self.n_classes > 2 and not self._has_a_column_each(targets):
            raise DataError(
                f"class labels need an integer type, got {targets.dtype} in the {split} split: use .long(), or give a"
                f" column for each of the {self.n_classes} classes where a row may have several"
            )
        low, high = self._range(targets)
        if low < 0 or high > 1:
            raise DataError(
                f"labels that are no integers need to be in 0..1, got {low:g}..{high:g} in the {split} split:"
                f" check class_names{self._advice(targets)}"
            )
        return targets

    def _range(self, targets: Tensor) -> tuple[float, float]:
        """Return the least and the greatest label that is some, 0 and 0 where none is."""
        found = targets if self.ignored is None else targets[targets != self.ignored]
        return (found.min().item(), found.max().item()) if found.numel() else (0, 0)

    def _has_a_column_each(self, targets: Tensor) -> bool:
        return targets.dim() > 1 and targets.shape[1] == self.n_classes

    def _advice(self, targets: Tensor) -> str:
        outside = targets[(targets < 0) | (targets >= max(self.n_classes, 2))].unique().tolist()
        if self.ignored is None and len(outside) == 1 and outside[0] in _OFTEN_NONE:
            return f", or give Data ignored={outside[0]:g} if that stands for no class"
        return ""


@dataclass(frozen=True)
class LabelsOfEach:
    """What is known of those of several targets that are of classes, by name or by place."""

    by_target: Mapping[str | int, Labels]

    def of(self, targets: Any) -> LabelsOfEach:
        """Return what is known with the forms of these targets, which were checked."""
        return LabelsOfEach({target: labels.of(targets[target]) for target, labels in self.by_target.items()})

    def checked(self, targets: Any, split: str) -> Any:
        """Return the targets as losses take them. Raises DataError that says what is wrong with which of them."""
        if isinstance(targets, Tensor):
            raise DataError(f"class_names are of several targets, got one tensor in the {split} split: give its alone")
        found = dict(targets.items() if isinstance(targets, dict) else enumerate(targets))
        if unknown := self.by_target.keys() - found.keys():
            raise DataError(
                f"class_names need names of the targets, {', '.join(map(repr, found))}, got {min(unknown, key=str)!r}"
            )
        for target in self.by_target:
            found[target] = self._told(target, "checked", found, split)
        return found if isinstance(targets, dict) else tuple(found.values())

    def check_form(self, targets: Any, split: str) -> None:
        """Raise DataError if numbers of classes are rather a column for each class."""
        for target in self.by_target:
            self._told(target, "check_form", targets, split)

    def _told(self, target: str | int, check: str, targets: Any, split: str) -> Any:
        function: Callable[[Tensor, str], Any] = getattr(self.by_target[target], check)
        try:
            return function(targets[target], split)
        except DataError as error:
            raise DataError(f"target {target!r}: {error}") from error
