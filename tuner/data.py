"""The data of a trial: three splits, of tensors or of samples that are read one by one.

Nothing here knows of Optuna or of a database.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import pickle
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias
from urllib.error import URLError

import torch
from torch import Tensor

from storage.files import UntrustedError, own_directory, require_own_files
from tuner.errors import DataError as DataError
from tuner.errors import first_line
from tuner.labels import Labels, LabelsOfEach

Tensors: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""One tensor, several in order, or several by name; each has a row for each example."""
Inputs: TypeAlias = Tensors
Targets: TypeAlias = Tensors
ClassNames: TypeAlias = tuple[str, ...] | Mapping[str, tuple[str, ...]] | tuple[tuple[str, ...], ...]
"""The names of the classes; of each target, by its name or in their order, where there are several."""

# What readers of files raise for one that was cut off or is something else: of torch, NumPy, pickle and zlib.
_UNREADABLE = (RuntimeError, ValueError, LookupError, AssertionError, EOFError, pickle.UnpicklingError, zlib.error)

BROKEN_ERRNOS = frozenset({errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO})
"""What the system says of a file where its disk or its server is broken, and not the file."""
READ_ROWS = 1024
"""How many samples are read at once where all of them are needed."""


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
        return _checked(_collate(samples, self.split), self.split, self.labels)

    def to(self, device: torch.device) -> Samples:  # noqa: ARG002 - as a Split has it
        """Return the same samples: each batch goes to the device as it is read."""
        return self

    def _samples(self, rows: Sequence[int]) -> list[Any]:
        read_all = getattr(self.dataset, "__getitems__", None)
        return list(read_all(rows)) if read_all is not None else [self.dataset[row] for row in rows]


Rows: TypeAlias = Split | Samples


@dataclass(frozen=True)
class Data:
    """The three splits of an objective, and the names of its classes if it has classes.

    Targets of classes are numbers of one each, which may be of any integer type or bool; or numbers from 0 to 1, a
    column for each class, where a row may have several; or one such number where there are two classes. `ignored` is
    the label that stands for no class, such as 255 or -100. Of several targets, each that is of classes has their names
    in `class_names`, by the target's name or in the targets' order.

    The search sees `train` and `valid`; `test` is for the exported model alone. Of `Samples` only the first row
    is checked here, and each row when it is read.
    """

    train: Rows
    valid: Rows
    test: Rows
    class_names: ClassNames = ()
    ignored: int | None = None

    def __post_init__(self) -> None:
        labels = _labels_of(self.class_names, self.ignored)
        for name, split in self.splits():
            dataset = split.dataset if isinstance(split, Samples) else split
            if not isinstance(split, Split | Samples) or not hasattr(dataset, "__len__"):
                raise DataError(
                    f"the {name} split needs to be a Split of tensors or Samples, got {type(dataset).__name__}:"
                    " Samples(dataset) takes anything with __len__ and __getitem__"
                )
            if len(split) == 0:
                raise DataError(f"the {name} split needs at least one row, got none: check load_data")
            if isinstance(dataset, Split):
                dataset = _checked(dataset, name, labels)
            named = (
                replace(split, dataset=dataset, split=name, labels=labels) if isinstance(split, Samples) else dataset
            )
            object.__setattr__(self, name, named)
        first = self.train.rows(slice(0, 1))
        wanted = _layout(first)
        for name, split in self.splits():
            if (found := wanted if split is self.train else _layout(split.rows(slice(0, 1)))) != wanted:
                raise DataError(
                    "all splits need rows of the same shapes and types,"
                    f" got {wanted} in train and {found} in {name}: check load_data"
                )
            if labels is not None:
                object.__setattr__(self, name, _labelled(split, name, labels.of(first.targets)))

    def read_by(self, readers: int | None, prefetch: int | None) -> Data:
        """Return the data with so many processes to read its samples, where they do not say it themselves."""

        def with_readers(rows: Rows) -> Rows:
            if isinstance(rows, Split):
                return rows
            return replace(
                rows,
                readers=readers if rows.readers is None else rows.readers,
                prefetch=prefetch if rows.prefetch is None else rows.prefetch,
            )

        if all(isinstance(rows, Split) for _, rows in self.splits()):
            return self
        train, valid, test = (with_readers(rows) for _, rows in self.splits())
        return replace(self, train=train, valid=valid, test=test)

    def splits(self) -> Iterator[tuple[str, Rows]]:
        """Yield ("train", ...), ("valid", ...), ("test", ...)."""
        yield "train", self.train
        yield "valid", self.valid
        yield "test", self.test

    def fingerprint(self) -> str:
        """Return the sha256 of every tensor's type, shape and bytes, in hexadecimal: equal data, equal text."""
        digest = hashlib.sha256()
        for name, split in self.splits():
            for part in _parts(split):
                for tensor in part.batch.columns:
                    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


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


def join(first: Rows, second: Rows) -> Rows:
    """Return the rows of both, `first`'s first; used to retrain on train + valid."""
    if isinstance(first, Split) and isinstance(second, Split):
        return concatenate([first, second])
    from torch.utils.data import ConcatDataset

    one, other = (rows.dataset if isinstance(rows, Samples) else rows for rows in (first, second))
    like = first if isinstance(first, Samples) else second
    assert isinstance(like, Samples)
    return replace(like, dataset=ConcatDataset([one, other]))  # type: ignore[list-item]  # it only indexes them


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


def class_weights(train: Rows, n_classes: int, target: str | int | None = None) -> Tensor:
    """Return a weight for each class, n / (n_classes * its count), so that each counts the same in the loss.

    `target` is the name or the place of one of several targets. A class without rows has weight 0, and labels that are
    none do not count. Raises DataError for samples whose targets are not known beforehand, and for rows of several
    classes.
    """
    rows = train.dataset if isinstance(train, Samples) else train  # a split that is streamed still has its targets
    if not isinstance(rows, Split):
        raise DataError("class weights need targets in memory, got samples: count them once in load_data")
    if isinstance(rows.targets, Tensor):
        targets, labels = rows.targets, rows.labels
    elif target is None:
        raise DataError("class weights need the target that they are of, as there are several: give target=its name")
    else:
        targets = rows.targets[target]  # type: ignore[index]  # a name or a place, as they have
        labels = rows.labels.by_target.get(target) if isinstance(rows.labels, LabelsOfEach) else None
    if targets.is_floating_point():
        raise DataError(
            f"class weights need one class a row, got {targets.dtype}:"
            " nn.BCEWithLogitsLoss(pos_weight=...) weighs several"
        )
    if isinstance(labels, Labels):
        targets = targets[labels.known(targets)]
    counts = torch.bincount(targets.flatten(), minlength=n_classes)
    weights = targets.numel() / (n_classes * counts.clamp(min=1))
    return weights * (counts > 0)


def split_rows(
    inputs: Inputs,
    targets: Targets,
    *,
    class_names: ClassNames = (),
    valid: float = 0.2,
    test: float = 0.2,
    seed: int = 0,
    ignored: int | None = None,
) -> Data:
    """Shuffle rows into train, valid and test, the same way for the same seed.

    `valid` and `test` are fractions of all rows. With `class_names` every split gets its share of each
    class (stratified), where a row has one.
    """
    of_one = isinstance(_labels_of(class_names, ignored), Labels)
    stratified = of_one and isinstance(targets, Tensor) and targets.dim() == 1
    rest, test_ = split_in_two(Split(inputs, targets), test, stratified=stratified, seed=seed)
    train, valid_ = split_in_two(rest, valid / (1 - test), stratified=stratified, seed=seed)
    return Data(train, valid_, test_, class_names, ignored)


def split_in_two(rows: Split, second: float, *, stratified: bool = False, seed: int = 0) -> tuple[Split, Split]:
    """Shuffle rows into two parts, the same way for the same seed; `second` is the fraction of the second part.

    `stratified` gives both parts their share of each target, which has to be a class.
    """
    from sklearn.model_selection import train_test_split

    parts = train_test_split(
        range(len(rows)),
        test_size=second,
        random_state=seed % 2**32,  # all that scikit-learn takes
        stratify=tensors(rows.targets)[0].numpy() if stratified else None,
    )
    one, other = (rows.rows(torch.tensor(part)) for part in parts)
    return one, other


@contextmanager
def downloading(name: str, directory: Path, *, pickled: bool = False) -> Iterator[None]:
    """Let the block read a data set from `directory`, or download it there, in one process at a time.

    Raises DataError, in one line, if the data set is neither there nor to be had, may not be read, or is damaged; and
    if anybody else could write to the directory. What is `pickled` is code to whoever reads it: none of the directory's
    files may be anybody else's then.
    """
    try:
        own_directory(directory)
        if pickled:
            require_own_files(directory)
        handle = os.open(directory, os.O_RDONLY)
        try:
            with suppress(OSError):  # a network file system may lock no directories
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
    except DataError:
        raise
    except UntrustedError as error:
        raise DataError(f"{name} is not read from {directory}: {error}") from error
    except (OSError, *_UNREADABLE) as error:
        raise DataError(_why_not(error, name, directory)) from error


def _why_not(error: Exception, name: str, directory: Path) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None and not isinstance(error, URLError):
        return f"{name} cannot be read from {directory} or kept there ({text}): check its path and permissions"
    # torchvision tells of the network, and of what is missing, by a RuntimeError; torch of too few bytes.
    if isinstance(error, OSError) or (isinstance(error, RuntimeError) and "download" in text):
        # What is in a directory that is closed to us seems not to be there.
        closed = [path for path in directory.rglob("*") if not os.access(path, os.R_OK, effective_ids=True)]
        return (
            f"{name} is not in {directory} and cannot be downloaded ({text}"
            f"{f'; no permission to read {closed[0]}' if closed else ''}):"
            " copy it there from a machine that has it, or connect this one to the network"
        )
    cause = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{name} in {directory} is damaged or incomplete ({cause}): delete its files there, to have them downloaded"


def _parts(split: Rows) -> Iterable[Split]:
    if isinstance(split, Split):
        return (split,)
    return (split.rows(slice(start, start + READ_ROWS)) for start in range(0, len(split), READ_ROWS))


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


def _labels_of(class_names: ClassNames, ignored: int | None) -> Labels | LabelsOfEach | None:
    """Return what the names of classes tell of the labels, of each target where they are of several."""
    if not class_names:
        return None
    of_each: Mapping[Any, Any]
    if isinstance(class_names, Mapping):
        of_each = class_names
    elif isinstance(class_names[0], tuple | list):
        of_each = dict(enumerate(class_names))
    else:
        return Labels(len(class_names), ignored)
    return LabelsOfEach({target: Labels(len(names), ignored) for target, names in of_each.items() if names})


def _labelled(rows: Rows, name: str, labels: Labels | LabelsOfEach) -> Rows:
    """Return the rows with what is known of their labels. Raises DataError if no loss takes those in memory."""
    if isinstance(rows, Split):
        labels.check_form(rows.targets, name)
        return replace(rows, labels=labels)
    if isinstance(rows.dataset, Split):
        return replace(rows, dataset=_labelled(rows.dataset, name, labels), labels=labels)  # type: ignore[arg-type]
    return replace(rows, labels=labels)


def _checked(split: Split, name: str, labels: Labels | LabelsOfEach | None) -> Split:
    """Return the split with its labels as losses take them. Raises DataError if it cannot be trained on."""
    for tensor in split.batch.columns:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"the {name} split needs finite numbers, got NaN or infinity: clean the data")
    return replace(
        split, labels=labels, targets=split.targets if labels is None else labels.checked(split.targets, name)
    )


def _layout(split: Split) -> dict[str, str]:
    """Describe one row of each of the split's tensors, by name, or by place where they have none."""
    inputs = split.inputs if isinstance(split.inputs, dict) else dict(enumerate(tensors(split.inputs)))
    named = {f"input {name}": tensor for name, tensor in inputs.items()}
    if isinstance(split.targets, Tensor):
        named["targets"] = split.targets
    else:
        of_each = split.targets.items() if isinstance(split.targets, dict) else enumerate(split.targets)
        named |= {f"target {name}": tensor for name, tensor in of_each}
    return {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape[1:])}" for name, tensor in named.items()
    }
