"""Commands that begin without importing anything: forked from a process that has imported what commands need.

An import of torch is most of what a short command costs, and there are a thousand of them. Each is a process of its own
as it is otherwise, with its own streams, directory and environment; only Python's start and the imports are left out.
`TUNER_TEST_FRESH=1` has each start by itself, as a user's does; so does any variable that imports look at.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, NoReturn

__all__ = ["Process", "may_fork", "start"]

_KNOWN = ("TUNER_", "PG", "SLURM_")  # what is looked at by commands alone, and after their imports
_LONGEST = 100_000


def may_fork(environment: Mapping[str, str]) -> bool:
    """Whether a command with these variables beside those of the tests may do without imports of its own."""
    return "TUNER_TEST_FRESH" not in os.environ and all(name.startswith(_KNOWN) for name in environment)


def start(arguments: Sequence[str], environment: Mapping[str, str], directory: Path) -> Process:
    """Start a command, its program first, in this directory and with exactly these variables."""
    request = json.dumps([list(arguments), dict(environment), str(directory)]).encode()
    assert len(request) < _LONGEST
    (out, its_out), (err, its_err) = os.pipe(), os.pipe()
    told, its_told = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its_told, open(os.devnull) as nothing:
        socket.send_fds(_parent(), [request], [nothing.fileno(), its_out, its_err, its_told.fileno()])
    os.close(its_out)
    os.close(its_err)
    return Process(told, open(out), open(err))


class Process:
    """A command that was forked; what it has of `subprocess.Popen` does the same."""

    def __init__(self, told: socket.socket, stdout: IO[str], stderr: IO[str]) -> None:
        self._told = told
        self.stdout = stdout
        self.stderr = stderr
        self.pid = int(told.recv(100))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = int(self._told.recv(100))
            self._told.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.stderr.close()
        self.wait()


@cache
def _parent() -> socket.socket:
    ours, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its_end:
        descriptor = its_end.fileno()
        process = subprocess.Popen([sys.executable, "-P", __file__, str(descriptor)], pass_fds=[descriptor])

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _serve(requests: socket.socket) -> None:
    """Fork a command for each request, until nobody makes any more; returns in each command, which it has become."""
    running: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor that tells of its end
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not requests:
                    selector.unregister(key.fd)
                    _tell_its_end(key.fd, *running.pop(key.fd))
                    continue
                request, descriptors, _, _ = socket.recv_fds(requests, _LONGEST, 4)
                if not request:
                    os._exit(0)
                *streams, told = descriptors
                telling = socket.socket(fileno=told)
                pid = os.fork()
                if pid == 0:
                    for each in (requests, telling, *(other for _, other in running.values())):
                        each.close()
                    _become(streams, *json.loads(request))
                    return
                for stream in streams:
                    os.close(stream)
                telling.send(str(pid).encode())
                watch = os.pidfd_open(pid)
                running[watch] = pid, telling
                selector.register(watch, selectors.EVENT_READ)


def _tell_its_end(watch: int, pid: int, telling: socket.socket) -> None:
    os.close(watch)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with telling, contextlib.suppress(OSError):  # nobody waits for it
        telling.send(str(code).encode())


def _become(streams: Sequence[int], arguments: list[str], environment: dict[str, str], directory: str) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - these three stay open
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def _end(code: int) -> NoReturn:
    """End as the interpreter does, but for taking all modules to pieces."""
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _import() -> None:
    """Import what commands do."""
    from tuner.imports import quick_imports

    modules = ("sklearn.datasets", "torch.export", "torch._dynamo", "torchmetrics", "objectives.digits")
    with quick_imports():
        for module in (*modules, "tuner.cli.app", "tuner.model.export", "tuner.slot.slot"):
            importlib.import_module(module)
        sys.modules["tuner.cli.app"].make_app()


if __name__ == "__main__":
    _import()
    _serve(socket.socket(fileno=int(sys.argv[1])))
    from tuner.cli import main

    try:
        main()
    except SystemExit as request:
        _end(request.code)
