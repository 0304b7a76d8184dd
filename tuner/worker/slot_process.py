"""The process of one slot, as its worker has it: lines of JSON to it, and from it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tuner.slot import stacks
from tuner.worker.slots import SlotPlan

LAST_OUTPUT_S = 1.0
"""How long the output of a slot that has ended is waited for, should somebody else hold its pipes open."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """What reached the worker: a signal, or from slot `slot` a line of events or stderr, or its end."""

    kind: str
    slot: int = -1
    text: str = ""


Inbox = queue.SimpleQueue[Message]


class SlotProcess:
    """The process of one slot. It imports torch and the objective as it starts, and runs once it is configured."""

    def __init__(self, plan: SlotPlan, objective: str, inbox: Inbox, directory: str, share: int) -> None:
        """`share` is for how many threads it has cores."""
        self.plan = plan
        self._inbox = inbox
        self._process = subprocess.Popen(
            # -P: no file of the current directory is taken for a module of ours, or of torch.
            [sys.executable, "-P", "-m", "tuner.slot.start", objective],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=plan.environment(share),
            cwd=directory,
            start_new_session=True,  # a Ctrl-C at the terminal reaches the worker alone, which drains its slots
            encoding="utf-8",
            errors="replace",  # an objective may print what it likes
        )
        self._is_over = False
        self._stacks: list[Path] = []
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        readers = [
            self._read("event", self._process.stdout),
            self._read("stderr", self._process.stderr),
        ]
        threading.Thread(target=self._report_end, args=(readers,), daemon=True).start()

    def send(self, line: str | dict[str, Any]) -> None:
        """Write one line: the configuration first, then commands."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError, ValueError):  # it has ended, or was asked to; its end is reported like any other
            self._process.stdin.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
            self._process.stdin.flush()

    def drain(self) -> None:
        """Ask the slot to give its trial back and exit."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()

    def kill(self) -> None:
        """End the process at once, with all that it started."""
        if self._is_over:
            return  # its number may be another's by now
        with suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS says so by the second
            os.killpg(self._process.pid, signal.SIGKILL)

    def request_stacks(self) -> None:
        """Have the process, and those that it forked, write where each of their threads is."""
        if not self._is_over:
            self._stacks = stacks.request(self._process.pid)

    def read_stacks(self) -> list[str]:
        """Return the lines that they have written since, each once."""
        lines = []
        for file in self._stacks:
            with suppress(OSError):  # its process has ended
                lines += file.read_text(errors="replace").splitlines()
        self._stacks = []
        return lines

    def exit_code(self) -> int:
        """Wait for the process, whose end was reported, and return its exit code."""
        return self._process.wait()

    def _read(self, kind: str, stream: IO[str]) -> threading.Thread:
        def forward() -> None:
            for line in stream:
                self._inbox.put(Message(kind=kind, slot=self.plan.number, text=line.rstrip("\n")))

        thread = threading.Thread(target=forward, daemon=True)
        thread.start()
        return thread

    def _report_end(self, readers: list[threading.Thread]) -> None:
        self._process.wait()
        self.kill()  # what an objective started and left behind, which would hold the pipes open
        self._is_over = True
        for reader in readers:
            reader.join(LAST_OUTPUT_S)
        self._inbox.put(Message(kind="end", slot=self.plan.number))


def current_directory() -> str:
    """Return where slots are started."""
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was deleted, and libraries of torch's would not load there
        return os.sep
