"""A folder of checkpoints: a directory of this machine, or one of a filesystem or bucket that fsspec opens."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from storage.files import UntrustedError, new_file
from tuner.errors import TunerError, first_line

if TYPE_CHECKING:
    import threading

_BLOCK_BYTES: Final = 4 * 2**20


class Folder(Protocol):
    """Files by their names, and nothing below them; each is there as a whole. Everything may raise OSError."""

    def read(self, name: str, n_bytes: int | None = None) -> bytes | None:
        """Return what a file holds, or how it begins; None if it is not there."""

    def write(self, name: str, data: memoryview, give_up: threading.Event) -> None:
        """Replace a file, or leave the one that is there if told to give up."""

    def names(self) -> list[str]:
        """Return the names of what is there."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there; and the folder after its last one, where it is a directory."""

    def remove_all(self) -> None:
        """Remove the folder with all that is in it."""


def folder(place: str, name: str) -> Folder:
    """Return the folder of that name at a URL, or below a directory. Raises TunerError if a package is missing."""
    protocol, separator, rest = place.partition("://")
    if not separator or protocol in ("file", "local"):
        return _Directory(Path(rest if separator else place, name))
    return _Remote(place, name)


def filesystem_class(place: str) -> Any:
    """Return fsspec's class for a URL or path. Raises TunerError that says which package it needs."""
    import fsspec

    protocol = place.partition("://")[0] if "://" in place else "file"
    try:
        return fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        raise TunerError(f"fsspec, which opens {place}, knows no protocol {protocol!r}") from error
    except ImportError as error:
        raise TunerError(f"{place} needs a package that is not installed here: {first_line(error)}") from error


class _Directory:
    """A directory that others of a team may write to as well: neither it nor a file in it is followed if it is a link.

    What is done in it is done in the one that was opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, name: str, n_bytes: int | None = None) -> bytes | None:
        try:
            with self._opened() as directory:
                # O_NONBLOCK: opening a FIFO would otherwise wait for its writer.
                handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
        except (FileNotFoundError, NotADirectoryError):
            return None
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UntrustedError(f"{self._path / name} is no file: remove it")
            return file.read() if n_bytes is None else file.read(n_bytes)

    def write(self, name: str, data: memoryview, give_up: threading.Event) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        aside = f"{name}.{secrets.token_hex(8)}"
        with self._opened() as directory:
            try:
                # The umask says who else of the team may read it.
                with open(new_file(aside, 0o666, folder=directory), "wb") as file:
                    if not _in_blocks(file, data, give_up):
                        return
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(aside, name, src_dir_fd=directory, dst_dir_fd=directory)
                os.fsync(directory)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(aside, dir_fd=directory)

    def names(self) -> list[str]:
        try:
            with self._opened() as directory:
                return os.listdir(directory)
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError), self._opened() as directory:
            os.unlink(name, dir_fd=directory)
        with suppress(OSError):  # others have theirs in it
            self._path.rmdir()

    def remove_all(self) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self._path)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            directory = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR) and self._path.is_symlink():
                raise UntrustedError(f"{self._path} is a link: remove it") from error
            raise
        try:
            yield directory
        finally:
            os.close(directory)


class _Remote:
    """A folder that fsspec opens. A bucket has no directories: it needs none made, and none is left."""

    def __init__(self, place: str, name: str) -> None:
        from fsspec.core import url_to_fs

        filesystem_class(place)
        self._fs, root = url_to_fs(place)
        self._path = f"{root.rstrip('/')}/{name}"

    def read(self, name: str, n_bytes: int | None = None) -> bytes | None:
        part = {} if n_bytes is None else {"start": 0, "end": n_bytes}
        try:
            data: bytes = self._fs.cat_file(f"{self._path}/{name}", **part)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return data

    def write(self, name: str, data: memoryview, give_up: threading.Event) -> None:
        aside = f"{self._path}/{name}.{secrets.token_hex(8)}"
        is_there = False
        try:
            with self._new(aside) as file:
                is_whole = _in_blocks(file, data, give_up)
            if is_whole and not give_up.is_set():
                self._fs.mv(aside, f"{self._path}/{name}")
                is_there = True
        finally:
            if not is_there:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(aside)

    def names(self) -> list[str]:
        try:
            return [path.rpartition("/")[2] for path in self._fs.ls(self._path, detail=False)]
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._path}/{name}")

    def remove_all(self) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm(self._path, recursive=True)

    def _new(self, path: str) -> Any:
        try:
            return self._fs.open(path, "wb")
        except FileNotFoundError:  # not asked for before: a bucket needs no directory, and may not be looked at
            self._fs.makedirs(self._path, exist_ok=True)
            return self._fs.open(path, "wb")


def _in_blocks(file: Any, data: memoryview, give_up: threading.Event) -> bool:
    """Write a new file; whether it is whole."""
    for start in range(0, len(data), _BLOCK_BYTES):
        if give_up.is_set():
            return False
        file.write(data[start : start + _BLOCK_BYTES])
    return not give_up.is_set()
