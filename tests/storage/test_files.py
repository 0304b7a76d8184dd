import os
import pwd
import stat
from pathlib import Path

import pytest

from storage.files import (
    UntrustedError,
    open_lock,
    open_own,
    own_directory,
    read_own,
    replace,
    require_own,
    require_own_files,
)

OTHER = 12345  # nobody's number here, as a user of this machine who is not us
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def home(tmp_path):
    """A directory of ours, closed to others."""
    (tmp_path / "home").mkdir(0o700)
    return tmp_path / "home"


def _made(directory, mode):
    directory.mkdir()
    directory.chmod(mode)
    return directory


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o750, 0o711, 0o500])
def test_a_directory_that_others_may_only_read_is_own(home, mode):
    require_own(_made(home / "data", mode))
    require_own(home / "data" / "not" / "there" / "yet")


@pytest.mark.parametrize(
    ("mode", "told"), [(0o777, "everybody"), (0o702, "everybody"), (0o1777, "everybody"), (0o720, "group")]
)
def test_a_directory_that_others_may_write_to_is_not(home, mode, told):
    data = _made(home / "data", mode)
    if told == "group":
        if os.geteuid() != 0:
            pytest.skip("only root gives a directory to another group")
        os.chown(data, -1, OTHER)
    with pytest.raises(UntrustedError, match=rf"{data} may be written to by {told}.*run 'chmod .-w {data}'"):
        require_own(data)


def test_a_directory_above_counts_unless_it_has_the_sticky_bit(home):
    above = _made(home / "above", 0o1777)
    data = _made(above / "data", 0o700)
    require_own(data)
    above.chmod(0o777)
    with pytest.raises(UntrustedError, match=rf"{above} may be written to by everybody"):
        require_own(data)
    with pytest.raises(UntrustedError, match="everybody"):
        require_own(above / "not-there-yet")
    with pytest.raises(UntrustedError, match="everybody"):
        require_own(home / "." / "above" / "data" / ".." / "data")


def test_what_a_link_leads_through_counts(home):
    way = _made(home / "open", 0o777)
    data = _made(home / "data", 0o700)
    (way / "link").symlink_to(data)
    (home / "link").symlink_to("open/link")
    (home / "loop").symlink_to("loop")
    for path in (way / "link", home / "link", home / "link" / "below"):
        with pytest.raises(UntrustedError, match=rf"{way} may be written to"):
            require_own(path)
    with pytest.raises(UntrustedError, match="more than 40 links"):
        require_own(home / "loop")
    way.chmod(0o700)
    require_own(home / "link")


@as_root
def test_what_belongs_to_another_user_is_not_own_wherever_it_is_on_the_way(home):
    above = _made(home / "above", 0o755)
    data = _made(above / "data", 0o700)
    for theirs in (above, data):
        os.chown(theirs, OTHER, OTHER)
        with pytest.raises(UntrustedError, match=rf"{theirs} belongs to uid {OTHER}"):
            require_own(data)
        os.chown(theirs, 0, 0)
    place = _made(home / "place", 0o1777)
    (place / "link").symlink_to(data)
    require_own(place / "link")
    os.chown(place / "link", OTHER, OTHER, follow_symlinks=False)
    with pytest.raises(UntrustedError, match=rf"link belongs to uid {OTHER}"):
        require_own(place / "link")


@as_root
def test_a_users_own_group_is_nobody_else_and_one_with_other_members_is(home, monkeypatch):
    data = _made(home / "data", 0o770)
    require_own(data)  # root's group, as umask 002 leaves it
    monkeypatch.setattr("grp.getgrgid", lambda gid: type("Group", (), {"gr_mem": ["root", "ann"], "gr_name": "root"}))
    with pytest.raises(UntrustedError, match="group root"):
        require_own(data)


@as_root
def test_our_own_group_may_write_where_root_lets_it_as_in_a_volume_of_kubernetes(home, monkeypatch):
    data = _made(home / "data", 0o2770)
    os.chown(data, 0, OTHER)
    data.chmod(0o2770)
    with pytest.raises(UntrustedError, match=f"group {OTHER}"):
        require_own(data)
    monkeypatch.setattr("os.geteuid", lambda: OTHER)
    require_own(data)


@as_root
def test_whom_an_access_control_list_lets_in_counts(home):
    data = _made(home / "data", 0o700)
    # Version 2, and entries of tag, permissions and id: the owner, user 12345, the group, the mask and others.
    entries = ((1, 7, -1), (2, 7, OTHER), (4, 0, -1), (16, 7, -1), (32, 0, -1))
    acl = b"\2\0\0\0" + b"".join(
        tag.to_bytes(2, "little") + may.to_bytes(2, "little") + (who % 2**32).to_bytes(4, "little")
        for tag, may, who in entries
    )
    try:
        os.setxattr(data, "system.posix_acl_access", acl)
    except OSError:
        pytest.skip("the file system has no access control lists")
    assert data.stat().st_mode & 0o777 == 0o770
    with pytest.raises(UntrustedError, match="group"):
        require_own(data)


@as_root
def test_root_itself_is_trusted_by_others(home):
    home.chmod(0o755)
    child = os.fork()
    if child == 0:
        os.setgid(OTHER)
        os.setuid(OTHER)
        require_own(Path("/usr"))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_who_names_a_directory_trusts_it_with_all_that_is_in_it(home, monkeypatch):
    data = _made(_made(home / "open", 0o777) / "data", 0o777)
    (data / "file").write_text("x")
    (data / "file").chmod(0o666)
    monkeypatch.setenv("TUNER_TRUSTED_DIRECTORIES", f"/elsewhere:{home / 'open'}")
    require_own(data)
    require_own_files(data)
    assert read_own(data / "file") == b"x"
    monkeypatch.setenv("TUNER_TRUSTED_DIRECTORIES", f"{home / 'ope'}:")
    with pytest.raises(UntrustedError):
        require_own(data)


def test_what_is_made_is_closed_whatever_the_umask(home):
    before = os.umask(0)
    try:
        assert own_directory(home / "a" / "b") == home / "a" / "b"
        replace(home / "a" / "c" / "file", b"x")
        os.close(open_lock(home / "a" / "lock"))
    finally:
        os.umask(before)
    for path in home.rglob("*"):
        assert not path.stat().st_mode & 0o077, path


def test_a_link_in_the_place_of_a_file_is_replaced_and_never_followed(home, monkeypatch):
    target = home / "target"
    target.write_text("mine")
    (home / "file").symlink_to(target)
    replace(home / "file", b"new", mode=0o640)
    assert (target.read_text(), (home / "file").read_text()) == ("mine", "new")
    assert stat.S_IMODE((home / "file").lstat().st_mode) == 0o640
    # Even one whose name was foreseen.
    monkeypatch.setattr("secrets.token_hex", lambda n: "foreseen")
    (home / "file.foreseen").symlink_to(target)
    with pytest.raises(FileExistsError):
        replace(home / "file", b"newer")
    (home / "lock").symlink_to(home / "made")
    with pytest.raises(OSError, match="symbolic links"):
        open_lock(home / "lock")
    assert not (home / "made").exists()
    assert target.read_text() == "mine"


def test_what_is_read_is_a_file_that_nobody_else_can_have_written(home):
    file = home / "file"
    file.write_text("secret")
    file.chmod(0o644)
    assert read_own(file) == b"secret"
    with pytest.raises(UntrustedError, match="can be read by others, with mode 0644"):
        read_own(file, is_secret=True)
    file.chmod(0o666)
    with pytest.raises(UntrustedError, match="everybody"):
        read_own(file)
    file.chmod(0o600)
    (home / "link").symlink_to(file)
    os.mkfifo(home / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(UntrustedError, match=f"{name} is "):
            open_own(home / name)
    if os.geteuid() == 0:
        os.chown(file, OTHER, OTHER)
        with pytest.raises(UntrustedError, match=f"uid {OTHER}"):
            read_own(file)
        assert read_own(file, owner=OTHER) == b"secret"
        assert pwd.getpwuid(0).pw_name == "root"


def test_a_tree_is_own_with_each_file_in_it(home):
    deep = home / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "cache.pkl").write_bytes(b"x")
    require_own_files(home)
    outside = _made(home.parent / "outside", 0o777)
    (outside / "cache.pkl").write_bytes(b"x")
    (deep / "link").symlink_to(outside / "cache.pkl")
    with pytest.raises(UntrustedError, match=f"{outside} may be written to"):
        require_own_files(home)
    (deep / "link").unlink()
    (deep / "link").symlink_to(outside)
    with pytest.raises(UntrustedError, match="link to a directory"):
        require_own_files(home)
    (deep / "link").unlink()
    (deep / "cache.pkl").chmod(0o666)
    with pytest.raises(UntrustedError, match=r"cache.pkl may be written to"):
        require_own_files(home)
