"""What the tests of studies share: a database, by an engine and by Optuna's contract."""

import pytest

from storage import PostgresStorage, open_engine


@pytest.fixture
def engine(database):
    engine = open_engine(database)
    yield engine
    engine.dispose()


@pytest.fixture
def storage(database):
    storage = PostgresStorage(database)
    yield storage
    storage.engine.dispose()
