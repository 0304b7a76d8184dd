from __future__ import annotations

import pytest
from origins import a_journal, an_rdb

from storage import open_engine


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
