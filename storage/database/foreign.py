"""What another program or a hand may have left in a row: told once, and skipped instead of ending a study."""

from __future__ import annotations

import datetime as dt
import json
import logging
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, case, func

from storage.database.errors import InvalidWriteError

MAX_JSON_BYTES: Final = 16 << 20
MAX_JSON_DEPTH: Final = 100
"""Copying and writing what is nested deeper would take Python's whole stack."""

BAD: Final = object()
"""Stands for the value of a text that is no usable JSON."""

_MAX_TOLD: Final = 100
_told: set[str] = set()
_log = logging.getLogger(__name__)


class BadRowError(ValueError):
    """A row that cannot be read. The message says what is wrong with it, without its beginning."""


def skipped(what: str, why: object) -> None:
    """Tell once in this process that something in the database is passed over."""
    if what in _told or len(_told) > _MAX_TOLD:
        return
    _told.add(what)
    if len(_told) > _MAX_TOLD:
        _log.warning("more in the database cannot be read and is skipped; it is not named any more")
    else:
        _log.warning("%s is skipped: %s", what, why)


def known_time(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """A naive time, NULL where it is none of Python's: PostgreSQL has others, and infinity."""
    return case((column.between(dt.datetime(2, 1, 1), dt.datetime(9998, 1, 1)), column))


def known_json(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """A JSON text, NULL where it is too large to be read."""
    return case((func.octet_length(column) <= MAX_JSON_BYTES, column))


def json_value(text: str | None) -> Any:
    """Return the value of a JSON text. Raises BadRowError for what is none, or too large or deep to be used."""
    if text is None or len(text) > MAX_JSON_BYTES:
        raise BadRowError(f"it is NULL, or has more than {MAX_JSON_BYTES >> 20} MiB")
    if not _may_be_deep(text):
        return _parsed(text)
    value = _parsed(text)
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for one in level if isinstance(one, list | dict) for inner in _inside(one)]
        if not level:
            return value
    raise BadRowError(f"it is nested deeper than {MAX_JSON_DEPTH} levels")


def json_values(texts: Sequence[str | None]) -> list[Any]:
    """Return the value of each JSON text, BAD for those that `json_value` refuses."""
    whole = [text for text in texts if text is not None and not _may_be_deep(text)]
    if len(whole) == len(texts):
        # Parsed as one text: a call for each of 100,000 takes 0.3 s (2 cores, 2026-11).
        try:
            values: list[Any] = _parsed(f"[{','.join(whole)}]")
        except BadRowError:
            pass
        else:
            if len(values) == len(texts):
                return values
    return [_or_bad(text) for text in texts]


def json_text(value: Any) -> str:
    """Return a value as JSON. Raises InvalidWriteError for one that would not be read again."""
    text = json.dumps(value)
    if len(text) > MAX_JSON_BYTES:
        raise InvalidWriteError(f"an attribute needs at most {MAX_JSON_BYTES >> 20} MiB as JSON, got {len(text)} bytes")
    try:
        json_value(text)
    except BadRowError as error:
        raise InvalidWriteError(f"an attribute cannot be kept: {error}") from error
    return text


def json_column(text: str) -> Any:
    """Return the value of a JSON column, None for one that is no use to Python; for SQLAlchemy."""
    try:
        return json_value(text)
    except BadRowError as error:
        skipped(f"the JSON value {text[:40]!r}...", error)
        return None


def _or_bad(text: str | None) -> Any:
    try:
        return json_value(text)
    except BadRowError:
        return BAD


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise BadRowError(f"it is nested deeper than {MAX_JSON_DEPTH} levels") from None
    except ValueError as error:  # also a number of more digits than Python reads
        raise BadRowError(f"it is no JSON that Python reads: {error}") from None


def _may_be_deep(text: str) -> bool:
    return len(text) > MAX_JSON_DEPTH and text.count("[") + text.count("{") > MAX_JSON_DEPTH


def _inside(one: list[Any] | dict[str, Any]) -> Sequence[Any]:
    return one if isinstance(one, list) else list(one.values())
