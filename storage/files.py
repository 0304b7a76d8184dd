"""Files and directories that are this user's own, and files that are whole at any time.

A directory is own if it belongs to this user or to root, and nobody else may write to it; and if nobody else could put
another one in its place, by writing to a directory above it or by a link of theirs on the way. To write to a directory
above is no harm where that has the sticky bit, as /tmp has. A group that has the number of the directory's owner, or
of this user, and no other member, is nobody else: many systems give each user one, and let it write by default; and
Kubernetes makes volumes root's and such a group's.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import secrets
import shlex
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO, Final, TextIO

TRUSTED: Final = "TUNER_TRUSTED_DIRECTORIES"
"""The variable that names directories, separated as in PATH, that are taken for own with all that is in them."""

_TRIED_BYTES: Final = 1 << 20
_LINKS_MAX: Final = 40  # the kernel's
_ACL: Final = "system.posix_acl_access"
_FULL_MAP: Final = ["0", "0", "4294967295"]


class UntrustedError(PermissionError):
    """Somebody else could have put there what is about to be read, or take what is about to be written."""


def require_own(directory: Path) -> None:
    """Raise UntrustedError unless a directory is own, or would be where it is not there yet. Raises OSError."""
    waiting = list(reversed(directory.absolute().parts[1:]))
    place, links = Path(os.sep), 0
    while waiting:
        _check(place, os.lstat(place), is_last=False)
        part = waiting.pop()
        if part == os.pardir:
            place = place.parent
            continue
        path = place / part
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):  # whoever needs it says so
            return
        if not stat.S_ISLNK(found.st_mode):
            place = path
            continue
        links += 1
        if links > _LINKS_MAX:
            raise UntrustedError(f"{directory} is behind more than {_LINKS_MAX} links")
        _check_owner(path, found, is_last=False)
        target = Path(os.readlink(path))
        waiting += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        place = Path(os.sep) if target.is_absolute() else place
    _check(place, os.lstat(place), is_last=True)


def own_directory(directory: Path) -> Path:
    """Return the directory, made if it is not there, and those above it, closed to others. Raises OSError.

    Raises UntrustedError unless it is own.
    """
    require_own(directory)
    for place in reversed(directory.parents):
        if not place.is_dir():
            with suppress(FileExistsError):  # somebody else was as quick; or a file, at which the next one fails
                place.mkdir(0o700)
    directory.mkdir(0o700, exist_ok=True)
    require_own(directory)
    return directory


def require_own_files(directory: Path) -> None:
    """Raise UntrustedError unless a directory is own with all that is in it, and what its links lead to."""
    require_own(directory)
    for place, directories, names in os.walk(directory):
        for path in (Path(place, name) for name in (*directories, *names)):
            if path.is_symlink() and path.is_dir():
                raise UntrustedError(f"{path} is a link to a directory: have the directory itself there")
            if path.is_symlink():
                require_own(Path(os.path.realpath(path)).parent)
            _check(path, path.stat(), is_last=True)


def replace(path: Path, data: bytes | memoryview, mode: int = 0o600) -> None:
    """Write a file aside in an own directory, sync it and put it in the place of the one that is there.

    No link is followed. Raises OSError, and then leaves that one as it was and nothing beside it.
    """
    own_directory(path.parent)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with open(new_file(aside), "wb") as file:
            os.fchmod(file.fileno(), mode)  # past the umask
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_directory(path.parent)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Yield a file to be written as UTF-8, which takes the place of the one that is there once the block has ended.

    It may be in any directory, and keeps the mode of that one. A link is followed, and what is no file, as /dev/stdout,
    is written to. Raises OSError; then, and if the block fails, that one stays as it was and nothing beside it.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():
        with place.open("w", encoding="utf-8") as special:
            yield special
        return
    aside = place.with_name(f".tuner-{secrets.token_hex(8)}")
    try:
        with open(new_file(aside, 0o666), "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if place.exists():
            shutil.copymode(place, aside)
        os.replace(aside, place)
        sync_directory(place.parent)
    finally:
        with suppress(OSError):  # it is in its place, or was never made
            aside.unlink()


def new_file(name: str | Path, mode: int = 0o600, *, folder: int | None = None) -> int:
    """Return the descriptor of a new file, to be written; in an open directory if there is one. Raises OSError."""
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=folder)


def open_lock(path: Path, *, create: bool = True) -> int:
    """Return the descriptor of a file to be locked, which is no link. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o600)


def open_own(path: Path, *, owner: int | None = None, is_secret: bool = False) -> BinaryIO:
    """Open a file that nobody else can have written, to be read; `owner` is another user who may have.

    A secret is one that nobody else may read. Raises OSError, and UntrustedError for another file, or a link.
    """
    try:
        # O_NONBLOCK: opening a FIFO would otherwise wait for its writer.
        file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")  # noqa: SIM115 - for the caller
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UntrustedError(f"{path} is a link: remove it") from error
        raise
    try:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise UntrustedError(f"{path} is no file: remove it")
        if found.st_uid != owner:
            _check(path, found, is_last=True)
        if is_secret and found.st_mode & 0o077:
            raise UntrustedError(
                f"{path} can be read by others, with mode {stat.S_IMODE(found.st_mode):04o}: remove it"
            )
    except OSError:
        file.close()
        raise
    return file


def read_own(path: Path, *, owner: int | None = None, is_secret: bool = False) -> bytes:
    """Return what a file holds, as `open_own` opens it."""
    with open_own(path, owner=owner, is_secret=is_secret) as file:
        return file.read()


def refuses_writes(directory: Path) -> str | None:
    """Return why nothing can be kept in a directory, which is made if it is not there; None if it can."""
    try:
        own_directory(directory)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(_TRIED_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def sync_directory(directory: Path) -> None:
    """Have the disk keep which files are in a directory."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check(path: Path, found: os.stat_result, *, is_last: bool) -> None:
    """Raise UntrustedError if others may write to a directory, or put another one in the place of what is in it."""
    if _is_trusted(path):
        return
    _check_owner(path, found, is_last=is_last)
    if found.st_mode & stat.S_ISVTX and not is_last:
        return
    if found.st_mode & stat.S_IWOTH:
        who, which = "everybody", "o-w"
    elif found.st_mode & stat.S_IWGRP and not _is_private(path, found):
        who, which = f"group {_group_name(found.st_gid)}", "g-w"
    else:
        return
    raise UntrustedError(
        f"{path} may be written to by {who} (mode {stat.S_IMODE(found.st_mode):04o}), so that what is there could be"
        f" anybody's: run 'chmod {which} {shlex.quote(str(path))}', choose another directory, or name it in"
        f" {TRUSTED} if you trust them"
    )


def _check_owner(path: Path, found: os.stat_result, *, is_last: bool) -> None:
    trusted = {os.geteuid(), 0}
    if not is_last and (unknown := _unknown_owner()) is not None:
        trusted.add(unknown)
    if found.st_uid not in trusted and not _is_trusted(path):
        raise UntrustedError(
            f"{path} belongs to {_user_name(found.st_uid)}, so that what is there could be theirs: choose another"
            f" directory, or name it in {TRUSTED} if you trust them"
        )


def _is_trusted(path: Path) -> bool:
    named = [name for name in os.environ.get(TRUSTED, "").split(os.pathsep) if name]
    place = Path(os.path.realpath(path.parent)) / path.name if named else path
    return any(place.is_relative_to(os.path.realpath(name)) for name in named)


def _is_private(path: Path, found: os.stat_result) -> bool:
    """Whether what a directory's group may do is for its owner, or for us, alone."""
    if found.st_gid not in (found.st_uid, os.geteuid()):
        return False
    if hasattr(os, "listxattr"):
        with suppress(OSError):  # a file system without
            if _ACL in os.listxattr(path):  # the group's mode stands for all that it lets in
                return False
    try:
        members = grp.getgrgid(found.st_gid).gr_mem
    except KeyError:
        return True
    return set(members) <= {_user_name(found.st_gid)}


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"{gid}"


@cache
def _unknown_owner() -> int | None:
    """Return who root seems to be in a container of a user who is not: an owner that the container has no number for.

    So it is with Apptainer, where /home belongs to it.
    """
    try:
        if Path("/proc/self/uid_map").read_text().split() == _FULL_MAP:
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):  # not on Linux
        return None
