"""Row 6: what root's database runs as is nobody else."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import EmbeddedServer, EmbeddedServerError
from storage.embedded import accounts
from storage.embedded.accounts import OWN_ACCOUNT, advice, server_account

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root's runs as another user")


@pytest.fixture(autouse=True)
def unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNER_DB_USER", raising=False)


@pytest.fixture
def another_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Another name for the user that is made, who is not there yet."""
    name = f"tuner-db-{os.getpid()}"
    monkeypatch.setattr(accounts, "OWN_ACCOUNT", name)
    yield name
    if shutil.which("userdel") is not None:
        subprocess.run(["userdel", name], check=False, capture_output=True)


def test_nobody_is_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_DB_USER", "nobody")
    with pytest.raises(EmbeddedServerError, match="nobody is anybody's; name another by TUNER_DB_USER"):
        server_account(tmp_path / "absent")


@pytest.mark.skipif(shutil.which("useradd") is None, reason="needs useradd")
def test_several_that_start_at_once_make_one_user_who_owns_nothing(tmp_path: Path, another_own: str) -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(server_account(tmp_path / "x"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entry = pwd.getpwnam(another_own)
    assert [(account.name, account.uid) for account in found] == [(another_own, entry.pw_uid)] * 4
    assert entry.pw_uid < 1000
    assert (entry.pw_dir, entry.pw_shell) == ("/nonexistent", "/usr/sbin/nologin")
    assert entry.pw_gid not in (0, 65534)
    assert [each.pw_name for each in pwd.getpwall()].count(another_own) == 1


def test_where_no_user_can_be_made_it_says_what_to_do(
    tmp_path: Path, another_own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts, "_ADMIN_PATH", str(tmp_path))
    told = rf"{another_own} cannot be made \(this system has no useradd\); make it .* or set TUNER_DB_USER"
    with pytest.raises(EmbeddedServerError, match=told):
        server_account(tmp_path / "absent")


def test_a_useradd_that_waits_for_ever_is_given_up(
    tmp_path: Path, another_own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "useradd").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (tmp_path / "useradd").chmod(0o755)
    monkeypatch.setattr(accounts, "_ADMIN_PATH", str(tmp_path))
    monkeypatch.setattr(accounts, "_MAKE_TIMEOUT_S", 0.2)
    with pytest.raises(EmbeddedServerError, match=r"\(useradd did not end within 0.2 seconds\); make it"):
        server_account(tmp_path / "absent")


@pytest.mark.slow
def test_one_of_an_earlier_version_goes_on_and_the_advice_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EmbeddedServer(tmp_path / "data")
    try:
        with monkeypatch.context() as earlier:
            earlier.setattr(accounts, "_is_nobody", lambda _: False)
            earlier.setenv("TUNER_DB_USER", "nobody")
            server.start()
            server.stop()
        server.start()
        status = server.status()
        assert (status.account, Path(f"/proc/{status.pid}").stat().st_uid) == ("nobody", 65534)
        told = advice(status.directory)
        assert told is not None
        assert (
            f"runs as nobody, whose other processes may read and change it; to have it run as {OWN_ACCOUNT}: " in told
        )
        _, _, commands = told.partition("tuner db stop; ")
        server.stop()
        subprocess.run(["sh", "-c", commands], check=True)
        server.start()
        status = server.status()
        entry = pwd.getpwnam(OWN_ACCOUNT)
        assert (status.account, Path(f"/proc/{status.pid}").stat().st_uid) == (OWN_ACCOUNT, entry.pw_uid)
        assert advice(status.directory) is None
        for path in (status.directory, status.directory / "base", status.directory / "PG_VERSION"):
            assert path.lstat().st_uid == entry.pw_uid, path
    finally:
        server.destroy()
