"""The process of one slot, as its worker has it: lines of JSON to it, and from it."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.slot import stacks
from tuner.worker.nursery import Running, kill_group
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
Start = Callable[[SlotPlan, tuple[int, int, int]], Running]
"""Starts the process of a slot, with these standard streams."""


class SlotProcess:
    """The process of one slot. It has imported torch and the objective, or does so, and runs once it is configured."""

    def __init__(self, plan: SlotPlan, start: Start, give_up: Callable[[], None], inbox: Inbox) -> None:
        """`give_up` is called if it is killed while `start` has not started it."""
        self.plan = plan
        self._give_up = give_up
        self._inbox = inbox
        self._lock = threading.Lock()
        self._process: Running | None = None  # until it is started
        self._is_killed = self._is_over = False
        self._code = -signal.SIGKILL
        self._stacks: list[Path] = []
        (its_orders, orders), (events, its_events), (printed, its_prints) = os.pipe(), os.pipe(), os.pipe()
        self._orders = os.fdopen(orders, "w", encoding="utf-8")
        readers = [self._read("event", events), self._read("stderr", printed)]
        streams = (its_orders, its_events, its_prints)
        threading.Thread(target=self._live, args=(start, streams, readers), daemon=True).start()

    def send(self, line: str | dict[str, Any]) -> None:
        """Write one line: the configuration first, then commands."""
        with suppress(BrokenPipeError, ValueError):  # it has ended, or was asked to; its end is reported like any other
            self._orders.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
            self._orders.flush()

    def drain(self) -> None:
        """Ask the slot to give its trial back and exit."""
        with suppress(BrokenPipeError):  # it has ended already
            self._orders.close()

    def kill(self) -> None:
        """End the process at once, with all that it started."""
        with self._lock:
            self._is_killed = True
            if self._process is None:
                self._give_up()
                return  # it is to come
            if self._is_over:
                return  # its number may be another's by now
            if not kill_group(self._process.pid):
                with suppress(ProcessLookupError):  # one that was just forked has no group of its own yet
                    os.kill(self._process.pid, signal.SIGKILL)

    def request_stacks(self) -> None:
        """Have the process, and those that it forked, write where each of their threads is."""
        if self._process is not None and not self._is_over:
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
        """Return the exit code of the process, whose end was reported."""
        return self._code

    def _read(self, kind: str, descriptor: int) -> threading.Thread:
        def forward() -> None:
            # An objective may print what it likes.
            with os.fdopen(descriptor, encoding="utf-8", errors="replace") as stream:
                for line in stream:
                    self._inbox.put(Message(kind=kind, slot=self.plan.number, text=line.rstrip("\n")))

        thread = threading.Thread(target=forward, daemon=True)
        thread.start()
        return thread

    def _live(self, start: Start, streams: tuple[int, int, int], readers: list[threading.Thread]) -> None:
        try:
            process = start(self.plan, streams)
        except OSError as error:
            self._inbox.put(Message(kind="stderr", slot=self.plan.number, text=f"cannot be started: {error}"))
        else:
            with self._lock:
                self._process = process
            if self._is_killed:
                self.kill()
            self._code = process.wait()
            with self._lock:
                self._is_over = True
            kill_group(process.pid)  # what an objective started and left behind, which would hold the pipes open
        finally:
            for stream in streams:
                os.close(stream)
        for reader in readers:
            reader.join(LAST_OUTPUT_S)
        self._inbox.put(Message(kind="end", slot=self.plan.number))
