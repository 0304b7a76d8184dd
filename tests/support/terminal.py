"""A command on a terminal of its own, and what is on its screen."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from command import TIMEOUT_S, Tuner, wait_for

__all__ = ["Terminal", "on_terminal"]

# Becomes the terminal's first process, so that a typed Ctrl-C reaches it as it does a user's.
_START = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(\r|\n)|([^\x1b\r\n]+)")


class Terminal:
    """A running command; `written` is all that it wrote."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self._master = master
        self._written = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def written(self) -> str:
        return self._written.decode(errors="ignore")

    @property
    def screen(self) -> list[str]:
        """The lines that a user sees now, above them those that scrolled away."""
        lines, row = [""], 0
        for numbers, command, control, text in _TOKEN.findall(self.written):
            if text:
                # No command goes back within a line but to overwrite all of it.
                lines[row] += text
            elif control == "\n":
                row += 1
                lines.extend([""] * (row + 1 - len(lines)))
            elif command == "A":
                row -= int(numbers or 1)
            elif command == "K":
                lines[row] = ""
            else:
                assert control == "\r" or command in "mhl", (numbers, command)
        return lines

    def wait_for(self, part: str) -> None:
        """Wait until the screen shows it."""
        wait_for(lambda: part in "\n".join(self.screen), f"{part!r} on the screen")

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def exit_code(self) -> int:
        """Wait for its end."""
        code = self.process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        return code

    def _read(self) -> None:
        while True:
            try:
                read = os.read(self._master, 65536)
            except OSError:  # Linux says so when the last process has closed the terminal
                return
            if not read:
                return
            self._written += read


@contextmanager
def on_terminal(tuner: Tuner, *arguments: str, rows: int = 40, columns: int = 120) -> Iterator[Terminal]:
    """Start a command on a terminal; it is killed at the end of the block if it still runs."""
    own_size = ("COLUMNS", "LINES")  # pytest-xdist tells its processes those of its own terminal
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TUNER_", "PG")) and name not in own_size
    }
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    command = [str(Path(sys.executable).with_name("tuner")), *arguments]
    process = subprocess.Popen(
        [sys.executable, "-c", _START, *command],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**clean, "TERM": "xterm", **tuner.environment},
        cwd=tuner.directory,
    )
    os.close(slave)
    terminal = Terminal(process, master)
    try:
        yield terminal
    finally:
        process.kill()
        terminal.exit_code()
        os.close(master)
