"""The data of a trial: three splits of rows, how they are joined and cut, and whether they go together.

What rows are is in `tuner.rows`; all that an objective needs of both is to be had here. Nothing here knows of Optuna
or of a database.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tuner.downloads import downloading
from tuner.errors import DataError
from tuner.labels import Labels, LabelsOfEach
from tuner.rows import (
    BROKEN_ERRNOS,
    Batch,
    DataSet,
    Inputs,
    Rows,
    Samples,
    Split,
    Targets,
    Tensors,
    checked,
    concatenate,
    concatenated,
    is_of_shared_memory,
    like,
    map_inputs,
    tensors,
)

__all__ = [
    "BROKEN_ERRNOS",
    "READ_ROWS",
    "Batch",
    "ClassNames",
    "Data",
    "DataError",
    "DataSet",
    "Inputs",
    "Rows",
    "Samples",
    "Split",
    "Targets",
    "Tensors",
    "class_weights",
    "concatenate",
    "concatenated",
    "downloading",
    "is_of_shared_memory",
    "join",
    "like",
    "map_inputs",
    "split_in_two",
    "split_rows",
    "tensors",
]

ClassNames: TypeAlias = tuple[str, ...] | Mapping[str, tuple[str, ...]] | tuple[tuple[str, ...], ...]
"""The names of the classes; of each target, by its name or in their order, where there are several."""
READ_ROWS = 1024
"""How many samples are read at once where all of them are needed."""


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
                dataset = checked(dataset, name, labels)
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


def join(first: Rows, second: Rows) -> Rows:
    """Return the rows of both, `first`'s first; used to retrain on train + valid."""
    if isinstance(first, Split) and isinstance(second, Split):
        return concatenate([first, second])
    from torch.utils.data import ConcatDataset

    one, other = (rows.dataset if isinstance(rows, Samples) else rows for rows in (first, second))
    like = first if isinstance(first, Samples) else second
    assert isinstance(like, Samples)
    return replace(like, dataset=ConcatDataset([one, other]))  # type: ignore[list-item]  # it only indexes them


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


def _parts(split: Rows) -> Iterable[Split]:
    if isinstance(split, Split):
        return (split,)
    return (split.rows(slice(start, start + READ_ROWS)) for start in range(0, len(split), READ_ROWS))


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
