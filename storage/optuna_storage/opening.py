"""Opening a database as the storage object that Optuna's studies work with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from storage.database.engine import open_engine
from storage.database.schema import ensure_schema
from storage.database.url import parse_url
from storage.optuna_storage.storage import PostgresStorage

if TYPE_CHECKING:
    from sqlalchemy import URL

    from storage.database.sessions import Retry


def open_storage(url: str | URL, *, read_only: bool = False, retry: Retry | None = None) -> PostgresStorage:
    """Open the studies of a database, creating or migrating its tables first.

    A running trial of `study.optimize` whose process sends no heartbeat for 60 seconds is failed by whoever asks
    next. Any number of processes may open the same database at once. Opening fails at once if the database is away;
    later calls wait for it, ten minutes or as `retry` says. With `read_only`, writing raises StorageError, as all
    does that the database does not do.
    """
    parsed = parse_url(url)
    engine = open_engine(parsed, read_only=read_only)
    try:
        ensure_schema(engine)
    finally:
        engine.dispose()
    return PostgresStorage(parsed, read_only=read_only, retry=retry)
