"""What a server refuses for reasons that its operator can mend, whichever way it was asked."""

from __future__ import annotations

from typing import Final

from sqlalchemy.exc import DBAPIError, ProgrammingError

from storage.database.engine import is_outage
from storage.database.errors import StorageError
from storage.database.sessions import explained

# Classes of SQLSTATE, and single ones: https://www.postgresql.org/docs/current/errcodes-appendix.html
_MENDABLE: Final = (
    "08",  # the connection
    "25006",  # read-only: a standby, a database or a role that is set so
    "40",  # rolled back
    "42501",  # no privilege
    "53",  # a full disk, no memory, no connection
    "55",  # locked by others
    "57",  # cancelled, shut down
    "58",  # input and output
    "72",  # a snapshot that is too old
    "XX00",  # damaged data
)


def refusal(error: BaseException) -> StorageError | None:
    """Return what to tell of an error that SQLAlchemy raised, None if it may be a fault of ours."""
    if not isinstance(error, DBAPIError):
        return None
    code = getattr(error.orig, "pgcode", None) or ""
    if code.startswith(_MENDABLE) or (is_outage(error) and not isinstance(error, ProgrammingError)):
        told = explained(error, "the database")
        return told if isinstance(told, StorageError) else None
    return None
