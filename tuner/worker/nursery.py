"""The process that a worker's slots are forked from, as the worker has it."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Protocol

from tuner.slot import nursery
from tuner.slot.loading import DataSource

END_S = 1.0
"""How long a nursery may take to end."""


class Running(Protocol):
    """A process that was started, as `subprocess.Popen` is one."""

    pid: int

    def wait(self) -> int:
        """Wait until the process has ended, and return its exit code, or the number of its signal below 0."""


class Nursery:
    """Forks slots for as long as it lives, from a process that is forked from this one.

    That has imported what slots need here (`copied`), or begins with it now (`importing`), until it has to `load` the
    objective. One that is forked from another has loaded the data, too (`with_data`).
    """

    def __init__(self, pid: int, requests: socket.socket, forked: _Forked | None = None) -> None:
        """`forked` is the process as the nursery tells of it that it was forked from, not from this one."""
        self._pid = pid
        self._requests = requests
        self._forked = forked
        self._is_importing = False

    @classmethod
    def copied(cls) -> Nursery:
        """Copy this process, which has imported the objective."""
        return cls(*nursery.forked_from_here())

    @classmethod
    def importing(cls, environment: dict[str, str], directory: str, on_line: Callable[[str], None]) -> Nursery:
        """Start to import, with this environment and in this directory; `on_line` gets each line that is printed."""
        printed, its_prints = os.pipe()
        try:
            made = cls(*nursery.forked_to_import(environment, directory, its_prints))
        finally:
            os.close(its_prints)
        made._is_importing = True
        _forward(printed, on_line)
        return made

    def with_data(
        self,
        source: DataSource,
        environment: dict[str, str],
        on_line: Callable[[str], None],
        refused: Callable[[str], None],
    ) -> Nursery | None:
        """Have a nursery forked that loads these data, for slots with that environment, as `fork` does a slot.

        `on_line` gets each line that is printed. If it cannot load them, it ends.
        """
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        nothing, (printed, its_prints) = os.open(os.devnull, os.O_RDWR), os.pipe()
        request = {"environment": environment, "data": source.model_dump(mode="json")}
        try:
            forked = self._request(request, (nothing, its_prints, its_prints), refused, its)
        finally:
            its.close()
            os.close(nothing)
            os.close(its_prints)
        _forward(printed, on_line)
        if forked is None:
            ours.close()
            return None
        return Nursery(forked.pid, ours, forked)

    def load(self, objective: str) -> None:
        """Have the objective imported."""
        self._is_importing = False
        with suppress(OSError):  # it has ended, which is found by who wants a slot
            self._requests.send(objective.encode())

    def fork(
        self, environment: dict[str, str], streams: Sequence[int], refused: Callable[[str], None]
    ) -> Running | None:
        """Fork a slot with these standard streams, and with what its environment has beside the nursery's.

        Waits for the objective to be imported. Returns None if the nursery has ended; or, telling why, if a process
        that was forked might not work.
        """
        return self._request({"environment": environment}, streams, refused)

    def _request(
        self,
        request: Mapping[str, object],
        streams: Sequence[int],
        refused: Callable[[str], None],
        *requests: socket.socket,
    ) -> _Forked | None:
        ours, its = socket.socketpair()
        text = json.dumps(request).encode()
        try:
            with its:
                if len(text) > nursery.MAX_REQUEST_BYTES:
                    raise OSError(errno.EMSGSIZE, "too long")
                socket.send_fds(self._requests, [text], [*streams, its.fileno(), *(each.fileno() for each in requests)])
        except OSError:  # it has ended
            ours.close()
            return None
        answers = ours.makefile(encoding="utf-8")
        ours.close()
        answer = json.loads(answers.readline() or "{}")
        if "pid" in answer:
            return _Forked(answer["pid"], answers)
        answers.close()
        if "unsuited" in answer:
            refused(answer["unsuited"])
        return None

    def close(self) -> None:
        """End the process; slots that still run notice it and end."""
        if self._requests.fileno() < 0:
            return  # it was closed before
        self._requests.close()
        if self._forked is not None:
            if not self._forked.has_ended(END_S):
                self.kill()
            return
        ended = os.pidfd_open(self._pid)
        try:
            # It may have to delete what the objective made as it was imported.
            is_late = self._is_importing or not select.select([ended], [], [], END_S)[0]
            if is_late and not kill_group(self._pid):  # with what the objective started as it was imported
                os.kill(self._pid, signal.SIGKILL)  # it was just forked, and has no group of its own yet
        finally:
            os.close(ended)
        os.waitpid(self._pid, 0)

    def kill(self) -> None:
        """End the process at once, with what it has started."""
        if self._forked is None or not self._forked.has_ended(0.0):
            kill_group(self._pid)


class _Forked:
    """A slot of a nursery, which tells of its end."""

    def __init__(self, pid: int, answers: IO[str]) -> None:
        self.pid = pid
        self._answers = answers

    def wait(self) -> int:
        """Wait for the process to end; that of a nursery that was killed counts as killed."""
        with self._answers:
            return int(json.loads(self._answers.readline() or "{}").get("code", -signal.SIGKILL))

    def has_ended(self, within_s: float) -> bool:
        """Whether the process has ended within that time, and its number may be another's."""
        return bool(select.select([self._answers], [], [], within_s)[0])


def _forward(printed: int, on_line: Callable[[str], None]) -> None:
    """Call `on_line` with each line that comes by a pipe, in a thread."""

    def forward() -> None:
        with os.fdopen(printed, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                on_line(line.rstrip("\n"))

    threading.Thread(target=forward, daemon=True).start()


def kill_group(number: int) -> bool:
    """Kill the processes of a group, and return whether there were any."""
    try:
        os.killpg(number, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nobody is left; macOS says so by the second
        return False
    return True
