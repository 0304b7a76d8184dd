"""One line an event on stderr: text for people, JSON for machines."""

from __future__ import annotations

import datetime as dt
import json
import sys
from typing import Any, Literal, TypeAlias

from rich.console import Console
from rich.text import Text

LogFormat: TypeAlias = Literal["text", "json"]


class Log:
    """Writes events to stderr. `fields`, such as worker and study, go into every line of JSON.

    Text goes through `console`, so that lines appear above a live progress display and do not tear it.
    """

    def __init__(self, log_format: LogFormat = "text", **fields: Any) -> None:
        self.format = log_format
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._fields = fields

    def event(self, event: str, message: str, **fields: Any) -> None:
        """Write one event: `message` for people, `event` and the fields for machines."""
        if self.format == "json":
            now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
            line = {"time": now, "event": event, **self._fields, **fields, "message": message}
            sys.stderr.write(json.dumps(line, default=str) + "\n")
            sys.stderr.flush()
        else:
            self.console.print(Text(message))
