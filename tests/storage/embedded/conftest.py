from __future__ import annotations

import pwd
import tempfile
from pathlib import Path

import pytest

from storage import EmbeddedServer


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


@pytest.fixture
def owner(server):
    """The system's user that the shared server's files belong to."""
    return pwd.getpwuid(server.status().directory.stat().st_uid)
