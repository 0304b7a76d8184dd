from __future__ import annotations

import pytest

from storage import EmbeddedServer, PostgresStorage


@pytest.fixture(scope="session")
def killable_server(tmp_path_factory):
    """A server, made once a session, for tests that stop, kill and start it."""
    server = EmbeddedServer(tmp_path_factory.mktemp("killable"))
    try:
        server.start()
        yield server
    finally:
        server.destroy()


@pytest.fixture
def killable(killable_server):
    """The server for tests that stop and kill it, running when the test starts."""
    killable_server.start()
    return killable_server


@pytest.fixture
def storage(database):
    """A storage on the test's database."""
    storage = PostgresStorage(database)
    yield storage
    storage.engine.dispose()


@pytest.fixture
def other(database):
    """Another client's storage on the test's database."""
    storage = PostgresStorage(database)
    yield storage
    storage.engine.dispose()
