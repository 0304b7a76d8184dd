"""Reading samples ahead, in processes that a `DataLoader` starts. Knows nothing of Optuna or of a database."""

from __future__ import annotations

import errno
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from tuner.data import Batch, DataError, Samples, is_of_shared_memory
from tuner.errors import first_line
from tuner.seeds import derive_seed, seed_everything

PREFETCHED = 4
"""How many batches each reader is ahead."""
_DEAD_READER = ("DataLoader worker (pid", "Pin memory thread exited unexpectedly")  # what torch says of one


class DeadReaderError(Exception):
    """A process that reads samples ended by itself, killed by a host out of memory as a rule."""


class Planned(NamedTuple):
    """A batch to be read: its rows, and the seed of what is random in them."""

    seed: int
    rows: list[int]


def planned(order: Tensor, batch_size: int, seed: int) -> list[Planned]:
    return [
        Planned(derive_seed(seed, "batch", number), rows.tolist())
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

    def __getitems__(self, planned: Planned) -> Batch | Exception:
        in_process = get_worker_info() is not None
        if self._samples.random and in_process:
            seed_everything(planned.seed)  # a process that lives on would go on where it was in the last epoch
        return read_batch(self._samples, planned.rows, shared=in_process)


def read_batch(samples: Samples, rows: list[int], *, shared: bool = False) -> Batch | Exception:
    """Return the batch, or what is to be raised instead.

    A loader would put a whole traceback into its message, and lose the number of an OSError.
    """
    try:
        batch = samples.read(rows).batch
        if shared:  # the queue would do it, but in a thread that drops what finds no room and lets all wait for ever
            for tensor in batch.columns:
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


def loader_of(samples: Samples, plan: list[Planned], device: torch.device, readers: int) -> Any:
    in_processes: dict[str, Any] = {}
    if readers:
        # By fork where there is one: readers are there at once, and share what the data set holds.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        in_processes = {
            "worker_init_fn": _outlive_sigterm,
            "persistent_workers": True,
            "prefetch_factor": samples.prefetch or PREFETCHED,
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


def _started(loader: Any) -> Iterator[Any]:
    """Start the readers. The handler that torch sets for their end raises in whatever the main thread does then."""
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)  # torch sets none
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, handler)


def watched(loader: Any) -> Iterator[Any]:
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


def workers_of(loader: Any) -> list[Any]:
    """Return the processes that read for this loader, if it has been started."""
    return list(getattr(getattr(loader, "_iterator", None), "_workers", ()))


@contextmanager
def unwatched() -> Iterator[None]:
    """Let no handler of SIGCHLD raise in the block: torch sets one for others' loaders, and a reader is ended here."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)


def kill(workers: Sequence[Any]) -> None:
    for worker in workers:
        worker.kill()


def _outlive_sigterm(_: int) -> None:
    # A scheduler sends SIGTERM to all processes, and the training has yet to be saved: it ends its readers itself.
    # Not ignored, which what a data set starts would inherit.
    signal.signal(signal.SIGTERM, lambda *_: None)


def _as_it_is(read: Batch | Exception) -> Batch | Exception:
    return read
