"""Rows that stand in two splits, which makes one of them tell too much. Knows nothing of Optuna or of a database."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch

from tuner.data import Data, Rows, Samples, Split, tensors

LOOKED_AT_ROWS, LOOKED_AT_BYTES = 2_000_000, 2**30
"""How much data is looked at; that takes 2 s (2 cores, 2026-11), and more would take what nobody waits for."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Two splits of which `n` of the `n_rows` rows of the second have the inputs of some in the first."""

    first: str
    second: str
    n: int
    n_rows: int
    is_identical: bool
    """Whether both have the same rows, each as often."""

    def __str__(self) -> str:
        return (
            f"{self.n:,} of {self.n_rows:,} rows of the {self.second} split have inputs that stand in {self.first} too:"
            " it tells too much of what was learned by heart, unless load_data means them to"
        )


def overlaps(data: Data) -> list[Overlap]:
    """Return each two splits of tensors that have rows in common, by their inputs.

    Samples are not looked at, as all of them would have to be read.
    """
    parts = {name: split for name, rows in data.splits() if (split := _in_memory(rows)) is not None}
    if sum(map(len, parts.values())) > LOOKED_AT_ROWS or sum(its.n_bytes for its in parts.values()) > LOOKED_AT_BYTES:
        return []
    hashes = {name: _hashes(split) for name, split in parts.items()}
    found = []
    for first, second in combinations(hashes, 2):
        known, rows = set(hashes[first]), hashes[second]
        if n := sum(row in known for row in rows):
            is_identical = n == len(rows) == len(hashes[first]) and sorted(rows) == sorted(hashes[first])
            found.append(Overlap(first=first, second=second, n=n, n_rows=len(rows), is_identical=is_identical))
    return found


def _in_memory(rows: Rows) -> Split | None:
    found = rows.dataset if isinstance(rows, Samples) else rows
    return found if isinstance(found, Split) else None


def _hashes(split: Split) -> list[int]:
    """Return a number of 64 bits for the inputs of each row."""
    columns = []
    for tensor in tensors(split.inputs):
        if tensor.numel() == 0:
            continue
        rows = tensor.detach().cpu().reshape(len(tensor), -1).contiguous().view(torch.uint8)
        width, content = rows.shape[1], rows.numpy().data.cast("B")
        columns.append([hash(bytes(content[start : start + width])) for start in range(0, len(content), width)])
    return [hash(row) for row in zip(*columns, strict=True)]
