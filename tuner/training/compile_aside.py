"""Compiling in a process of its own while a trial trains: what it leaves on the disk is there when the trial compiles.

That process is forked from the trial's, and so has its model, whatever that is. One works for a machine at what is
alike; its lock is a file beside what was compiled, in which it leaves a word for those that come later.
"""

from __future__ import annotations

import contextvars
import fcntl
import gc
import hashlib
import os
import re
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from torch import Tensor, nn

from storage.files import open_lock, own_directory
from tuner.data import Batch
from tuner.errors import first_line
from tuner.forks import end_with, fork
from tuner.training.checked_step import By, Parts

LIMIT_S: Final = 1800.0
NICE: Final = 5
MAX_SAID_BYTES: Final = 4096
_DONE: Final = b"compiled\n"
_NO_GRADIENTS: Final = 3
"""The exit code of a fork that can compute none."""
_ADDRESS: Final = re.compile(r" at 0x[0-9a-f]+")


class DiedError(Exception):
    """The process that compiled did not live to the end of it; the message says how it went."""


class NoForkError(Exception):
    """No fork of this process can compute gradients, as autograd runs threads in it."""


def can_compile_aside(device: torch.device, by: By) -> bool:
    """Whether a fork of this process could compile for it: not where it computes on a GPU, which is lost to a fork.

    Only inductor keeps on the disk what it has compiled.
    """
    return (
        sys.platform == "linux"
        and by.backend == "inductor"
        and device.type == "cpu"
        and not torch.cuda.is_initialized()  # by the objective
    )


class Aside:
    """What is compiled for one training by a process of its own."""

    def __init__(self, directory: Path) -> None:
        """`directory` is where torch's compiler keeps what it compiled."""
        self._directory = directory / "tuner-locks"
        self._pid: int | None = None
        self._said = -1
        self._started_at = 0.0

    @property
    def is_at_work(self) -> bool:
        """Whether a process of this training compiles, or has to be looked at."""
        return self._pid is not None

    def is_ready(self, name: str, work: Callable[[], bool]) -> bool:
        """Whether the disk has what was compiled, by this or another training's process; if none is at it, start one.

        It does the work, which returns whether anything was compiled. `name` is the same for what is alike. Raises
        DiedError, NoForkError, and OSError where no process or no lock is to be had.
        """
        if self._pid is not None:
            return self._has_ended(self._pid)
        lock = open_lock(own_directory(self._directory) / name)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if os.pread(lock, len(_DONE), 0) == _DONE:
                return True
            parent = os.getpid()
            self._started_at = time.monotonic()
            self._said = os.memfd_create("said")
            try:
                self._pid = fork()
            except OSError:
                os.close(self._said)
                raise
            if not self._pid:
                _be_process(parent, work, lock, self._said)
            return False
        finally:
            os.close(lock)  # a fork has it on

    def close(self) -> None:
        """End the process. A compiler of C++ that it started comes to its end: its file is not to be left in part."""
        if self._pid is None:
            return
        with suppress(ProcessLookupError, ChildProcessError):  # the objective waits for whatever ends
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        self._pid = None
        os.close(self._said)

    def _has_ended(self, pid: int) -> bool:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            ended, status = pid, 0
        if not ended:
            if time.monotonic() - self._started_at > LIMIT_S:
                self.close()
                raise DiedError(f"the process that compiled was not done after {LIMIT_S / 60:.0f} minutes")
            return False
        self._pid = None
        said = os.pread(self._said, MAX_SAID_BYTES, 0).decode(errors="replace")
        os.close(self._said)
        code = os.waitstatus_to_exitcode(status)
        if code == _NO_GRADIENTS:
            raise NoForkError
        if code:
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with {said or f'exit code {code}'}"
            raise DiedError(f"the process that compiled ended {how}")
        return True


def name_of(parts: Parts, batch: Batch, by: By) -> str:
    """Return a name that trainings of the same shapes and settings have in common, as far as they tell.

    Code that differs and says nothing of it has one name: then the compiler is waited for.
    """
    modules = [its for its in (parts.model, parts.loss) if isinstance(its, nn.Module)]
    tensors = [*parts.model.named_parameters(), *parts.model.named_buffers(), *enumerate(batch.columns)]
    groups = [
        {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
        for group in parts.optimizer.param_groups
    ]
    told = (
        *(sys.version, torch.__version__, torch.get_num_threads(), by, parts.precision, parts.max_grad_norm),
        *(modules, parts.loss, type(parts.optimizer), groups),
        [(name, tensor.shape, tensor.dtype, _layout(tensor)) for name, tensor in tensors],
    )
    return hashlib.sha256(_ADDRESS.sub("", repr(told)).encode(errors="replace")).hexdigest()


def _layout(tensor: Tensor) -> object:
    return tensor.stride() if tensor.layout == torch.strided else tensor.layout


def _be_process(parent: int, work: Callable[[], bool], lock: int, said: int) -> NoReturn:
    """Work, after a fork, and end; `said` is a file for why it could not."""
    try:
        os.setpgid(0, 0)  # who ends the parent's group lets a compiler of C++ come to its end
        end_with(parent)
        os.nice(NICE)
        _let_go()
        gc.freeze()  # what the parent has is not to be ended here, as its readers of samples
        # In a thread, as this one waits for the threads that OpenMP had before the fork; a new one has its own.
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(_work, work, lock, said))
        thread.start()
        thread.join()
    finally:
        os._exit(1)


def _work(work: Callable[[], bool], lock: int, said: int) -> NoReturn:
    code = 1
    try:
        if not _can_follow():
            os._exit(_NO_GRADIENTS)
        modes: Any = torch._inductor
        modes.config.compile_threads = 1  # the processes that the parent has for it are not this one's
        if work():
            os.pwrite(lock, _DONE, 0)
        code = 0
    except Exception as error:  # whatever it is, the trial tells of it
        os.pwrite(said, f"{type(error).__name__}: {first_line(error)}".encode(errors="replace")[:MAX_SAID_BYTES], 0)
        raise
    finally:
        os._exit(code)


def _can_follow() -> bool:
    """Whether gradients can be computed here: not in a fork of a process that has threads of autograd's.

    It starts them for backward passes within each other, 60 and more, and for each device, as which counts one of CUDA
    once there were fake tensors.
    """
    weight = torch.zeros(1, device="cpu", requires_grad=True)
    try:
        with torch.enable_grad():
            weight.sum().backward()
    except RuntimeError:
        return False
    return True


def _let_go() -> None:
    """Have nothing in common with the parent that another process would wait for the end of, or hear something by.

    Numbers stay taken, as objects that hold them may close them yet.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the one that lists them
            mode = os.fstat(number).st_mode
            if number < 3 or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                os.dup2(nothing, number, inheritable=number < 3)
