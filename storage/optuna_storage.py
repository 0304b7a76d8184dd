"""The storage object that studies work with: today Optuna's own, on an engine with our settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from optuna.storages import BaseStorage, RDBStorage, get_storage

from storage.engine import engine_options, open_engine
from storage.schema import ensure_schema
from storage.url import parse_url

if TYPE_CHECKING:
    from sqlalchemy import URL

HEARTBEAT_INTERVAL_S: Final = 10
GRACE_PERIOD_S: Final = 60


def open_storage(url: str | URL, *, read_only: bool = False) -> BaseStorage:
    """Open the studies of a database, creating or migrating its tables first.

    A running trial whose process sends no heartbeat for 60 seconds is failed by whoever asks next.
    Any number of processes may open the same database at once. With `read_only`, writing raises Optuna's
    StorageInternalError. Raises StorageError.
    """
    parsed = parse_url(url)
    engine = open_engine(parsed, read_only=read_only)
    try:
        ensure_schema(engine)
    finally:
        engine.dispose()
    storage = RDBStorage(
        parsed.render_as_string(hide_password=False),
        engine_kwargs=engine_options(parsed, read_only, "tuner"),
        skip_compatibility_check=True,
        skip_table_creation=True,
    )
    # Set here, as the constructor's arguments of these names warn that they are experimental, and
    # filtering a warning is a change to the whole process.
    storage.heartbeat_interval = HEARTBEAT_INTERVAL_S
    storage.grace_period = GRACE_PERIOD_S
    return get_storage(storage)
