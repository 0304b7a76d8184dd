"""The process that a worker's slots are forked from, as the worker has it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
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
    """Forks slots for as long as it lives: from a process of its own, or from a copy of this one."""

    def __init__(
        self, objective: str | None, environment: dict[str, str], directory: str, on_line: Callable[[str], None]
    ) -> None:
        """Start a process that imports the objective; or with None copy this one, which has imported it.

        `on_line` gets each line that is printed meanwhile.
        """
        self._process: subprocess.Popen[str] | None = None
        if objective is None:
            self._requests = nursery.forked_from_here()
            return
        self._requests, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tuner.slot.start", objective, str(its.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
                cwd=directory,
                pass_fds=[its.fileno()],
                start_new_session=True,  # a Ctrl-C at the terminal reaches the worker alone
                encoding="utf-8",
                errors="replace",
            )

        assert self._process.stderr is not None
        threading.Thread(target=_forward, args=(self._process.stderr, on_line), daemon=True).start()

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
        self._requests.close()
        if self._process is None:
            return
        try:
            self._process.wait(END_S)  # it may have to delete what the objective made as it was imported
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # it is importing
            self._process.wait()


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
