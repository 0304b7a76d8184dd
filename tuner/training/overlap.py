"""Rows that stand in two splits, which makes one of them tell too much. Knows nothing of Optuna or of a database."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch

from tuner.data import Data, Rows, Samples, Split, tensors

LOOKED_AT_ROWS, LOOKED_AT_BYTES = 2_000_000, 2**30
"""How much data is looked at; that takes 2 s (2 cores, 2026-11), and more would take what nobody waits for."""


def overlaps(data: Data) -> Iterator[str]:
    """Yield a line for each two splits of tensors of which the second has rows with the inputs of some in the first.

    Samples are not looked at, as all of them would have to be read.
    """
    parts = {name: split for name, rows in data.splits() if (split := _in_memory(rows)) is not None}
    if sum(map(len, parts.values())) > LOOKED_AT_ROWS or sum(its.n_bytes for its in parts.values()) > LOOKED_AT_BYTES:
        return
    found = {name: _hashes(split) for name, split in parts.items()}
    for first, second in combinations(found, 2):
        known = set(found[first])
        if n := sum(row in known for row in found[second]):
            yield (
                f"{n:,} of {len(found[second]):,} rows of the {second} split have inputs that stand in {first} too:"
                " it tells too much of what was learned by heart, unless load_data means them to"
            )


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
