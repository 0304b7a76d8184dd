"""The data of a trial: three splits of resident tensors.

Nothing here knows of Optuna or of a database.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


class DataError(ValueError):
    """The data of an objective cannot be trained on; the message says which split and why."""


@dataclass(frozen=True)
class Split:
    """Rows to train or evaluate on.

    `inputs` is what the model is called with: one tensor (n, ...), a tuple of them (`model(*inputs)`) or a
    dict of them (`model(**inputs)`). `targets` is a tensor (n, ...). Row i of each belongs together.
    """

    inputs: Inputs
    targets: Tensor

    def __post_init__(self) -> None:
        inputs = tensors(self.inputs) if isinstance(self.inputs, tuple | dict) else (self.inputs,)
        for tensor in (*inputs, self.targets):
            if not isinstance(tensor, Tensor) or tensor.dim() == 0:
                kind = "one number" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise DataError(
                    "inputs need to be a tensor with a row for each example, or a tuple or dict of such, and targets"
                    f" a tensor, got {kind}: use torch.as_tensor"
                )
        lengths = {len(tensor) for tensor in (*inputs, self.targets)}
        if len(lengths) != 1:
            raise DataError(f"inputs and targets need the same number of rows, got {sorted(lengths)}: check load_data")

    def __len__(self) -> int:
        return len(self.targets)

    def rows(self, index: Tensor | slice) -> Split:
        """Return the rows at `index`, an integer tensor on the split's device or a slice."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device) -> Split:
        """Return the split on `device`; the tensors that are there already are shared, not copied."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Split:
        return Split(map_inputs(function, self.inputs), function(self.targets))


@dataclass(frozen=True)
class Data:
    """The three splits of an objective, and the names of its classes if it has classes.

    The search sees `train` and `valid`; `test` is for the exported model alone.
    """

    train: Split
    valid: Split
    test: Split
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, split in self.splits():
            self._check(name, split)
        for name, split in self.splits():
            if _layout(split) != _layout(self.train):
                raise DataError(
                    "all splits need rows of the same shapes and types,"
                    f" got {_layout(self.train)} in train and {_layout(split)} in {name}: check load_data"
                )

    def splits(self) -> Iterator[tuple[str, Split]]:
        """Yield ("train", ...), ("valid", ...), ("test", ...)."""
        yield "train", self.train
        yield "valid", self.valid
        yield "test", self.test

    def fingerprint(self) -> str:
        """Return the sha256 of every tensor's type, shape and bytes, in hexadecimal: equal data, equal text."""
        digest = hashlib.sha256()
        for name, split in self.splits():
            for tensor in (*tensors(split.inputs), split.targets):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _check(self, name: str, split: Split) -> None:
        if len(split) == 0:
            raise DataError(f"the {name} split needs at least one row, got none: check load_data")
        for tensor in (*tensors(split.inputs), split.targets):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise DataError(f"the {name} split needs finite numbers, got NaN or infinity: clean the data")
        n_classes = len(self.class_names)
        if n_classes:
            if split.targets.is_floating_point():
                raise DataError(
                    f"class labels need an integer type, got {split.targets.dtype} in the {name} split: use .long()"
                )
            low, high = int(split.targets.min()), int(split.targets.max())
            if low < 0 or high >= n_classes:
                raise DataError(
                    f"labels need to be in 0..{n_classes - 1}, got {low}..{high} in the {name} split: check class_names"
                )


def tensors(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the tensors of `inputs` in order."""
    if isinstance(inputs, Tensor):
        return (inputs,)
    return tuple(inputs.values()) if isinstance(inputs, dict) else inputs


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Return `inputs` with each tensor replaced by `function` of it."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, dict):
        return {name: function(tensor) for name, tensor in inputs.items()}
    return tuple(function(tensor) for tensor in inputs)


def join(first: Split, second: Split) -> Split:
    """Return the rows of both, `first`'s first; used to retrain on train + valid."""
    inputs: Inputs
    if isinstance(first.inputs, dict):
        assert isinstance(second.inputs, dict)
        inputs = {name: torch.cat([tensor, second.inputs[name]]) for name, tensor in first.inputs.items()}
    else:
        pairs = zip(tensors(first.inputs), tensors(second.inputs), strict=True)
        joined = tuple(torch.cat(pair) for pair in pairs)
        inputs = joined[0] if isinstance(first.inputs, Tensor) else joined
    return Split(inputs, torch.cat([first.targets, second.targets]))


def split_rows(
    inputs: Tensor,
    targets: Tensor,
    *,
    class_names: tuple[str, ...] = (),
    valid: float = 0.2,
    test: float = 0.2,
    seed: int = 0,
) -> Data:
    """Shuffle rows into train, valid and test, the same way for the same seed.

    `valid` and `test` are fractions of all rows. With `class_names` every split gets its share of each
    class (stratified).
    """
    from sklearn.model_selection import train_test_split

    labels = targets.numpy() if class_names else None
    state = seed % 2**32  # all that scikit-learn takes
    rest, test_rows = train_test_split(range(len(targets)), test_size=test, random_state=state, stratify=labels)
    train_rows, valid_rows = train_test_split(
        rest,
        test_size=valid / (1 - test),
        random_state=state,
        stratify=None if labels is None else labels[rest],
    )
    whole = Split(inputs, targets)
    train, valid_, test_ = (whole.rows(torch.tensor(rows)) for rows in (train_rows, valid_rows, test_rows))
    return Data(train, valid_, test_, class_names)


def _layout(split: Split) -> dict[str, str]:
    """Describe one row of each of the split's tensors, by name, or by place where they have none."""
    inputs = split.inputs if isinstance(split.inputs, dict) else dict(enumerate(tensors(split.inputs)))
    named = {**{f"input {name}": tensor for name, tensor in inputs.items()}, "targets": split.targets}
    return {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape[1:])}" for name, tensor in named.items()
    }
