"""The rows of a split, of tensors or of samples that are read one by one, and what tensors they are made of.

Nothing here knows of Optuna or of a database.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from tuner.errors import DataError, first_line
from tuner.labels import Labels, LabelsOfEach

Tensors: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""One tensor, several in order, or several by name; each has a row for each example."""
Inputs: TypeAlias = Tensors
Targets: TypeAlias = Tensors

BROKEN_ERRNOS = frozenset({errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO})
"""What the system says of a file where its disk or its server is broken, and not the file."""


class Batch(NamedTuple):
    """Some rows: like a `Split`, but without its checks, as one is cut for each step of training."""

    inputs: Inputs
    targets: Targets

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """The tensors of the inputs and then of the targets."""
        return (*tensors(self.inputs), *tensors(self.targets))

    @property
    def n_rows(self) -> int:
        """How many rows it has."""
        return len(tensors(self.targets)[0])

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with each tensor replaced by `function` of it."""
        return Batch(map_inputs(function, self.inputs), map_inputs(function, self.targets))


@dataclass(frozen=True)
class Split:
    """Rows to train or evaluate on.

    `inputs` is what the model is called with: one tensor (n, ...), a tuple of them (`model(*inputs)`) or a
    dict of them (`model(**inputs)`). `targets` is a tensor (n, ...), or a tuple or dict of them for a model that gives
    an output for each, in order or by name. Row i of each belongs together. `labels` is set by `Data`.
    """

    inputs: Inputs
    targets: Targets
    labels: Labels | LabelsOfEach | None = None

    def __post_init__(self) -> None:
        parts = [tensors(part) if isinstance(part, tuple | dict) else (part,) for part in (self.inputs, self.targets)]
        for part, name in zip(parts, ("inputs", "targets"), strict=True):
            if not part:
                raise DataError(f"{name} need at least one tensor, got none: check load_data")
        for tensor in (*parts[0], *parts[1]):
            if not isinstance(tensor, Tensor) or tensor.dim() == 0:
                kind = "one number" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise DataError(
                    "inputs need to be a tensor with a row for each example, or a tuple or dict of such, and targets"
                    f" too, got {kind}: use torch.as_tensor"
                )
        lengths = {len(tensor) for tensor in self.batch.columns}
        if len(lengths) != 1:
            raise DataError(f"inputs and targets need the same number of rows, got {sorted(lengths)}: check load_data")

    def __len__(self) -> int:
        return self.batch.n_rows

    def __getitem__(self, row: int) -> tuple[Inputs, Targets]:
        """Return one row, as a data set of samples does."""
        return self.batch.map(lambda tensor: tensor[row])

    @property
    def batch(self) -> Batch:
        """All its rows as one batch."""
        return Batch(self.inputs, self.targets)

    @property
    def n_bytes(self) -> int:
        """The size of its tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.batch.columns)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.batch.columns[-1].device

    def rows(self, index: Tensor | slice) -> Split:
        """Return the rows at `index`, an integer tensor on the split's device or a slice."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device) -> Split:
        """Return the split on `device`; the tensors that are there already are shared, not copied."""
        # MPS would read pageable memory after it was freed (pytorch issues 139550 and 189690).
        return self._map(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Split:
        mapped = self.batch.map(function)
        return replace(self, inputs=mapped.inputs, targets=mapped.targets)


class DataSet(Protocol):
    """What `Samples` reads: `dataset[i]` is (inputs, target) of row i, as torchvision's data sets give it.

    Inputs are a tensor, a tuple or a dict of tensors; a target is a tensor or a number, or a tuple or dict of such.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Any: ...


@dataclass(frozen=True)
class Samples:
    """Rows that are read one by one from a data set, for data that does not fit into memory.

    Where it does fit, it is read once and kept as a `Split` (`--data auto`), unless it is `random`: reading a
    row twice gives different ones, as random augmentation does. `readers` is how many processes read it, 0 for none
    but the slot's own, and `prefetch` how many batches each is ahead; None for what the study says (`--readers`,
    `--prefetch`). `split` and `labels` are set by `Data`.
    """

    dataset: DataSet
    random: bool = False
    split: str = ""
    labels: Labels | LabelsOfEach | None = None
    readers: int | None = None
    prefetch: int | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, index: Tensor | slice) -> Split:
        """Read the rows at `index`, which may be a slice. Raises DataError if they cannot be trained on."""
        return self.read(torch.arange(len(self))[index].tolist())

    def read(self, rows: Sequence[int]) -> Split:
        """Read these rows. Raises DataError, naming the split, if they cannot be read or trained on.

        Raises MemoryError where memory ran out, and OSError where a disk is broken: neither is of the data.
        """
        if isinstance(self.dataset, Split):
            return self.dataset.rows(torch.tensor(rows))
        try:
            samples = self._samples(rows)
        except Exception as error:
            if (of_machine := _of_machine(error)) is not None:
                raise of_machine from error
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise DataError(
                f"the {self.split} split cannot be read: {type(error).__name__}: {first_line(error)}"
                f" ({place.filename}, line {place.lineno})"
            ) from error
        return checked(_collate(samples, self.split), self.split, self.labels)

    def to(self, device: torch.device) -> Samples:  # noqa: ARG002 - as a Split has it
        """Return the same samples: each batch goes to the device as it is read."""
        return self

    def _samples(self, rows: Sequence[int]) -> list[Any]:
        read_all = getattr(self.dataset, "__getitems__", None)
        return list(read_all(rows)) if read_all is not None else [self.dataset[row] for row in rows]


Rows: TypeAlias = Split | Samples


def tensors(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the tensors of `inputs` in order."""
    if isinstance(inputs, Tensor):
        return (inputs,)
    return tuple(inputs.values()) if isinstance(inputs, dict) else inputs


def is_of_shared_memory(error: BaseException) -> bool:
    """Whether torch found no shared memory for a tensor."""
    return isinstance(error, RuntimeError) and ("shared memory" in str(error) or "</torch_" in str(error))


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Return `inputs` with each tensor replaced by `function` of it."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, dict):
        return {name: function(tensor) for name, tensor in inputs.items()}
    return tuple(function(tensor) for tensor in inputs)


def concatenate(splits: Sequence[Split]) -> Split:
    """Return the rows of all splits, one after the other."""
    return replace(
        splits[0],
        inputs=concatenated([split.inputs for split in splits]),
        targets=concatenated([split.targets for split in splits]),
    )


def concatenated(parts: Sequence[Tensors]) -> Tensors:
    """Return the rows of all parts, which are of one form, one after the other."""
    first = parts[0]
    if isinstance(first, dict):
        return {name: torch.cat([part[name] for part in parts]) for name in first}  # type: ignore[index, call-overload]
    return like(first, [torch.cat(column) for column in zip(*map(tensors, parts), strict=True)])


def like(form: Tensors, columns: Iterable[Tensor]) -> Tensors:
    """Return tensors in the form of others: one, several in order, or by the same names."""
    if isinstance(form, Tensor):
        (column,) = columns
        return column
    return dict(zip(form, columns, strict=True)) if isinstance(form, dict) else tuple(columns)


def checked(split: Split, name: str, labels: Labels | LabelsOfEach | None) -> Split:
    """Return the split with its labels as losses take them. Raises DataError if it cannot be trained on."""
    for tensor in split.batch.columns:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"the {name} split needs finite numbers, got NaN or infinity: clean the data")
    return replace(
        split, labels=labels, targets=split.targets if labels is None else labels.checked(split.targets, name)
    )


def _collate(samples: list[Any], name: str) -> Split:
    from torch.utils.data import default_collate

    try:
        inputs, targets = default_collate(samples)
    except (TypeError, ValueError, RuntimeError) as error:
        if is_of_shared_memory(error):
            raise
        if (of_machine := _of_machine(error)) is not None:
            raise of_machine from error
        raise DataError(
            f"a sample of the {name} split needs to be (inputs, target), tensors of one shape in all rows:"
            f" {first_line(error)}"
        ) from error
    inputs, targets = (tuple(part) if isinstance(part, list) else part for part in (inputs, targets))
    return Split(inputs, targets)


def _of_machine(error: Exception) -> Exception | None:
    """Return what to raise for an error that is the machine's and not the data's: a plain one, which can be sent."""
    if isinstance(error, OSError) and error.errno in BROKEN_ERRNOS:
        return OSError(error.errno, error.strerror, error.filename)
    no_memory = (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))  # torch's, of the host
    )
    return MemoryError(first_line(error) or "out of memory") if no_memory else None
