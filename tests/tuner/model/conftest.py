"""An export for tests to look at and to damage."""

import shutil

import pytest
from exporting import Exporting, code


@pytest.fixture
def exporting(database, tmp_path):
    made = Exporting(database, tmp_path)
    yield made
    made.engine.dispose()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where one export is kept for this module's tests to copy."""
    return tmp_path_factory.mktemp("kept") / "model"


@pytest.fixture
def export_copy(exporting, kept, tmp_path):
    """An export of the test's own."""
    if not kept.exists():
        exporting.start(code())
        exporting(kept)
    return shutil.copytree(kept, tmp_path / "copy")
