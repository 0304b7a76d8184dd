"""The process that a worker's slots are forked from, as the worker has it."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Protocol

from tuner.slot import nursery

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
    objective.
    """

    def __init__(self, pid: int, requests: socket.socket) -> None:
        self._pid = pid
        self._requests = requests
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
        stream = os.fdopen(printed, encoding="utf-8", errors="replace")
        threading.Thread(target=_forward, args=(stream, on_line), daemon=True).start()
        return made

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
        ours, its = socket.socketpair()
        request = json.dumps({"environment": environment}).encode()
        try:
            with its:
                socket.send_fds(self._requests, [request], [*streams, its.fileno()])
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
        ended = os.pidfd_open(self._pid)
        try:
            # It may have to delete what the objective made as it was imported.
            is_late = self._is_importing or not select.select([ended], [], [], END_S)[0]
            if is_late and not kill_group(self._pid):  # with what the objective started as it was imported
                os.kill(self._pid, signal.SIGKILL)  # it was just forked, and has no group of its own yet
        finally:
            os.close(ended)
        os.waitpid(self._pid, 0)


class _Forked:
    """A slot of a nursery, which tells of its end."""

    def __init__(self, pid: int, answers: IO[str]) -> None:
        self.pid = pid
        self._answers = answers

    def wait(self) -> int:
        """Wait for the process to end; that of a nursery that was killed counts as killed."""
        with self._answers:
            return int(json.loads(self._answers.readline() or "{}").get("code", -signal.SIGKILL))


def _forward(stream: IO[str], on_line: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            on_line(line.rstrip("\n"))


def kill_group(number: int) -> bool:
    """Kill the processes of a group, and return whether there were any."""
    try:
        os.killpg(number, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nobody is left; macOS says so by the second
        return False
    return True
