"""Keeping the state of a training, so that it can go on where it was. Knows nothing of Optuna or of a database."""

from __future__ import annotations

import hashlib
import io
import pickle
import random
import struct
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from storage import files
from tuner.errors import SharedPlaceError, first_line
from tuner.spec import Spec
from tuner.training.devices import generator_state, set_generator_state

State = dict[str, Any]

Progress: TypeAlias = tuple[int, int]
"""How far a training has come: the epochs that have ended, and the batches of the next one."""

COPY_S: Final = 5.0
"""How long the end of a training waits until its last state is copied; a worker that is stopped has 10 s in all."""
COPY_SHARE: Final = 0.05
"""The part of the time that copying may take: what is large, or goes to a busy place, is copied less often."""

# What a checkpoint begins with: a mark, whose state it is, how far that has come, and its size and checksum.
_HEAD: Final = struct.Struct(">8s32sQQQI")
_MARK: Final = b"tunerck1"
_BLOCK_BYTES: Final = 2**20


class Shared(Protocol):
    """Where other machines find the checkpoint of one trial; `str` tells people where.

    Each call raises SharedPlaceError.
    """

    def head(self, n_bytes: int) -> bytes | None:
        """Return its first bytes, None if there is none."""

    def read(self) -> bytes | None:
        """Return it, None if there is none."""

    def write(self, data: memoryview, give_up: threading.Event) -> None:
        """Replace it as a whole, or leave it as it is: the latter once `give_up` is set."""

    def delete(self) -> None:
        """Delete it, if there is one."""


class Checkpoint:
    """One file that holds the latest state of one training, and a copy of it where other machines find it.

    It is written on a thread, at most every `every_s` seconds: aside, synced and renamed, so that a whole one is
    there at any time once there was one; then it is copied to `shared`. What cannot be written is logged, and
    training goes on. A state of other `identity` is none.
    """

    def __init__(
        self,
        path: Path,
        *,
        identity: str = "",
        shared: Shared | None = None,
        every_s: float = Spec.model_fields["checkpoint_every_s"].default,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._file = _File(path)
        self._identity = hashlib.sha256(identity.encode()).digest()
        self._shared = shared
        self._every_s = every_s
        self._log = log
        self._due_at = time.monotonic() + every_s
        self._copy_due_at = 0.0
        self._is_file_broken = self._is_copying_broken = False
        self._saving: _Saving | None = None
        self._copying: _Saving | None = None  # the one that was told to copy last

    def load(self) -> State | None:
        """Return the state that has come furthest of the file and its copy, None if there is none that can be used.

        Nothing is unpickled.
        """
        places: list[_File | Shared] = [self._file] if self._shared is None else [self._file, self._shared]
        found: list[tuple[Progress, _File | Shared]] = []
        problems: list[str] = []
        for place in places:
            try:
                head = place.head(_HEAD.size)
                if head is not None:
                    found.append((self._progress(head), place))
            except _UNUSABLE as error:
                problems.append(_described(place, error))
        state = None
        for _, place in sorted(found, key=lambda pair: pair[0], reverse=True):  # of equals the file, being nearer
            try:
                state = self._read(place)
                break
            except _UNUSABLE as error:
                problems.append(_described(place, error))
        for problem in problems:
            self._log(problem if state is not None else f"{problem}; starting again")
        return state

    def is_due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() >= self._due_at and (self._saving is None or self._saving.is_written.is_set())

    def save(self, state: State, progress: Progress, *, last: bool = False) -> None:
        """Save a copy of the state, taken now and written meanwhile; `last` if the training ends here for now."""
        if self._saving is not None:
            self._saving.is_written.wait()
        before = self._copying if self._copying is not None and self._copying.thread.is_alive() else None
        if before is not None and last:
            before.give_up.set()
        copies = self._shared is not None and (last or (before is None and time.monotonic() >= self._copy_due_at))
        saving = _Saving(last=last)
        saving.thread = threading.Thread(
            target=self._write,
            args=(_on_cpu(state), progress, saving, copies, before),
            name=f"checkpoint {self._file}",
            daemon=True,  # close() waits for the file, and no longer than COPY_S for a place that may be away
        )
        self._saving = saving
        if copies:
            self._copying = saving
        self._due_at = time.monotonic() + self._every_s
        saving.thread.start()

    def close(self, *, copied: bool = False) -> None:
        """Wait until what was saved is on the disk, and for a while until the last state is copied.

        With `copied` a state that is being copied counts as the last one, as no other comes.
        """
        if self._saving is None:
            return
        self._saving.is_written.wait()
        copying = self._copying
        if copying is not None and copying.thread.is_alive():
            if not copying.last and not copied:
                copying.give_up.set()
            copying.thread.join(COPY_S)
            if copying.thread.is_alive() and not copying.give_up.is_set():
                copying.give_up.set()
                self._log(f"cannot copy the checkpoint to {self._shared}: it takes longer than {COPY_S:g} s")
        self._saving = self._copying = None

    def delete(self) -> None:
        """Delete the file and its copy, and what writers that were killed have left beside it."""
        self.close()
        self._file.delete()
        if self._shared is not None:
            try:
                self._shared.delete()
            except SharedPlaceError as error:
                self._log(f"cannot delete the checkpoint in {self._shared}: {error}")

    def _progress(self, head: bytes) -> Progress:
        epochs, batches, _, _ = _unpacked(head, self._identity)
        return epochs, batches

    def _read(self, place: _File | Shared) -> State:
        if isinstance(place, _File):
            with place.open() as stream:
                return _loaded(stream, self._identity)
        data = place.read()
        if data is None:
            raise _UnusableError("it is gone")
        return _loaded(io.BytesIO(data), self._identity)

    def _write(self, state: State, progress: Progress, saving: _Saving, copies: bool, before: _Saving | None) -> None:
        try:
            data = self._packed(state, progress)
            try:
                self._file.write(data)
                self._is_file_broken = False
            except OSError as error:
                reason = error.strerror or str(error)
                if not self._is_file_broken:
                    self._log(f"cannot write the checkpoint {self._file}: {reason}; the one before is kept")
                self._is_file_broken = True
        finally:
            saving.is_written.set()
        if not copies:
            return
        if before is not None:
            before.thread.join()
        if not saving.give_up.is_set():
            self._copy(data, saving.give_up)

    def _packed(self, state: State, progress: Progress) -> memoryview:
        # In memory first: on a full disk torch's own writer ends the process (torch 2.15, 2026-11).
        buffer = io.BytesIO(bytes(_HEAD.size))
        buffer.seek(_HEAD.size)
        torch.save(state, buffer)
        with buffer.getbuffer() as data, data[_HEAD.size :] as body:
            head = _HEAD.pack(_MARK, self._identity, *progress, len(body), zlib.crc32(body))
        buffer.seek(0)
        buffer.write(head)
        # Of its bytes, which it hands over: a view of the buffer itself that is left in a cycle, such as an error's
        # traceback, crashed the garbage collector of Python 3.12.1.
        return memoryview(buffer.getvalue())

    def _copy(self, data: memoryview, give_up: threading.Event) -> None:
        assert self._shared is not None
        started_at = time.monotonic()
        try:
            self._shared.write(data, give_up)
        except SharedPlaceError as error:
            if not self._is_copying_broken:
                self._log(f"cannot copy the checkpoint to {self._shared}: {error}")
            self._is_copying_broken = True
            return
        self._is_copying_broken = False
        ended_at = time.monotonic()
        self._copy_due_at = ended_at + (ended_at - started_at) * (1 / COPY_SHARE - 1)


class _Saving:
    """One state that is being written: `is_written` once that is over, and the copying may begin."""

    thread: threading.Thread

    def __init__(self, *, last: bool) -> None:
        self.last = last
        self.is_written = threading.Event()
        self.give_up = threading.Event()


class _File:
    """A checkpoint's file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def head(self, n_bytes: int) -> bytes | None:
        try:
            with self.open() as stream:
                return stream.read(n_bytes)
        except FileNotFoundError:
            return None

    def open(self) -> BinaryIO:
        return files.open_own(self._path)

    def write(self, data: memoryview) -> None:
        """Replace it, so that it is whole at any time. Raises OSError, and then leaves it as it was."""
        files.replace(self._path, data)

    def delete(self) -> None:
        for path in (self._path, *self._path.parent.glob(f"{self._path.name}.*")):
            with suppress(OSError):
                path.unlink()
        with suppress(OSError):  # others have theirs in it
            self._path.parent.rmdir()


class _UnusableError(ValueError):
    """What was read is no checkpoint of this training."""


_UNUSABLE: Final = (_UnusableError, SharedPlaceError, OSError, RuntimeError, EOFError, pickle.UnpicklingError)


def _described(place: _File | Shared, error: Exception) -> str:
    reason = (
        str(error)
        if isinstance(error, _UnusableError | SharedPlaceError)
        else f"{type(error).__name__}: {first_line(error)}"
    )
    return f"cannot use the checkpoint {place}: {reason}"


def _unpacked(head: bytes, identity: bytes) -> tuple[int, int, int, int]:
    """Return epochs, batches, size and checksum. Raises _UnusableError if it is not one of this training."""
    if len(head) < _HEAD.size or not head.startswith(_MARK):
        raise _UnusableError("it is none, or cut off")
    _, its_identity, epochs, batches, size, checksum = _HEAD.unpack(head)
    if its_identity != identity:
        raise _UnusableError("it is of another training")
    return epochs, batches, size, checksum


def _loaded(stream: BinaryIO, identity: bytes) -> State:
    _, _, size, checksum = _unpacked(stream.read(_HEAD.size), identity)
    found, n_bytes = 0, 0
    while block := stream.read(_BLOCK_BYTES):
        found, n_bytes = zlib.crc32(block, found), n_bytes + len(block)
    if (n_bytes, found) != (size, checksum):
        raise _UnusableError(f"it is damaged: {n_bytes} bytes of {size}")
    stream.seek(_HEAD.size)
    state = torch.load(stream, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise _UnusableError(f"it holds {type(state).__name__} and no state")
    return state


def generator_states(device: torch.device) -> State:
    """Return the states of the global generators: Python's, NumPy's, torch's on the CPU and on the device."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: State = {
        "python": random.getstate(),
        # NumPy's arrays are not among what torch loads without unpickling.
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if (of_device := generator_state(device)) is not None:
        state[device.type] = of_device
    return state


def set_generator_states(state: Mapping[str, Any], device: torch.device) -> None:
    """Set the global generators to what `generator_states` returned; one of another kind of device stays."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type in state:
        set_generator_state(state[device.type], device)


def _on_cpu(value: Any) -> Any:
    """Copy a tree of dicts, lists and tuples, its tensors to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value
