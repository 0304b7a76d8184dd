"""Cutting rows into batches: from tensors on the device, or from samples as they are read.

Knows nothing of Optuna or of a database.
"""

from __future__ import annotations

import atexit
import dataclasses
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import cache, partial
from typing import TypeAlias

import torch
from torch import Tensor

from tuner.data import (
    Batch,
    Data,
    DataError,
    Rows,
    Samples,
    Split,
    concatenate,
    like,
    tensors,
)
from tuner.spec import DataPlace
from tuner.training.devices import memory_of
from tuner.training.loaders import (
    DeadReaderError,
    Planned,
    kill,
    loader_of,
    planned,
    read_batch,
    unwatched,
    watched,
    workers_of,
)
from tuner.training.rereading import is_alike, moved, places

PERMUTED_BYTES = 64 * 2**20
"""How much of a split is put in the order of an epoch at once; batches are views of that."""
RESIDENT_SHARE = 0.5
"""The share of the device's free memory that data may take, so that models and other slots have the rest."""
MAX_READERS = 8
READ_ROWS = 256
"""How many samples are read at once where they become resident."""
CHECKED_ROWS = 64
"""How many samples of each split are read before training where they are streamed: enough to find what is wrong with a
tenth of them, such as the last of ten classes, all but once in a thousand times."""
REREAD_ROWS = 16
"""How many of them are read again: random ones that are the same so often are none."""
CLOSE_S = 2.0
"""How long processes that read have to end by themselves."""


class Resident:
    """Batches of tensors that are on the device already; nothing here waits for it."""

    waited_s = 0.0

    def __init__(self, split: Split, batch_size: int) -> None:
        self._split = split
        self._batch_size = batch_size
        self.order_device = split.device

    def in_order(self) -> Iterator[Batch]:
        """Yield all rows in their order."""
        return self._cut(self._split.batch)

    def shuffled(self, order: Tensor, first: int = 0, seed: int = 0) -> Iterator[Batch]:  # noqa: ARG002 - for samples
        """Yield the rows in this order, a tensor of their numbers on the device, from batch `first` on."""
        order = order[first * self._batch_size :]
        if len(order) == 0:  # splitting nothing gives one empty batch, whose loss is NaN
            return
        per_row = max(1, self._split.n_bytes // len(self._split))
        batches_at_once = max(1, PERMUTED_BYTES // (per_row * self._batch_size))
        for rows in order.split(batches_at_once * self._batch_size):
            # One gather for many batches, as one for each costs as much as the step of a small model.
            yield from self._cut(self._split.batch.map(lambda tensor, rows=rows: tensor.index_select(0, rows)))  # type: ignore[misc]

    def close(self) -> None:
        """Do nothing: it holds nothing but the rows."""

    def _cut(self, rows: Batch) -> Iterator[Batch]:
        n_inputs = len(tensors(rows.inputs))
        for part in zip(*(tensor.split(self._batch_size) for tensor in rows.columns), strict=True):
            yield Batch(like(rows.inputs, part[:n_inputs]), like(rows.targets, part[n_inputs:]))


class Streamed:
    """Batches that a `DataLoader` reads, ahead of training and in processes of its own, and copies to the device.

    `waited_s` is how long the reader of the batches had to wait for them, in all.
    """

    order_device = torch.device("cpu")

    def __init__(self, samples: Samples, batch_size: int, device: torch.device, readers: int | None = None) -> None:
        self.waited_s = 0.0
        self._samples = samples
        self._batch_size = batch_size
        self._device = device
        self._plan: list[Planned] = []
        self._reading: Generator[Batch, None, None] | None = None
        self._at_exit: Callable[[], None] | None = None
        self._copies = _AheadOnCuda(device) if device.type == "cuda" else None
        self._loader = loader_of(samples, self._plan, device, _readers_of(samples) if readers is None else readers)

    def in_order(self) -> Iterator[Batch]:
        """Yield all rows in their order."""
        return self.shuffled(torch.arange(len(self._samples)))

    def shuffled(self, order: Tensor, first: int = 0, seed: int = 0) -> Iterator[Batch]:
        """Yield the rows in this order, a tensor of their numbers, from batch `first` on.

        Random samples follow from `seed` and the number of their batch, whichever process reads them. Raises
        DeadReaderError if one of these processes ended, at most 5 s later.
        """
        self._plan[:] = planned(order, self._batch_size, seed)[first:]
        self._reading = self.read_batch()
        return self._reading

    def close(self) -> None:
        """End the processes that read; there are no more batches after it.

        Left to the garbage collector, which may take their queues first, it takes 5 s (torch 2.15, 2026-11).
        """
        workers = workers_of(self._loader)
        # Torch waits 5 s for each, and ends those that are stuck in a read by a SIGTERM, which they outlive.
        killing = threading.Timer(CLOSE_S, kill, [workers])
        if workers:
            killing.start()
        with unwatched():
            if self._reading is not None:
                self._reading.close()
            self._loader = None
            killing.cancel()
            kill(workers)
            for worker in workers:
                worker.join()
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)

    def read_batch(self) -> Generator[Batch, None, None]:
        started_at = time.perf_counter()
        for read in watched(self._loader):
            if self._at_exit is None:
                # Where it is never closed: what ends processes at the exit waits for them, and they outlive a SIGTERM.
                self._at_exit = atexit.register(partial(kill, workers_of(self._loader)))
            if isinstance(read, Exception):
                raise read
            batch = _moved(read, self._device) if self._copies is None else self._copies.swap(read)
            if batch is None:
                continue
            self.waited_s += time.perf_counter() - started_at
            yield batch
            started_at = time.perf_counter()
        if self._copies is not None and (last := self._copies.swap(None)) is not None:
            yield last


class _AheadOnCuda:
    """Copies each batch to a CUDA device while the one before it is computed on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned: Batch | None = None
        self._copied: Batch | None = None

    def swap(self, read: Batch | None) -> Batch | None:
        """Begin to copy what was read, and return the batch before, ready for the current stream.

        Raises RuntimeError if the device has failed: to free pinned memory then would end the process (pytorch issue
        178154), so that what was copied last is kept.
        """
        stream, using = _copy_stream(self._device), torch.cuda.current_stream(self._device)
        using.query()
        batch, self._copied = self._copied, None
        if batch is not None:
            using.wait_stream(stream)
            for tensor in batch.columns:
                tensor.record_stream(using)  # its memory was taken by the other stream
        if read is not None:
            with torch.cuda.stream(stream):
                self._copied = _moved(read, self._device)
        self._pinned = read
        return batch


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _moved(batch: Batch, device: torch.device) -> Batch:
    # MPS would read pageable memory after it was freed (pytorch issues 139550 and 189690).
    return batch.map(partial(Tensor.to, device=device, non_blocking=device.type == "cuda"))


Batches: TypeAlias = Resident | Streamed


def batches_of(rows: Rows, batch_size: int, device: torch.device, readers: int | None = None) -> Batches:
    """Return the batches of `rows` on the device. Raises DataError if they are tensors on another one."""
    if isinstance(rows, Samples):
        return Streamed(rows, batch_size, device, readers)
    found = {tensor.device for tensor in rows.batch.columns}
    if found != {device}:
        listed = ", ".join(sorted(map(str, found)))
        raise DataError(f"model and data need to be on one device, got the model on {device} and data on {listed}")
    return Resident(rows, batch_size)


def place(
    data: Data,
    device: torch.device,
    how: DataPlace = "auto",
    log: Callable[[str], None] = lambda _: None,
    *,
    share: float = 1.0,
) -> Data:
    """Return the data with train and valid placed by `place_rows`; the test split stays as it is."""
    train, valid = place_rows((data.train, data.valid), device, how, log, share=share)
    return dataclasses.replace(data, train=train, valid=valid)


def place_rows(
    parts: Sequence[Rows],
    device: torch.device,
    how: DataPlace,
    log: Callable[[str], None],
    *,
    share: float = 1.0,
) -> tuple[Rows, ...]:
    """Return the rows where they are trained on: on the device, or to be read and copied to it as needed.

    `auto` keeps them on the device if they fit into half of its free memory, and into half of the part `share` of all
    that it has: others that start at the same time find the same memory free. What was chosen is logged. Raises
    DataError if random samples are to be resident, or if samples cannot be trained on: of those that become resident
    all are read now, of those to be streamed CHECKED_ROWS from all over each split. Raises it as well for samples of
    which `readable` says so.
    """
    wanted, (free, total) = sum(_n_bytes(rows) for rows in parts), memory_of(device)
    is_random = any(isinstance(rows, Samples) and rows.random for rows in parts)
    if how == "resident" and is_random:
        raise DataError("random samples cannot be resident, as they would be the same in each epoch: use --data stream")
    fits = wanted <= RESIDENT_SHARE * min(free, share * total) or all(_is_on(rows, device) for rows in parts)
    resident = how == "resident" or (how == "auto" and fits and not is_random)
    part = f", a share of {_mb(share * total)}" if share < 1 else ""
    why = f"{_mb(wanted)}, {_mb(free)} free{part}" + (", random" if is_random else "")
    log(f"data {'resident on' if resident else 'streamed to'} {device} ({why}, --data {how})")
    found = tuple(readable(rows, log) for rows in parts)
    return tuple(_make_resident(rows, device) if resident else _make_streamed(rows) for rows in found)


def default_readers() -> int:
    """Return how many processes read samples: this process's share of the cores, as torch's threads have it."""
    return min(MAX_READERS, torch.get_num_threads())


def _make_resident(rows: Rows, device: torch.device) -> Split:
    if isinstance(rows, Split):
        return rows.to(device)
    if isinstance(rows.dataset, Split):
        return rows.dataset.to(device)
    with closing(Streamed(rows, READ_ROWS, torch.device("cpu"))) as read:
        return concatenate([Split(*batch, rows.labels) for batch in read.in_order()]).to(device)


def _make_streamed(rows: Rows) -> Samples:
    return Samples(rows.to(torch.device("cpu")), labels=rows.labels) if isinstance(rows, Split) else rows


def readable(rows: Rows, log: Callable[[str], None] = lambda _: None) -> Rows:
    """Return the rows, samples with as many processes to read them as can.

    Processes that would share the place of an open file are none, which is logged. Raises DataError if samples cannot
    be trained on, or if those that are not `random` differ when they are read again, by this process or another.
    """
    if not isinstance(rows, Samples) or isinstance(rows.dataset, Split):
        return rows
    n = min(CHECKED_ROWS, len(rows))
    numbers = [place * len(rows) // n for place in range(n)]
    first = _raised(read_batch(rows, numbers))
    if rows.labels is not None:
        rows.labels.check_form(first.targets, rows.split)
    again = slice(None, None, max(1, n // REREAD_ROWS))
    numbers, wanted = numbers[again], Split(*first).rows(again).batch
    if not rows.random and not is_alike(_raised(read_batch(rows, numbers)), wanted):
        raise DataError(
            f"samples of the {rows.split} split differ when they are read again: say Samples(dataset, random=True) if"
            " they are meant to, or let a row be the same each time"
        )
    rows = dataclasses.replace(rows, readers=_readers_of(rows))
    if not rows.readers:
        return rows
    read_batch(rows, numbers[:1])  # so that it is elsewhere in a file than one who reads all of them
    before = places()
    found = _read_by_processes(rows, numbers)
    if (file := moved(before, places())) is not None:
        log(
            f"samples of the {rows.split} split are read by this process alone, as {rows.readers} processes would share"
            f" the open file {file} and its place: open it anew in each process (os.getpid()) to have them read ahead"
        )
        return dataclasses.replace(rows, readers=0)
    if isinstance(found, DataError) or (found is not None and not rows.random and not is_alike(found, wanted)):
        why = f" ({found})" if isinstance(found, DataError) else ""
        raise DataError(
            f"processes that read samples of the {rows.split} split get other rows than this one{why}: see that they"
            " share no open file or connection, or use --readers 0"
        )
    return rows


def _read_by_processes(samples: Samples, numbers: list[int]) -> Batch | DataError | None:
    """Return rows as the processes of `samples` read them, at the same time; None if one of them ended."""
    with closing(Streamed(samples, 1, torch.device("cpu"))) as streamed:
        try:
            return concatenate([Split(*batch) for batch in streamed.shuffled(torch.tensor(numbers))]).batch
        except DataError as error:
            return error
        except DeadReaderError:  # the training tells it, as its own end
            return None


def _raised(read: Batch | Exception) -> Batch:
    if isinstance(read, Exception):
        raise read
    return read


def _readers_of(samples: Samples) -> int:
    return default_readers() if samples.readers is None else samples.readers


def _is_on(rows: Rows, device: torch.device) -> bool:
    return isinstance(rows, Split) and rows.device == device


def _n_bytes(rows: Rows) -> int:
    if isinstance(rows, Split):
        return rows.n_bytes
    return rows.rows(slice(0, 1)).n_bytes * len(rows)


def _mb(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.0f} MB"
