"""Row 11: a folder of checkpoints that others write to leads nowhere else, and sockets have a place that is checked."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from storage import EmbeddedServerError
from storage.embedded.accounts import own_account
from storage.embedded.addresses import socket_directory
from storage.embedded.cluster import private_directory
from tuner.errors import SharedPlaceError
from tuner.slot.folders import folder
from tuner.slot.shared_checkpoints import InFolder

FOREVER = threading.Event()


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A folder that everybody may write to."""
    (tmp_path / "share").mkdir()
    (tmp_path / "share").chmod(0o777)
    return tmp_path / "share"


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_no_link_in_a_shared_folder_is_followed(share: Path, tmp_path: Path, monkeypatch, scheme: str) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    study = share / "study-1"
    study.mkdir()
    checkpoint = InFolder(f"{scheme}{share}", "study-1", 3)
    (study / "trial-3.pt").symlink_to(mine)
    with pytest.raises(SharedPlaceError, match="symbolic links"):
        checkpoint.read()
    checkpoint.write(memoryview(b"state"), FOREVER)
    assert (mine.read_text(), checkpoint.read(), checkpoint.head(2)) == ("mine", b"state", b"st")
    assert not (study / "trial-3.pt").is_symlink()
    # Also where the name that is written to first was foreseen.
    monkeypatch.setattr("secrets.token_hex", lambda n: "foreseen")
    (study / "trial-3.pt.foreseen").symlink_to(mine)
    with pytest.raises(SharedPlaceError, match="exists"):
        checkpoint.write(memoryview(b"newer"), FOREVER)
    assert (mine.read_text(), checkpoint.read()) == ("mine", b"state")
    os.mkfifo(study / "trial-4.pt")
    with pytest.raises(SharedPlaceError, match="is no file"):
        InFolder(f"{scheme}{share}", "study-1", 4).head(2)


def test_a_link_in_the_place_of_a_studys_folder_is_not_entered(share: Path, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir()
    (private / "trial-3.pt").write_text("mine")
    (share / "study-1").symlink_to(private)
    checkpoint = InFolder(str(share), "study-1", 3)
    for act in (checkpoint.read, lambda: checkpoint.write(memoryview(b"x"), FOREVER), checkpoint.delete):
        with pytest.raises(SharedPlaceError, match="study-1 is a link: remove it"):
            act()
    with pytest.raises(OSError, match="symbolic link"):
        folder(str(share), "study-1").remove_all()
    assert [path.read_text() for path in private.iterdir()] == ["mine"]


def test_sockets_are_in_the_users_runtime_directory_where_their_place_is_taken(tmp_path: Path, monkeypatch) -> None:
    home = tmp_path / ("a" * 100)
    account = own_account()
    otherwise = Path(f"/tmp/tuner-{os.geteuid()}-key")
    runtime = Path("/tmp", f"tuner-test-{os.getpid()}")
    runtime.mkdir(0o700)
    otherwise.mkdir()  # taken, for another user
    try:
        for said, mode, expected in (
            (str(runtime), 0o700, runtime / "tuner-key"),
            (str(runtime), 0o777, otherwise),  # as somebody else could have made it
            (str(runtime / "gone"), 0o700, otherwise),
            ("", 0o700, otherwise),
            ("relative", 0o700, otherwise),
            (str(home), 0o700, otherwise),  # as long
        ):
            monkeypatch.setenv("XDG_RUNTIME_DIR", said)
            runtime.chmod(mode)
            assert socket_directory(home, "key", replace(account, uid=account.uid + 1)) == expected
            # It goes with the user's last session, which a server outlives.
            assert socket_directory(home, "key", account) == otherwise
    finally:
        otherwise.rmdir()
        runtime.rmdir()
    assert socket_directory(Path("/short"), "key", account) == Path("/short/socket")


def test_a_place_for_sockets_that_is_anybody_elses_is_refused(tmp_path: Path) -> None:
    account = own_account()
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for planted in ("link", "open"):
        with pytest.raises(EmbeddedServerError, match="must be a directory of"):
            private_directory(tmp_path / planted, account)
