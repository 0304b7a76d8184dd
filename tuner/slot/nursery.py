"""Forks slots from a process that has imported all that they need, which takes seconds: each starts in a moment, and
what was imported is in memory once.

That process is forked itself: from one that has imported the objective, or from a worker that has not, and never will.
A request comes over a socket, with the ends of the slot's standard streams and of a socket to answer it: `Request` as
JSON. The answers are lines of JSON: the slot's `pid`, and when it has ended its `code`, as of `Popen.returncode`; or
why no slot can be forked from here, `unsuited`.

A request with `data` and one more socket makes another nursery, which loads the data before it takes requests by that
socket; or ends, if it cannot.
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing.util
import os
import selectors
import signal
import socket
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

from tuner.exits import OF_SIGNAL, handle_until_fork
from tuner.forks import end_with, fork
from tuner.slot.preparing import AS_READ, import_objective, import_torch, listen

MAX_REQUEST_BYTES: Final = 1 << 16
_N_STREAMS: Final = 3
_DEVICES: Final = ("/dev/nvidia", "/dev/kfd", "/dev/dri")
_PROBE_S: Final = 10.0


def can_fork() -> bool:
    """Whether slots can be forked here: on Linux, from 5.3 on."""
    if not hasattr(os, "pidfd_open"):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:  # an older kernel, or one that is none
        return False
    return True


def forked_from_here() -> tuple[int, socket.socket]:
    """Fork a nursery from this process, which has imported the objective.

    Returns the number of the process, and the socket that takes requests.
    """
    why_not = _with_threads()  # a process that is forked knows of no others than its own
    return _forked(lambda requests: _serve(requests, why_not))


def forked_to_import(environment: dict[str, str], directory: str, printed: int) -> tuple[int, socket.socket]:
    """Fork a process that imports torch, and once that is known, the objective that the first request names.

    Then it is a nursery. It prints to the descriptor `printed`, and has this environment and directory. Returns as
    `forked_from_here` does. Until it is a nursery, and hears of it by its socket, it is killed with this process.
    """
    why_not = _with_threads()
    # The kernel goes by the thread that forked, and only the first one lasts as long as the process.
    worker = os.getpid() if threading.get_native_id() == os.getpid() else None

    def import_and_serve(requests: socket.socket) -> None:
        if worker is not None:
            end_with(worker)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number, stream in enumerate((nothing, nothing, printed)):
            os.dup2(stream, number)
        os.close(nothing)
        os.close(printed)
        os.environ.update(environment)
        os.chdir(directory)
        _open_streams()
        listen()
        import_torch()
        if reference := requests.recv(MAX_REQUEST_BYTES).decode():
            import_objective(reference)
            end_with(None)
            _serve(requests, why_not)

    return _forked(import_and_serve)


def _forked(serve: Callable[[socket.socket], None]) -> tuple[int, socket.socket]:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with suppress(OSError, ValueError, AttributeError):  # nobody reads it, or the objective did away with it
        sys.stdout.flush()
        sys.stderr.flush()
    if pid := fork():
        its.close()
        return pid, ours
    try:
        _forget_ends()
        os.setsid()  # a Ctrl-C at the terminal reaches the worker alone
        handle_until_fork([number for number in OF_SIGNAL if number != signal.SIGINT], lambda *_: None)
        ours.close()
        serve(its)
    finally:
        _end(0)


def _serve(requests: socket.socket, why_not: str | None = None) -> None:
    """Fork a slot for each request, until nobody can make any more: slots that are left then notice by their parent.

    None is forked if there is something against it: `why_not`, or what is found here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # what is there is shared with the slots, which a look for garbage would write to
    _Nursery(requests, why_not or _with_threads() or _unsuited()).run()


class _Nursery:
    def __init__(self, requests: socket.socket, why_not: str | None) -> None:
        self._requests = requests
        self._why_not = why_not
        self._slots: list[_Slot] = []
        self._selector = selectors.DefaultSelector()
        self._is_over = False

    def run(self) -> None:
        self._selector.register(self._requests, selectors.EVENT_READ, self._fork_slot)
        while not self._is_over:
            for key, _ in self._selector.select():
                key.data()

    def _fork_slot(self) -> None:
        text, streams, _, _ = socket.recv_fds(self._requests, MAX_REQUEST_BYTES, _N_STREAMS + 2)
        if not text:
            self._is_over = True
            return
        requests = streams.pop() if len(streams) > _N_STREAMS + 1 else None
        answers = socket.socket(fileno=streams.pop())
        parent = os.getpid()
        if self._why_not is not None:
            _tell(answers, unsuited=self._why_not)
            answers.close()
            self._is_over = True
        elif pid := fork():
            slot = _Slot(pid, os.pidfd_open(pid), answers)
            self._slots.append(slot)
            self._selector.register(slot.pidfd, selectors.EVENT_READ, partial(self._tell_end, slot))
            _tell(answers, pid=pid)
        else:
            answers.close()
            self._close()
            _become(json.loads(text), streams, None if requests is None else socket.socket(fileno=requests), parent)
        for descriptor in streams if requests is None else (*streams, requests):
            os.close(descriptor)

    def _tell_end(self, slot: _Slot) -> None:
        self._selector.unregister(slot.pidfd)
        self._slots.remove(slot)
        _, status = os.waitpid(slot.pid, 0)
        _tell(slot.answers, code=os.waitstatus_to_exitcode(status))
        slot.close()

    def _close(self) -> None:
        self._selector.close()
        self._requests.close()
        for slot in self._slots:
            slot.close()


@dataclass(frozen=True)
class _Slot:
    pid: int
    pidfd: int
    answers: socket.socket

    def close(self) -> None:
        os.close(self.pidfd)
        self.answers.close()


def _tell(answers: socket.socket, **told: Any) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # who asked is gone
        answers.sendall(f"{json.dumps(told)}\n".encode())


def _with_threads() -> str | None:
    others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    return (
        f"importing it starts the thread {others[0]!r}, which a process that is forked would lack" if others else None
    )


def _unsuited() -> str | None:
    """Return why a process that is forked from here might not work, whatever its threads."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists them
            if os.readlink(descriptor).startswith(_DEVICES):
                return "importing it opens a device, which a process that is forked could not use"
    if not _can_compute():
        return "importing it computes with threads of torch's, for which a process that is forked would wait"
    return None


def _can_compute() -> bool:
    """Whether torch can compute with threads in a process that is forked: not if it has begun to before (libgomp)."""
    import torch

    pid = fork()
    if not pid:
        code = 1
        try:
            torch.set_num_threads(2)
            torch.ones(1 << 18).add_(1).sum()
            code = 0
        finally:
            os._exit(code)
    ended = os.pidfd_open(pid)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(ended, selectors.EVENT_READ)
            if not selector.select(_PROBE_S):
                os.kill(pid, signal.SIGKILL)
    finally:
        os.close(ended)
    _, status = os.waitpid(pid, 0)
    return status == 0


def _become(request: dict[str, Any], streams: list[int], requests: socket.socket | None, parent: int) -> NoReturn:
    """Be what `tuner.slot.start` is with these standard streams; or another nursery, if it takes `requests`."""
    try:
        if requests is not None:
            end_with(parent)
        _forget_ends()
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.update(request["environment"])
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()  # Python's own begins anew by itself
        from tuner.slot import slot

        _open_streams()
        listen()
        if requests is None:
            slot.main()
        else:
            why_not = _with_data(request["data"])
            end_with(None)
            _serve(requests, why_not)
    finally:
        _end(0)


def _with_data(source: dict[str, Any]) -> str | None:
    """Load the data; return why processes that are forked could not use them."""
    from tuner.errors import TunerError
    from tuner.slot import loading

    try:
        return loading.load(loading.DataSource.model_validate(source))
    except TunerError:  # the slots will tell
        raise SystemExit from None


def _forget_ends() -> None:
    """Leave what is to be done at the end to the process that imported it, as to delete a temporary directory."""
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    atexit.register(multiprocessing.util._exit_function)  # type: ignore[attr-defined]  # as multiprocessing does


def _open_streams() -> None:
    """Have what this process writes to be other kinds of files than before; an objective's own streams stay."""
    for number, names in ((1, ("stdout", "__stdout__")), (2, ("stderr", "__stderr__"))):
        stream = os.fdopen(number, "w", closefd=False)
        stream.reconfigure(**AS_READ)
        for name in names:
            with suppress(OSError, ValueError, AttributeError):  # the objective closed it, or has another kind there
                if getattr(sys, name).fileno() == number:
                    setattr(sys, name, stream)


def _end(code: int) -> NoReturn:
    """End this process as Python ends one, but for the rest of the program that it was forked from."""
    error = sys.exception()
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        traceback.print_exception(error)
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing does
        atexit._run_exitfuncs()
    finally:
        with suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
