"""How what goes wrong, and what happens, is told to who calls from Python: of arguments, and by Python's own log."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from storage.database.errors import InvalidWriteError, StorageError
from tuner.errors import TunerError
from tuner.log import OWN_PRINTS, Log
from tuner.text import printable

_COMMAND: Final = re.compile(r"('tuner(?: [^']*)?')")
_OPTION: Final = re.compile(r"--([a-z][a-z-]*)(?: (?=[A-Z]{2}))?")
_ARGUMENTS: Final = {
    "study": "name",
    "set": "options",
    "from": "from_study",
    "allow-code-change": "allow_code_change=True",
    "allow-leak": "allow_leak=True",
    "no-preflight": "preflight=False",
}


@contextmanager
def said_for_python() -> Iterator[None]:
    """Have an error name arguments where a command's names options; the commands that it shows stay as they are."""
    try:
        yield
    except (TunerError, StorageError, InvalidWriteError) as error:
        if error.args and isinstance(error.args[0], str):
            error.args = (said(error.args[0]), *error.args[1:])
        raise


def said(message: str) -> str:
    """Return the message with arguments in the place of options, as `max_failures` for `--max-failures`."""
    parts = _COMMAND.split(message)
    return "".join(part if _COMMAND.fullmatch(part) else _OPTION.sub(_argument, part) for part in parts)


def _argument(option: re.Match[str]) -> str:
    argument = _ARGUMENTS.get(option[1], option[1].replace("-", "_"))
    return argument + ("=" if option[0].endswith(" ") else "")


_WARNINGS = frozenset(
    {
        *(OWN_PRINTS, "database_away", "hung", "missing", "note", "random_start", "replaced", "result_kept"),
        *("slot_broken", "slot_died", "unverified"),
    }
)
"""The events that who called from Python sees; the others are for those who ask for them."""


class LibraryLog(Log):
    """Passes events to the logger `tuner` of Python's `logging`: what needs a look as warnings, the others as info.

    Each record has `event` and `fields`, by which a program tells them.
    """

    def event(self, event: str, message: str, **fields: Any) -> None:
        """Pass one event on."""
        is_told = event == "note" and message.startswith("data ")  # where it lies, which is as it should be
        is_warning = (event in _WARNINGS and not is_told) or fields.get("state") == "FAILED"
        if event != OWN_PRINTS:
            message = said("\n".join(map(printable, message.split("\n"))))
        level = logging.WARNING if is_warning else logging.INFO
        logging.getLogger("tuner").log(level, "%s", message, extra={"event": event, "fields": self._fields | fields})
