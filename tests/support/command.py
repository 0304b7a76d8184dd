"""The command line as a user starts it: a process of its own (`preloaded` says what is left out)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import preloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Finished", "Running", "Tuner", "wait_for"]

TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """What it printed, as JSON."""
        return json.loads(self.stdout)

    def error(self) -> str:
        """Its error, which is one line and no traceback."""
        assert "Traceback" not in self.stderr, self.stderr
        (line,) = [line for line in self.stderr.splitlines() if line.startswith("tuner: ")]
        return line


class Running:
    """A command that runs; its stderr is read as it comes."""

    def __init__(self, process: subprocess.Popen[str] | preloaded.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def wait_for_line(self, part: str, count: int = 1) -> None:
        """Wait until `count` lines of stderr contain `part`."""
        wait_for(lambda: sum(part in line for line in list(self.lines)) >= count, f"{part!r} in {self.lines}")

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of this name so far; the command was started with --log-format json."""
        found = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [event for event in found if event["event"] == name]

    def close(self) -> None:
        """Kill it if it still runs, and close its streams."""
        self.process.kill()
        self._reader.join()
        self.process.__exit__(None, None, None)

    def finish(self) -> Finished:
        """Wait for its end."""
        assert self.process.stdout is not None
        stdout = self.process.stdout.read()
        code = self.process.wait(TIMEOUT_S)
        self._reader.join()
        return Finished(code, stdout, "".join(self.lines))


@dataclass(frozen=True)
class Tuner:
    """Starts `tuner` with these environment variables, in this directory; `within` is a command that runs commands."""

    environment: dict[str, str]
    directory: Path
    within: tuple[str, ...] = ()

    def __call__(self, *arguments: str | Path, **environment: str) -> Finished:
        """Run a command to its end."""
        with self.start(*arguments, **environment) as running:
            return running.finish()

    @contextmanager
    def start(self, *arguments: str | Path, **environment: str) -> Iterator[Running]:
        """Start a command; it is killed at the end of the block if it still runs."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("TUNER_", "PG"))}
        command = [*self.within, str(Path(sys.executable).with_name("tuner")), *map(str, arguments)]
        # A worker of a test has one slot unless the test says otherwise, whatever cores the machine has.
        its_own = {"TUNER_WORKER_SLOTS": "1", **self.environment, **environment}
        if not self.within and preloaded.may_fork(its_own):
            running = Running(preloaded.start(command, {**clean, **its_own}, self.directory))
        else:
            running = Running(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={**clean, **its_own},
                    cwd=self.directory,
                )
            )
        try:
            yield running
        finally:
            running.close()


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Return once `condition` holds; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"did not come within {timeout_s:g} s: {what}"
        pause.wait(0.05)
