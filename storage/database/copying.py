"""Writing bytes as they are: by COPY, in PostgreSQL's binary format.

What the driver puts into a statement it writes as hexadecimal digits, twice as long, and the server into its log where
it logs slow statements or failed ones. What is copied is in no log.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import Any, Final

import psycopg2
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_END: Final = struct.pack("!h", -1)
_CHUNK_BYTES: Final = 1 << 20


def int4(number: int) -> bytes:
    """Return an integer as a column of that type has it."""
    return struct.pack("!i", number)


def copy_row(conn: Connection, columns: str, then: str, values: Sequence[bytes | memoryview]) -> int:
    """Copy one row into `columns`, a table with its columns, and run statements after it; return the last one's rows.

    All in one request and one transaction, of a connection in autocommit. Raises what SQLAlchemy would, but a row that
    refers to one that is gone as the driver does.
    """
    statement = f"COPY {columns} FROM STDIN (FORMAT binary); {then}"
    parts: list[bytes | memoryview] = [_HEADER, struct.pack("!h", len(values))]
    for value in values:
        parts += [int4(len(value)), value]
    driver: Any = conn.connection.driver_connection
    try:
        with driver.cursor() as cursor:
            cursor.copy_expert(statement, io.BytesIO(b"".join([*parts, _END])), _CHUNK_BYTES)
            n_rows: int = cursor.rowcount
            return n_rows
    except psycopg2.errors.ForeignKeyViolation:
        raise
    except psycopg2.Error as error:
        is_gone = bool(driver.closed)
        if is_gone:
            conn.invalidate(error)
        raise DBAPIError.instance(statement, {}, error, psycopg2.Error, connection_invalidated=is_gone) from error
