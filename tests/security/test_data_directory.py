"""Row 5: a data directory is used only if it is one's own and closed to others, whatever they planted there before."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path

import pytest
from command import Tuner

from objectives.tabular import fetch
from storage import EmbeddedServer, EmbeddedServerError
from tuner.caches import keep_compiled_apart
from tuner.errors import DataError
from tuner.slot.spool import Spool

THEM, ANN = 12345, 12346  # users of the machine who have nothing to do with us
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root acts as others")


def _as_user(uid: int, function) -> int:
    """Fork a process of another user that does something, and return its exit code."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            code = function() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_no_command_uses_a_directory_that_others_may_write_to(tmp_path, database):
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o777)
    tuner = Tuner({"TUNER_STORAGE": database, "TUNER_DATA_DIR": str(data)}, tmp_path)
    without_storage = Tuner({"TUNER_DATA_DIR": str(data)}, tmp_path)
    assert tuner("create", "digits", "--trials", "1").code == 0  # which needs none
    for told in (
        tuner("run", "digits", "--trials", "1").error(),
        tuner("worker", "digits").error(),
        without_storage("db", "start").error(),
        without_storage("studies").error(),
    ):
        assert f"{data} may be written to by everybody (mode 0777)" in told
        assert f"'chmod o-w {data}'" in told
    assert list(data.iterdir()) == []


@as_root
def test_another_users_server_is_not_joined(open_directory):
    home, sockets = open_directory / "data", open_directory / "sockets"
    for place, owner in ((home, ANN), (home / "postgresql", ANN), (sockets, THEM)):
        place.mkdir(0o755)
        os.chown(place, owner, owner)
    pid_file = home / "postgresql" / "postmaster.pid"
    pid_file.write_text(f"{os.getpid()}\n{home}\n0\n5432\n{sockets}\n\n0 0\nready\n")

    def joins() -> int:
        try:
            return 1 if EmbeddedServer(home).status().running else 0
        except EmbeddedServerError as error:
            return {True: 2, False: 3}["is not used" in str(error)]

    for file_of, sockets_of, listens, expected in (
        (THEM, THEM, THEM, 2),  # all of it is planted
        (ANN, THEM, THEM, 2),  # a pid file of ours from before a restart, with others in the place of the sockets
        (ANN, ANN, THEM, 2),
        (ANN, ANN, ANN, 1),
    ):
        os.chown(pid_file, file_of, file_of)
        os.chown(sockets, sockets_of, sockets_of)
        for left in sockets.iterdir():
            left.unlink()
        with socket.socket(socket.AF_UNIX) as listener:
            _bind(listener, sockets, listens)
            assert _as_user(ANN, joins) == expected, (file_of, sockets_of, listens)


def _bind(listener: socket.socket, sockets: Path, uid: int) -> None:
    """Listen as another user: the kernel notes who it was when it began."""
    listener.bind(str(sockets / ".s.PGSQL.5432"))
    (sockets / ".s.PGSQL.5432").chmod(0o777)
    os.seteuid(uid)
    try:
        listener.listen()
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("planted", ["link", "open", "theirs"])
def test_a_planted_password_is_not_taken(tmp_path, planted):
    server = EmbeddedServer(tmp_path / "data")
    server._prepare_home()
    file = server.password_file
    try:
        if planted == "link":
            (tmp_path / "known").write_text("known")
            (tmp_path / "known").chmod(0o600)
            file.symlink_to(tmp_path / "known")
        else:
            file.write_text("known")
            file.chmod(0o644 if planted == "open" else 0o600)
        if planted == "theirs":
            if os.geteuid() != 0:
                pytest.skip("only root gives files away")
            os.chown(file, THEM, THEM)
        with pytest.raises(OSError, match=r"is a link|can be read by others|belongs to uid"):
            server._set_password(None)
    finally:
        server.destroy()


class _Planted:
    """What runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self._mark),))


@pytest.mark.parametrize("how", ["directory", "file"])
def test_a_planted_cache_is_not_unpickled(tmp_path, how):
    mark, home = tmp_path / "was-run", tmp_path / "scikit_learn"
    home.mkdir()
    cache = home / "cache.pkl"
    cache.write_bytes(pickle.dumps(_Planted(mark)))

    def fetcher(data_home, **_):  # as scikit-learn's do
        return pickle.loads((Path(data_home) / "cache.pkl").read_bytes()) or ([[1.0]], [1.0])  # noqa: S301

    (home if how == "directory" else cache).chmod(0o777)
    with pytest.raises(DataError, match=r"Houses is not read from .* may be written to by everybody"):
        fetch("Houses", fetcher, tmp_path)
    assert not mark.exists()
    (home if how == "directory" else cache).chmod(0o700)
    fetch("Houses", fetcher, tmp_path)
    assert mark.exists()


@as_root
def test_a_planted_result_is_not_delivered(tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    (spool / "x.json").write_text("no result")
    os.chown(spool / "x.json", THEM, THEM)
    told: list[tuple[str, str, int | None]] = []
    ours = Spool(tmp_path)
    for _ in range(2):
        ours.deliver(None, 1, None, lambda *what: told.append(what))
    ((event, message, _),) = told  # once
    assert event == "result_refused"
    assert f"is not delivered: {spool / 'x.json'} belongs to " in message
    os.chown(spool / "x.json", 0, 0)
    ours.deliver(None, 1, None, lambda *what: told.append(what))
    assert "is damaged and lost" in told[1][1]


@as_root
def test_compiled_code_is_kept_where_nobody_else_was_before(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o1777)
    for planted in (False, True):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        if planted:
            os.chown(tmp_path / "tuner-torchinductor-0", THEM, THEM)
        keep_compiled_apart()
        found = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert (found.parent, found.stat().st_uid, found.stat().st_mode & 0o777) == (tmp_path, 0, 0o700)
        assert (found.name == "tuner-torchinductor-0") is not planted


def test_without_a_directory_for_temporary_files_no_compiled_code_is_loaded_and_no_worker_ends(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled_apart()
    place = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert not place.exists()
    with pytest.raises(NotADirectoryError, match="no usable directory for temporary files, set TMPDIR"):
        place.mkdir(parents=True)
