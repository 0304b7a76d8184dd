"""Optuna's own tests of the storage contract, with and without the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from optuna.testing.pytest_storages import StorageTestCase

from storage.optuna_storage.storage import PostgresStorage

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow


class TestPostgresStorage(StorageTestCase):
    @pytest.fixture(params=[True, False], ids=["cached", "uncached"])
    def storage(self, database: str, request: pytest.FixtureRequest) -> Iterator[PostgresStorage]:
        storage = PostgresStorage(database, cache=request.param)
        yield storage
        storage.engine.dispose()
