"""A few rows of the test split, with what the model gives for them: where it is right, and where it errs most."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tuner.data import Rows, tensors
from tuner.model.images import png_of
from tuner.model.manifest import TensorDescription, TestedRow

N_EACH = 8
MAX_VALUES = 16
"""Numbers of a row that are shown."""


class Samples:
    """Takes rows of a split for people to look at, at most `n_each` of a kind."""

    def __init__(self, rows: Rows, inputs: Sequence[TensorDescription], seed: int, n_each: int = N_EACH) -> None:
        self._n_each = n_each
        self._rows = rows
        self._inputs = inputs
        self._seed = seed

    def of_classes(
        self, rows: Tensor, wanted: Tensor, given: Tensor, confidence: Tensor, names: Any
    ) -> tuple[list[TestedRow], list[TestedRow]]:
        """Return (wrong, right) of rows with the numbers of their classes: the surest wrong ones, and some right."""
        is_wrong = wanted != given
        surest = torch.argsort(torch.where(is_wrong, confidence, -1.0), descending=True, stable=True)
        wrong, right = surest[: min(self._n_each, int(is_wrong.sum()))], self._some((~is_wrong).nonzero().flatten())

        def shown(number: int) -> TestedRow:
            row = int(rows[number])
            return TestedRow(
                row=row,
                wanted=str(names[int(wanted[number])]),
                given=str(names[int(given[number])]),
                confidence=float(confidence[number]),
                **self._look(row),
            )

        return [shown(number) for number in wrong.tolist()], [shown(number) for number in right.tolist()]

    def of_numbers(self, wanted: Tensor, given: Tensor) -> tuple[list[TestedRow], list[TestedRow]]:
        """Return (wrong, right) of rows with a number each: the furthest off, and some of the others."""
        order = torch.argsort((wanted - given).abs(), descending=True, stable=True)

        def shown(row: int) -> TestedRow:
            return TestedRow(row=row, wanted=float(wanted[row]), given=float(given[row]), **self._look(row))

        furthest, others = order[: self._n_each], self._some(order[self._n_each :])
        return [shown(row) for row in furthest.tolist()], [shown(row) for row in others.tolist()]

    def _some(self, rows: Tensor) -> Tensor:
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self._seed))
        return rows[drawn[: self._n_each]].sort().values

    def _look(self, row: int) -> dict[str, Any]:
        """Return what can be seen of a row, as `TestedRow` has it."""
        values = [value[0].cpu() for value in tensors(self._rows.rows(slice(row, row + 1)).inputs)]
        for value, its in zip(values, self._inputs, strict=True):
            if not value.is_complex() and (png := png_of(value.double().numpy(), its)) is not None:
                return {"image": base64.b64encode(png).decode()}
        if sum(value.numel() for value in values) > MAX_VALUES or any(value.is_complex() for value in values):
            return {}
        return {"values": [number for value in values for number in value.double().flatten().tolist()]}
