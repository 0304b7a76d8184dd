"""Which database this is, by whatever address it is reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from storage.database.engine import is_outage

if TYPE_CHECKING:
    from sqlalchemy import Engine

_QUERY = """
    SELECT format('%s-%s', (SELECT system_identifier FROM pg_control_system()), oid)
    FROM pg_database WHERE datname = current_database()
"""


def identity(engine: Engine) -> str | None:
    """Return what no other database has, or had: a number of its server's cluster, and its own there.

    A dump that is restored is another database; a standby that took over is the same. None where the server does not
    tell, as one that is managed by others may not.
    """
    try:
        with engine.connect() as conn:
            found: str = conn.scalar(text(_QUERY))
    except DBAPIError as error:  # no such function, or not for us
        if is_outage(error):
            raise
        return None
    return found
