import os
import pwd
import shutil

import pytest

from storage import EmbeddedServerError
from storage.embedded.accounts import Account, server_account
from storage.embedded.programs import bundled_programs, reachable_by

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs programs as others")


@pytest.fixture
def nobody():
    entry = pwd.getpwnam("nobody")
    return Account(name="nobody", uid=entry.pw_uid, gid=entry.pw_gid, is_us=False)


def test_the_wheel_brings_postgresql_18():
    newest = bundled_programs()[0]
    assert newest.major == 18
    assert {"initdb", "pg_ctl", "postgres"} <= {path.name for path in (newest.directory / "bin").iterdir()}


@pytest.mark.slow
@as_root
def test_programs_in_a_closed_directory_are_copied_once_for_the_servers_user(
    tmp_path, nobody, shared_directory, monkeypatch
):
    real = bundled_programs()[0]
    wheel = real.directory.parent
    closed = tmp_path / "venv"
    shutil.copytree(real.directory, closed / wheel.name / real.directory.name)
    shutil.copytree(wheel.with_name(f"{wheel.name}.libs"), closed / f"{wheel.name}.libs")
    closed.chmod(0o700)
    (closed / wheel.name).chmod(0o700)
    hidden = type(real)(directory=closed / wheel.name / real.directory.name, version=real.version)

    shared_directory.mkdir(0o755)
    shared_directory.chmod(0o755)
    copied = reachable_by(nobody, hidden, shared_directory)
    assert copied.directory.is_relative_to(shared_directory / f"postgresql-{real.version}")
    for program in ("postgres", "initdb", "pg_ctl"):
        assert nobody.run([copied.path(program), "--version"], cwd=shared_directory, timeout_s=30).returncode == 0
    assert not [path for path in copied.directory.rglob("*") if path.stat().st_mode & 0o022]
    assert (closed.stat().st_mode & 0o777, (closed / wheel.name).stat().st_mode & 0o777) == (0o700, 0o700)

    monkeypatch.setattr(shutil, "copytree", None)
    assert reachable_by(nobody, hidden, shared_directory) == copied


@pytest.mark.slow
@as_root
def test_a_whole_server_runs_on_copied_programs_as_the_user_that_is_named(
    tmp_path, new_server, shared_directory, monkeypatch
):
    real = bundled_programs()[0]
    wheel = real.directory.parent
    shutil.copytree(real.directory, tmp_path / wheel.name / real.directory.name)
    shutil.copytree(wheel.with_name(f"{wheel.name}.libs"), tmp_path / f"{wheel.name}.libs")
    hidden = type(real)(directory=tmp_path / wheel.name / real.directory.name, version=real.version)
    monkeypatch.setattr("storage.embedded.server.bundled_programs", lambda: [hidden])
    monkeypatch.setenv("TUNER_DB_USER", "daemon")
    tmp_path.parent.chmod(0o700)
    server = new_server()
    server.start()
    status = server.status()
    assert status.directory.stat().st_uid == pwd.getpwnam("daemon").pw_uid
    assert status.account == "daemon"
    assert list(shared_directory.glob("postgresql-18*"))
    # The owner of the cluster decides from then on.
    monkeypatch.setenv("TUNER_DB_USER", "bin")
    server.stop()
    server.start()
    assert server_account(status.directory).name == "daemon"
    server.destroy()


@as_root
@pytest.mark.parametrize("name", ["root", "no-such-user"])
def test_the_servers_user_must_exist_and_not_be_root(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TUNER_DB_USER", name)
    with pytest.raises(EmbeddedServerError, match=rf"{name} is none; set TUNER_DB_USER"):
        server_account(tmp_path / "absent")


def test_a_user_without_a_name_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 3_999_999)
    with pytest.raises(EmbeddedServerError, match=r"user id 3999999 has no name .* add it to /etc/passwd"):
        server_account(tmp_path / "absent")
