"""One line an event on stderr: text for people, JSON for machines."""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

from tuner.text import printable

LogFormat: TypeAlias = Literal["text", "json"]

OWN_PRINTS = "slot_stderr"
"""The event of what an objective printed, which the user may have coloured; other text may be anybody's."""
PLAIN_INTERVAL_S = 5.0
"""The shortest time between two plain lines of progress."""


_NOWHERE: dict[str, Any] = dict.fromkeys(("worker", "slot", "study", "trial", "attempt", "epoch"))


class Log:
    """Writes events to stderr. `fields`, such as worker and study, go into every line of JSON.

    Every line has the keys of `_NOWHERE`; they are null where the event is of no trial, or of no slot.

    On a terminal text goes through `console`, so that lines appear above a live progress display and do not tear it.
    Where stderr takes nothing, such as on a full disk, lines are lost and nothing else.
    """

    def __init__(self, log_format: LogFormat = "text", **fields: Any) -> None:
        from rich.console import Console  # not for the commands that only read, and log nothing

        self.format = log_format
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.is_unread = False
        """Whether nobody reads stderr any more, as when `head` at the other end of a pipe has ended."""
        self._fields = fields

    def event(self, event: str, message: str, **fields: Any) -> None:
        """Write one event: `message` for people, `event` and the fields for machines."""
        if self.format == "json":
            now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
            line = {"time": now, "event": event, **_NOWHERE, **self._fields, **fields, "message": message}
            message = json.dumps(line, default=str)
        elif event != OWN_PRINTS:
            message = "\n".join(map(printable, message.split("\n")))
        with self.writing():
            if self.format == "text" and self.console.is_terminal:
                from rich.text import Text

                self.console.print(Text(message))
            elif sys.stderr is not None:  # the shell's `2>&-`
                sys.stderr.write(message + "\n")
                sys.stderr.flush()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Go on after the block if stderr takes nothing."""
        try:
            yield
        except BrokenPipeError:
            self.is_unread = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # for what Python still has to write there
        except OSError:  # a full disk, a terminal that is gone
            pass
