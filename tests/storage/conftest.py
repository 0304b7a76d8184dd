from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest
from origins import a_journal, an_rdb

from storage import EmbeddedServer, PostgresStorage, open_engine

AS_ROOT = os.geteuid() == 0


@pytest.fixture
def new_server(tmp_path):
    """Make EmbeddedServer objects for fresh data directories, destroyed with the test."""
    made = []

    def make(data_dir=None, **settings):
        made.append(EmbeddedServer(data_dir or tmp_path / f"data{len(made)}", **settings))
        return made[-1]

    yield make
    for server in made:
        server.destroy()


@pytest.fixture
def shared_directory(monkeypatch):
    """A place of its own for what root keeps below /var/lib/tuner, which others can reach as they can that."""
    # Not tmp_path, whose parent is closed to the user that the server runs as.
    with tempfile.TemporaryDirectory(prefix="tuner-test-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        monkeypatch.setattr("storage.embedded.server.SHARED_DIRECTORY", Path(directory) / "shared")
        yield Path(directory) / "shared"


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
def owner(server):
    """The system's user that the shared server's files belong to."""
    return pwd.getpwuid(server.status().directory.stat().st_uid)


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


@pytest.fixture
def sqlite(tmp_path):
    with an_rdb(f"sqlite:///{tmp_path}/odd name?.db") as origin:
        yield origin


@pytest.fixture
def journal(tmp_path):
    return a_journal(tmp_path / "journal.log")


@pytest.fixture(params=["sqlite", "journal", "postgresql"])
def origin(request):
    if request.param != "postgresql":
        yield request.getfixturevalue(request.param)
        return
    with an_rdb(request.getfixturevalue("another_database")) as origin:
        yield origin


@pytest.fixture
def target(database):
    """The engine of the database to import into."""
    engine = open_engine(database)
    yield engine
    engine.dispose()
