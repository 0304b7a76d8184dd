"""Reading and naming many rows at once: arrays of ids, and columns as the bytes of PostgreSQL's binary format."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from sqlalchemy import (
    ARRAY,
    ColumnElement,
    DateTime,
    Double,
    Integer,
    LargeBinary,
    String,
    any_,
    bindparam,
    case,
    cast,
    func,
    literal,
)

from storage.database.foreign import known_time

_NO_TIME: Final = np.iinfo(np.int64).min  # PostgreSQL's -infinity
_EPOCH_OF_POSTGRESQL_US: Final = 946_684_800 * 10**6  # 2000-01-01, in microseconds since 1970


def int_array(ids: Iterable[int]) -> str:
    """Return integers as PostgreSQL writes an array of them, for `is_among`."""
    # psycopg2 would write ARRAY[1, 2, ...], an expression that takes the server 3 times as long for 10,000 ids.
    return "{" + ",".join(map(str, ids)) + "}"


def is_among(column: ColumnElement[int], array_name: str) -> ColumnElement[bool]:
    """Whether the column is one of the integers of a bound `int_array`."""
    return column == any_(cast(bindparam(array_name, type_=String), ARRAY(Integer)))


def stored_number(value: ColumnElement[Any], kind: ColumnElement[Any]) -> ColumnElement[float]:
    """The number that a column and its type stand for, as PostgreSQL's float8 has it."""
    special = {"FINITE": value, "INF_POS": literal(math.inf, Double), "INF_NEG": literal(-math.inf, Double)}
    return func.coalesce(case(special, value=kind), literal(math.nan, Double))


def sent_time(column: ColumnElement[Any]) -> ColumnElement[bytes]:
    """A naive time, which may be NULL, for `packed`."""
    return func.timestamp_send(func.coalesce(known_time(column), literal("-infinity", DateTime)), type_=LargeBinary)


def packed(expression: ColumnElement[Any]) -> ColumnElement[bytes]:
    """All values of a group as the bytes of PostgreSQL's binary format: a million are neither rows nor digits."""
    return func.string_agg(expression, literal(b"", LargeBinary), type_=LargeBinary)


def integers(big_endian: bytes) -> list[int]:
    """Return what `packed` made of int4."""
    numbers: list[int] = np.frombuffer(big_endian, dtype=">i4").tolist()
    return numbers


def floats(big_endian: bytes) -> list[float]:
    """Return what `packed` made of float8."""
    numbers: list[float] = np.frombuffer(big_endian, dtype=">f8").tolist()
    return numbers


def local_times(big_endian: bytes) -> list[dt.datetime | None]:
    """Return what `packed` made of the `sent_time` of naive UTC, in naive local time as Optuna gives it.

    Exact to the microsecond until the year 2242. 4 times as fast as converting datetimes (2026-11).
    """
    micros = np.frombuffer(big_endian, dtype=">i8")
    seconds = np.where(micros == _NO_TIME, math.nan, (micros + _EPOCH_OF_POSTGRESQL_US) / 1e6).tolist()
    return [None if math.isnan(second) else dt.datetime.fromtimestamp(second) for second in seconds]
