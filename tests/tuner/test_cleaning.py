"""`tuner clean`: what it finds on a machine, and what of it goes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from optuna.trial import TrialState

from storage import EmbeddedServer
from storage.coordination.delivery import Result
from storage.database.variables import MARK
from storage.embedded.listing import left_sockets
from tuner import cleaning
from tuner.cli.app import make_app
from tuner.slot.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tuner.cleaning import Left


@pytest.fixture
def clean(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the command for a data directory of this test, with no eye for what else this machine has; what it prints."""
    whole = cleaning.look

    def only_here(*given: Any) -> list[Left]:
        return [left for left in whole(*given) if left.path.is_relative_to(tmp_path)]

    def run(*options: str) -> str:
        make_app()(["--storage", database, "--data-dir", str(tmp_path), "clean", *options], standalone_mode=False)
        return capsys.readouterr().out

    monkeypatch.setattr(cleaning, "look", only_here)
    return run


def a_kept_result(data_dir: Path) -> Path:
    result = Result(token=uuid.uuid4(), state=TrialState.COMPLETE, value=1.0, attrs={}, reports=[])
    return Spool(data_dir).add("theirs", 3, result)


@pytest.mark.slow
def test_what_another_database_may_want_goes_only_if_all_is_to_go(clean: Callable[..., str], tmp_path: Path) -> None:
    theirs = tmp_path / "checkpoints" / "study-7-20260101T000000000000"
    theirs.mkdir(parents=True)
    (theirs / "trial-0.pt").write_bytes(bytes(100_000))
    result = a_kept_result(tmp_path)
    (tmp_path / "spool" / "x.refused").write_text("damaged")
    shown = clean("--yes").splitlines()
    assert [line.split()[0] for line in shown] == ["what", "checkpoints", "result", "result", "freed"]
    assert all("stays without --all" in line for line in shown[1:4])
    assert "of a database that is not known" in shown[1]
    assert any("of study theirs, which this database does not take" in line for line in shown)
    assert shown[-1] == "freed 0.0 MB"
    would = clean("--all", "--dry-run")
    assert would.splitlines()[-1] == "would free 0.1 MB"
    assert theirs.exists()
    told = json.loads(clean("--all", "--yes", "--json"))
    assert [left["chosen"] for left in told["found"]] == [True] * 3
    assert told["freed"] >= 100_000
    assert not theirs.exists()
    assert not result.exists()
    assert clean("--all") == "freed 0.0 MB\n"  # nothing is left to ask for


def test_what_cannot_be_deleted_is_told(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    left = cleaning.Left(
        what="cache", whose="", path=gone, size=0, changed=0.0, fate="asked", remove=lambda: shutil.rmtree(gone)
    )
    assert cleaning.remove(left) == f"{gone} stays: No such file or directory"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root's databases outlive their data directory")
def test_a_database_goes_once_its_data_directory_is_gone(tmp_path: Path) -> None:
    def ours() -> list[Left]:
        return [left for left in cleaning.look(None, tmp_path) if str(tmp_path) in left.whose]

    data_dir = tmp_path / "data"
    code = "import sys; from pathlib import Path; from storage import EmbeddedServer;"
    code += "server = EmbeddedServer(Path(sys.argv[1])); server.start(); server.stop()"  # as one of its users would
    server = EmbeddedServer(data_dir)
    try:
        subprocess.run([sys.executable, "-c", code, data_dir], check=True)
        data_dir.mkdir(exist_ok=True)
        assert ours() == []
        data_dir.rmdir()
        (lost,) = ours()
        assert (lost.what, lost.whose, lost.fate) == ("database", f"of {data_dir}, which is gone", "goes")
        assert lost.size > 10_000_000
        assert cleaning.remove(lost) is None
        assert not server.status().directory.exists()
        assert ours() == []
    finally:
        server.destroy()


def test_a_directory_for_sockets_goes_with_its_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    stale, fresh, not_ours = (tmp_path / f"tuner-{name}" for name in ("0123456789ab", "0123456789ac", "0123456789ad"))
    for place in (stale, fresh, not_ours):
        place.mkdir(0o700)
    for place in (stale, fresh):
        (place / MARK).touch()
    for place in (stale, not_ours):
        os.utime(place, (0, 0))
    assert [place for place in left_sockets() if tmp_path in place.parents] == [stale]
