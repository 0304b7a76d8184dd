"""Cutting rows into batches: from tensors on the device, or from samples as they are read.

Knows nothing of Optuna or of a database.
"""

from __future__ import annotations

import atexit
import dataclasses
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from tuner.data import (
    Batch,
    Data,
    DataError,
    Inputs,
    Rows,
    Samples,
    Split,
    concatenate,
    is_of_shared_memory,
    map_inputs,
    tensors,
)
from tuner.errors import first_line
from tuner.seeds import derive_seed, seed_everything
from tuner.spec import DataPlace

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
PREFETCHED = 4
"""How many batches each reader is ahead."""
CLOSE_S = 2.0
"""How long processes that read have to end by themselves."""
_DEAD_READER = ("DataLoader worker (pid", "Pin memory thread exited unexpectedly")  # what torch says of one


class DeadReaderError(Exception):
    """A process that reads samples ended by itself, killed by a host out of memory as a rule."""


class Resident:
    """Batches of tensors that are on the device already; nothing here waits for it."""

    waited_s = 0.0

    def __init__(self, split: Split, batch_size: int) -> None:
        self._split = split
        self._batch_size = batch_size
        self.order_device = split.targets.device

    def in_order(self) -> Iterator[Batch]:
        """Yield all rows in their order."""
        return self._cut(self._split.inputs, self._split.targets)

    def shuffled(self, order: Tensor, first: int = 0, seed: int = 0) -> Iterator[Batch]:  # noqa: ARG002 - for samples
        """Yield the rows in this order, a tensor of their numbers on the device, from batch `first` on."""
        order = order[first * self._batch_size :]
        if len(order) == 0:  # splitting nothing gives one empty batch, whose loss is NaN
            return
        per_row = max(1, self._split.n_bytes // len(self._split))
        batches_at_once = max(1, PERMUTED_BYTES // (per_row * self._batch_size))
        for rows in order.split(batches_at_once * self._batch_size):
            # One gather for many batches, as one for each costs as much as the step of a small model.
            yield from self._cut(
                map_inputs(lambda tensor, rows=rows: tensor.index_select(0, rows), self._split.inputs),  # type: ignore[misc]
                self._split.targets.index_select(0, rows),
            )

    def close(self) -> None:
        """Do nothing: it holds nothing but the rows."""

    def _cut(self, inputs: Inputs, targets: Tensor) -> Iterator[Batch]:
        columns = zip(*(tensor.split(self._batch_size) for tensor in tensors(inputs)), strict=True)
        for column, its_targets in zip(columns, targets.split(self._batch_size), strict=True):
            yield Batch(_like(inputs, column), its_targets)


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
        self._plan: list[_Planned] = []
        self._reading: Generator[Batch, None, None] | None = None
        self._at_exit: Callable[[], None] | None = None
        self._copies = _AheadOnCuda(device) if device.type == "cuda" else None
        self._loader = _loader(samples, self._plan, device, default_readers() if readers is None else readers)

    def in_order(self) -> Iterator[Batch]:
        """Yield all rows in their order."""
        return self.shuffled(torch.arange(len(self._samples)))

    def shuffled(self, order: Tensor, first: int = 0, seed: int = 0) -> Iterator[Batch]:
        """Yield the rows in this order, a tensor of their numbers, from batch `first` on.

        Random samples follow from `seed` and the number of their batch, whichever process reads them. Raises
        DeadReaderError if one of these processes ended, at most 5 s later.
        """
        self._plan[:] = _planned(order, self._batch_size, seed)[first:]
        self._reading = self._read()
        return self._reading

    def close(self) -> None:
        """End the processes that read; there are no more batches after it.

        Left to the garbage collector, which may take their queues first, it takes 5 s (torch 2.15, 2026-11).
        """
        workers = _workers(self._loader)
        # Torch waits 5 s for each, and ends those that are stuck in a read by a SIGTERM, which they outlive.
        killing = threading.Timer(CLOSE_S, _kill, [workers])
        if workers:
            killing.start()
        if self._reading is not None:
            self._reading.close()
        self._loader = None
        killing.cancel()
        _kill(workers)
        for worker in workers:
            worker.join()
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)

    def _read(self) -> Generator[Batch, None, None]:
        started_at = time.perf_counter()
        for read in _watched(self._loader):
            if self._at_exit is None:
                # Where it is never closed: what ends processes at the exit waits for them, and they outlive a SIGTERM.
                self._at_exit = atexit.register(partial(_kill, _workers(self._loader)))
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
            for tensor in (*tensors(batch.inputs), batch.targets):
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
    move = partial(Tensor.to, device=device, non_blocking=device.type == "cuda")
    return Batch(map_inputs(move, batch.inputs), move(batch.targets))


Batches: TypeAlias = Resident | Streamed


def batches_of(rows: Rows, batch_size: int, device: torch.device, readers: int | None = None) -> Batches:
    """Return the batches of `rows` on the device. Raises DataError if they are tensors on another one."""
    if isinstance(rows, Samples):
        return Streamed(rows, batch_size, device, readers)
    found = {tensor.device for tensor in (*tensors(rows.inputs), rows.targets)}
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
    all are read now, of those to be streamed CHECKED_ROWS from all over each split.
    """
    wanted, (free, total) = sum(_n_bytes(rows) for rows in parts), _free_bytes(device)
    is_random = any(isinstance(rows, Samples) and rows.random for rows in parts)
    if how == "resident" and is_random:
        raise DataError("random samples cannot be resident, as they would be the same in each epoch: use --data stream")
    fits = wanted <= RESIDENT_SHARE * min(free, share * total) or all(_is_on(rows, device) for rows in parts)
    resident = how == "resident" or (how == "auto" and fits and not is_random)
    part = f", a share of {_mb(share * total)}" if share < 1 else ""
    why = f"{_mb(wanted)}, {_mb(free)} free{part}" + (", random" if is_random else "")
    log(f"data {'resident on' if resident else 'streamed to'} {device} ({why}, --data {how})")
    if resident:
        return tuple(_make_resident(rows, device) for rows in parts)
    for rows in parts:
        _check_some(rows)
    return tuple(_make_streamed(rows) for rows in parts)


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


def _check_some(rows: Rows) -> None:
    if isinstance(rows, Samples):
        n = min(CHECKED_ROWS, len(rows))
        read = _read(rows, [place * len(rows) // n for place in range(n)])
        if isinstance(read, Exception):
            raise read


def _is_on(rows: Rows, device: torch.device) -> bool:
    return isinstance(rows, Split) and rows.targets.device == device


def _n_bytes(rows: Rows) -> int:
    if isinstance(rows, Split):
        return rows.n_bytes
    return rows.rows(slice(0, 1)).n_bytes * len(rows)


def _free_bytes(device: torch.device) -> tuple[int, int]:
    """Return how much of the device's memory is free, and how much there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:  # macOS tells what there is, not what is free of it
        return total, total
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), total


def _mb(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.0f} MB"


def _like(inputs: Inputs, parts: tuple[Tensor, ...]) -> Inputs:
    if isinstance(inputs, Tensor):
        return parts[0]
    return dict(zip(inputs, parts, strict=True)) if isinstance(inputs, dict) else parts


class _Planned(NamedTuple):
    """A batch to be read: its rows, and the seed of what is random in them."""

    seed: int
    rows: list[int]


def _planned(order: Tensor, batch_size: int, seed: int) -> list[_Planned]:
    return [
        _Planned(derive_seed(seed, "batch", number), rows.tolist())
        for number, rows in enumerate(order.split(batch_size))
    ]


class _Reader:
    """What a reading process reads: a whole batch at a time, checked."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, row: int) -> Any:
        raise NotImplementedError  # the loader asks for batches

    def __getitems__(self, planned: _Planned) -> Batch | Exception:
        in_process = get_worker_info() is not None
        if self._samples.random and in_process:
            seed_everything(planned.seed)  # a process that lives on would go on where it was in the last epoch
        return _read(self._samples, planned.rows, shared=in_process)


def _read(samples: Samples, rows: list[int], *, shared: bool = False) -> Batch | Exception:
    """Return the batch, or what is to be raised instead.

    A loader would put a whole traceback into its message, and lose the number of an OSError.
    """
    try:
        batch = samples.read(rows).batch
        if shared:  # the queue would do it, but in a thread that drops what finds no room and lets all wait for ever
            for tensor in (*tensors(batch.inputs), batch.targets):
                tensor.share_memory_()
    except (DataError, MemoryError, OSError) as error:
        return error
    except RuntimeError as error:
        if not is_of_shared_memory(error):
            raise
        return DataError(
            f"processes that read samples need shared memory, got {first_line(error)!r}:"
            " give it a larger /dev/shm (docker --shm-size), or use --data resident"
        )
    return batch


def _loader(samples: Samples, plan: list[_Planned], device: torch.device, readers: int) -> Any:
    in_processes: dict[str, Any] = {}
    if readers:
        # By fork where there is one: an objective that was loaded from a file cannot be imported by its name.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        readers = _possible_readers(samples.dataset, readers, context.get_start_method())
    if readers:
        in_processes = {
            "worker_init_fn": _outlive_sigterm,
            "persistent_workers": True,
            "prefetch_factor": PREFETCHED,
            "multiprocessing_context": context,
        }
    return DataLoader(
        _Reader(samples),  # type: ignore[arg-type]  # it has what the loader needs
        batch_sampler=plan,  # type: ignore[arg-type]  # what it yields goes to the reader as it is
        num_workers=readers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]  # it gets what the reader returns
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # or it would draw from the global one
        **in_processes,
    )


def _possible_readers(dataset: Any, readers: int, start_method: str) -> int:
    """Return 0 where a process that is not forked could not import the data set's class: one of an objective's file."""
    parts = [dataset, *getattr(dataset, "datasets", ()), getattr(dataset, "dataset", None)]  # joined, or a subset
    of_file = any(type(part).__module__.startswith("tuner_objective_") for part in parts)
    return 0 if of_file and start_method != "fork" else readers


def _started(loader: Any) -> Iterator[Any]:
    """Start the readers. The handler that torch sets for their end raises in whatever the main thread does then."""
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)  # torch sets none
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _watched(loader: Any) -> Iterator[Any]:
    """Yield what is read; what samples raise is among it, so that all that is raised is of the reading itself.

    Starting is part of that: a later epoch's finds out about a reader that was killed between the epochs.
    """
    try:
        yield from _started(loader)
    except (OSError, EOFError, RuntimeError) as error:  # the first two where what it had sent cannot be taken over
        if isinstance(error, RuntimeError) and not any(told in str(error) for told in _DEAD_READER):
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise MemoryError(f"no memory to start a process that reads samples: {error}") from error
        raise DeadReaderError("a process that reads samples was killed, as a host out of memory does it") from error


def _workers(loader: Any) -> list[Any]:
    """Return the processes that read for this loader, if it has been started."""
    return list(getattr(getattr(loader, "_iterator", None), "_workers", ()))


def _kill(workers: Sequence[Any]) -> None:
    for worker in workers:
        worker.kill()


def _outlive_sigterm(_: int) -> None:
    # A scheduler sends SIGTERM to all processes, and the training has yet to be saved: it ends its readers itself.
    # Not ignored, which what a data set starts would inherit.
    signal.signal(signal.SIGTERM, lambda *_: None)


def _as_it_is(read: Batch | Exception) -> Batch | Exception:
    return read
