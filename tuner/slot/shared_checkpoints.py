"""Where every machine finds the checkpoints of a study's trials: in the database, or in a folder or bucket by URL."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.exc import SQLAlchemyError

from storage.coordination import checkpoints
from storage.coordination.claims import Claim
from storage.database.engine import is_outage
from storage.database.errors import InvalidWriteError, StorageError
from storage.database.sessions import Sessions
from tuner.errors import SharedPlaceError, TunerError, UsageError, first_line
from tuner.study.joining import AnyStudy, Study, checkpoint_directory

if TYPE_CHECKING:
    import threading

    from fsspec import AbstractFileSystem

    from storage.optuna_storage.storage import PostgresStorage
    from tuner.training.checkpoint import Shared

DATABASE: Final = "database"
LOCAL: Final = "local"

_UNFIT: Final = {"memory": "a process has it to itself", "http": "it cannot be written to"}
_UNFIT["https"] = _UNFIT["data"] = _UNFIT["http"]
_BLOCK_BYTES: Final = 4 * 2**20
_FILE: Final = re.compile(r"trial-(\d+)\.pt(\..*)?")


def checked_place(text: str) -> str:
    """Return what a spec says for `--checkpoints`; nothing is connected.

    Raises UsageError for what is no place, and for a filesystem whose package is not installed here.
    """
    if text in (DATABASE, LOCAL):
        return text
    place = f"file://{text}" if text.startswith("/") else text
    protocol, separator, rest = place.partition("://")
    if not (protocol and separator and rest) or "::" in place:
        raise UsageError(
            f"--checkpoints needs database, local, an absolute path or a URL such as s3://bucket/folder, got {text!r}"
        )
    if protocol in ("file", "local") and not rest.startswith("/"):
        raise UsageError(f"--checkpoints needs an absolute path, as in file:///mnt/share, got {text!r}")
    if protocol in _UNFIT:
        raise UsageError(f"--checkpoints cannot be at {protocol}://: {_UNFIT[protocol]}")
    if re.match(r"[^/]*:[^/]*@", rest):
        raise UsageError(
            f"--checkpoints is stored with the study and must hold no password, got one in {protocol}://***@"
            f"{rest.rpartition('@')[2]}; leave it to the configuration of each worker's machine"
        )
    try:
        _filesystem_class(place)
    except TunerError as error:
        raise UsageError(f"--checkpoints: {error}") from error
    return place.rstrip("/") if rest.strip("/") else place


def shared_checkpoint(study: Study, storage: PostgresStorage, held: Claim) -> Shared | None:
    """Return where other machines find the checkpoint of a trial that is held, None if nowhere."""
    place = study.spec.checkpoints
    if place == LOCAL:
        return None
    if place == DATABASE:
        return InDatabase(storage.sessions, Sessions(storage.engine), held)
    return InFolder(place, study.directory, held.number)


class InDatabase:
    """The checkpoint of one trial in the study's database, written only while the lease is ours.

    Reading waits for a database that is away by `patient`, and raises UnreachableError in the end; writing does not.
    """

    def __init__(self, patient: Sessions, hasty: Sessions, held: Claim) -> None:
        self._patient = patient
        self._hasty = hasty
        self._held = held

    def __str__(self) -> str:
        return "the database"

    def head(self, n_bytes: int) -> bytes | None:
        with _refusals():
            return checkpoints.load_head(self._patient, self._held.trial_id, n_bytes)

    def read(self) -> bytes | None:
        with _refusals():
            return checkpoints.load(self._patient, self._held.trial_id)

    def write(self, data: memoryview, give_up: threading.Event) -> None:
        try:
            checkpoints.save(self._hasty, self._held, data, give_up)
        except InvalidWriteError as error:
            raise SharedPlaceError(f"{error}; a study with --checkpoints URL keeps larger ones in a folder") from error
        except (StorageError, SQLAlchemyError) as error:
            raise SharedPlaceError(first_line(error)) from error

    def delete(self) -> None:
        """Do nothing: it goes in the statement that ends its trial."""


class InFolder:
    """The checkpoint of one trial in a folder or bucket, which takes it as a whole where it can rename or copy.

    Nothing there knows of leases. A worker that has lost its trial may replace the file by one that is older,
    or leave it behind, which costs time or space and nothing else: it is a state of the same training.
    """

    def __init__(self, place: str, directory: str, number: int) -> None:
        self._place = place
        self._directory = directory
        self._name = f"trial-{number}.pt"

    def __str__(self) -> str:
        return f"{self._place}/{self._directory}/{self._name}"

    def head(self, n_bytes: int) -> bytes | None:
        return self._cat(start=0, end=n_bytes)

    def read(self) -> bytes | None:
        return self._cat()

    def write(self, data: memoryview, give_up: threading.Event) -> None:
        with _foreign_errors():
            fs, folder = _folder(self._place, self._directory)
            path = f"{folder}/{self._name}"
            aside = f"{path}.{socket.gethostname()}-{os.getpid()}"
            is_there = False
            try:
                if _write(fs, aside, data, give_up):
                    fs.mv(aside, path)
                    is_there = True
            finally:
                if not is_there:
                    with suppress(FileNotFoundError):
                        fs.rm_file(aside)

    def delete(self) -> None:
        with _foreign_errors():
            fs, folder = _folder(self._place, self._directory)
            with suppress(FileNotFoundError):
                fs.rm_file(f"{folder}/{self._name}")
            _remove_if_empty(fs, folder)

    def _cat(self, **part: int) -> bytes | None:
        with _foreign_errors():
            fs, folder = _folder(self._place, self._directory)
            try:
                data: bytes = fs.cat_file(f"{folder}/{self._name}", **part)
            except (FileNotFoundError, NotADirectoryError):
                return None
            return data


def sweep(study: Study, data_dir: Path, sessions: Sessions, log: Callable[[str], None]) -> None:
    """Delete what is left, here and in the study's folder, of the checkpoints of trials that have ended.

    A trial that ends on another machine, or that is quarantined, leaves its file. What cannot be deleted is logged.
    Raises TunerError if this machine lacks the package for the study's folder.
    """
    for place, directory in _places(study, data_dir):
        try:
            with _foreign_errors():
                fs, folder = _folder(place, directory)
                found = _checkpoints_in(fs, folder)
            if not found:
                continue
            needed = checkpoints.still_needed(sessions, study.study_id, sorted(set(found.values())))
            with _foreign_errors():
                for path in (path for path, number in found.items() if number not in needed):
                    with suppress(FileNotFoundError):  # another worker was faster
                        fs.rm_file(path)
                _remove_if_empty(fs, folder)
        except SharedPlaceError as error:
            log(f"cannot look for old checkpoints in {place}/{directory}: {error}")


def delete_checkpoints(study: AnyStudy, data_dir: Path) -> list[str]:
    """Delete all checkpoints of a study that are here or in its folder; return a line for each that stay."""
    problems = []
    for place, directory in _places(study, data_dir):
        try:
            with _foreign_errors():
                fs, folder = _folder(place, directory)
                with suppress(FileNotFoundError):
                    fs.rm(folder, recursive=True)
        except (SharedPlaceError, TunerError) as error:
            problems.append(f"the checkpoints in {place}/{directory} are left, delete them by hand: {error}")
    return problems


def _places(study: AnyStudy, data_dir: Path) -> list[tuple[str, str]]:
    """Return the folders that may hold checkpoints of the study, each as its place and its name there."""
    here = checkpoint_directory(data_dir, study)
    found = [(str(here.parent), here.name)]
    if study.spec is not None and study.spec.checkpoints not in (DATABASE, LOCAL):
        found.append((study.spec.checkpoints, study.directory))
    return found


def _filesystem_class(place: str) -> Any:
    """Return fsspec's class for a URL or path. Raises TunerError that says which package it needs."""
    import fsspec

    protocol = place.partition("://")[0] if "://" in place else "file"
    try:
        return fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        raise TunerError(f"fsspec, which opens {place}, knows no protocol {protocol!r}") from error
    except ImportError as error:
        raise TunerError(f"{place} needs a package that is not installed here: {first_line(error)}") from error


def _folder(place: str, directory: str) -> tuple[AbstractFileSystem, str]:
    """Return a filesystem and the path of a directory on it."""
    from fsspec.core import url_to_fs

    _filesystem_class(place)
    fs, root = url_to_fs(place)
    return fs, f"{root.rstrip('/')}/{directory}"


def _write(fs: AbstractFileSystem, path: str, data: memoryview, give_up: threading.Event) -> bool:
    """Write a new file; whether it is whole."""
    from fsspec.implementations.local import LocalFileSystem

    with _opened(fs, path) as file:
        for start in range(0, len(data), _BLOCK_BYTES):
            if give_up.is_set():
                return False
            file.write(data[start : start + _BLOCK_BYTES])
        if isinstance(fs, LocalFileSystem):
            file.flush()
            os.fsync(file.fileno())
    return not give_up.is_set()


def _opened(fs: AbstractFileSystem, path: str) -> Any:
    try:
        return fs.open(path, "wb")
    except FileNotFoundError:  # not asked for before: a bucket needs no directory, and may not be looked at
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        return fs.open(path, "wb")


def _checkpoints_in(fs: AbstractFileSystem, folder: str) -> dict[str, int]:
    """Return the files of checkpoints in a folder, also what killed writers have left, with their trials' numbers."""
    try:
        paths = fs.ls(folder, detail=False)
    except FileNotFoundError:
        return {}
    named = ((path, _FILE.fullmatch(path.rpartition("/")[2])) for path in paths)
    return {path: int(match[1]) for path, match in named if match is not None}


def _remove_if_empty(fs: AbstractFileSystem, folder: str) -> None:
    from fsspec.implementations.local import LocalFileSystem

    if isinstance(fs, LocalFileSystem):  # a bucket has no directories
        with suppress(OSError):  # others have theirs in it
            fs.rmdir(folder)


@contextmanager
def _refusals() -> Iterator[None]:
    """Map what the database refuses; that it is away is for others to deal with."""
    try:
        yield
    except StorageError as error:
        if is_outage(error):
            raise
        raise SharedPlaceError(first_line(error)) from error


@contextmanager
def _foreign_errors() -> Iterator[None]:
    try:
        yield
    except TunerError:
        raise
    except OSError as error:
        raise SharedPlaceError(error.strerror or first_line(error) or type(error).__name__) from error
    except Exception as error:
        raise SharedPlaceError(f"{type(error).__name__}: {first_line(error)}") from error
