"""Optuna studies in PostgreSQL: connecting, the schema, and a server for people who have none.

Importing this is cheap; each name is imported from its module when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.database.engine import open_engine
    from storage.database.errors import (
        AuthenticationError,
        BusyError,
        EmbeddedServerError,
        InvalidURLError,
        InvalidWriteError,
        LeaseLostError,
        LiveTrialsError,
        NoDatabaseError,
        NotReadyError,
        SchemaVersionError,
        StorageError,
        StudyExistsError,
        StudyHaltedError,
        StudyNotFoundError,
        TrialNotRunningError,
        TrialNotWaitingError,
        UnreachableError,
    )
    from storage.database.schema import ensure_schema
    from storage.database.url import mask_url, parse_url
    from storage.embedded.server import EmbeddedServer
    from storage.optuna_storage.opening import open_storage
    from storage.optuna_storage.storage import PostgresStorage

__all__ = [
    "AuthenticationError",
    "BusyError",
    "EmbeddedServer",
    "EmbeddedServerError",
    "InvalidURLError",
    "InvalidWriteError",
    "LeaseLostError",
    "LiveTrialsError",
    "NoDatabaseError",
    "NotReadyError",
    "PostgresStorage",
    "SchemaVersionError",
    "StorageError",
    "StudyExistsError",
    "StudyHaltedError",
    "StudyNotFoundError",
    "TrialNotRunningError",
    "TrialNotWaitingError",
    "UnreachableError",
    "ensure_schema",
    "mask_url",
    "open_engine",
    "open_storage",
    "parse_url",
]

_MODULES = {
    "EmbeddedServer": "storage.embedded.server",
    "PostgresStorage": "storage.optuna_storage.storage",
    "ensure_schema": "storage.database.schema",
    "mask_url": "storage.database.url",
    "open_engine": "storage.database.engine",
    "open_storage": "storage.optuna_storage.opening",
    "parse_url": "storage.database.url",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES.get(name, "storage.database.errors")), name)
    globals()[name] = value
    return value
