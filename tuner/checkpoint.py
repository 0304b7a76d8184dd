"""Keeping the state of a training, so that it can go on where it was. Knows nothing of Optuna or of a database."""

from __future__ import annotations

import io
import os
import pickle
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuner.errors import first_line

State = dict[str, Any]

CHECKPOINT_EVERY_S = 30.0


class Checkpoint:
    """One file that holds the latest state of one training; a state of other `identity` is none.

    It is written on a thread, at most every `every_s` seconds: aside, synced and renamed, so that a whole one is
    there at any time once there was one. What cannot be written is logged, and training goes on.
    """

    def __init__(
        self,
        path: Path,
        *,
        identity: str = "",
        every_s: float = CHECKPOINT_EVERY_S,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._path = path
        self._identity = identity
        self._every_s = every_s
        self._log = log
        self._due_at = time.monotonic() + every_s
        self._writer: threading.Thread | None = None

    def load(self) -> State | None:
        """Return the state that was saved last, None if there is none that can be used. Nothing is unpickled."""
        try:
            saved = torch.load(self._path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            self._log(f"the checkpoint {self._path} cannot be read, starting again: {reason}")
            return None
        if not isinstance(saved, dict) or saved.get("identity") != self._identity:
            self._log(f"the checkpoint {self._path} is of another training, starting again")
            return None
        state: State = saved["state"]
        return state

    def is_due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() >= self._due_at and (self._writer is None or not self._writer.is_alive())

    def save(self, state: State) -> None:
        """Save a copy of the state, taken now and written meanwhile."""
        self.close()
        copied = {"identity": self._identity, "state": _on_cpu(state)}
        self._due_at = time.monotonic() + self._every_s
        self._writer = threading.Thread(target=self._write, args=(copied,), name=f"checkpoint {self._path.name}")
        self._writer.start()

    def close(self) -> None:
        """Wait until what was saved is on the disk."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def delete(self) -> None:
        """Delete the file, and what writers that were killed have left beside it."""
        self.close()
        for path in (self._path, *self._path.parent.glob(f"{self._path.name}.*")):
            with suppress(OSError):
                path.unlink()
        with suppress(OSError):  # others have theirs in it
            self._path.parent.rmdir()

    def _write(self, state: State) -> None:
        # In memory first: on a full disk torch's own writer ends the process (torch 2.15, 2026-11).
        buffer = io.BytesIO()
        torch.save(state, buffer)
        aside = self._path.with_name(f"{self._path.name}.{socket.gethostname()}-{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self._path)
            _sync_directory(self._path.parent)
        except OSError as error:
            self._log(f"cannot write the checkpoint {self._path}: {error.strerror or error}; the one before is kept")
            with suppress(OSError):
                aside.unlink()


def generator_states(device: torch.device) -> State:
    """Return the states of the global generators: Python's, NumPy's, torch's on the CPU and on the device."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: State = {
        "python": random.getstate(),
        # NumPy's arrays are not among what torch loads without unpickling.
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_generator_states(state: Mapping[str, Any], device: torch.device) -> None:
    """Set the global generators to what `generator_states` returned; one of another kind of device stays."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def _on_cpu(value: Any) -> Any:
    """Copy a tree of dicts, lists and tuples, its tensors to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
