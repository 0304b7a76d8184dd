"""Where every machine finds the checkpoints of a study's trials: in the database, or in a folder or bucket by URL."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import SQLAlchemyError

from storage.coordination import checkpoints
from storage.coordination.claims import Claim
from storage.database.engine import is_outage
from storage.database.errors import InvalidWriteError, StorageError
from storage.database.sessions import Sessions
from tuner.errors import SharedPlaceError, TunerError, UsageError, first_line
from tuner.slot import left_checkpoints
from tuner.slot.folders import filesystem_class, folder
from tuner.study.joining import AnyStudy, Study, checkpoint_directory

if TYPE_CHECKING:
    import threading

    from storage.optuna_storage.storage import PostgresStorage
    from tuner.training.checkpoint import Shared

DATABASE: Final = "database"
LOCAL: Final = "local"

_UNFIT: Final = {"memory": "a process has it to itself", "http": "it cannot be written to"}
_UNFIT["https"] = _UNFIT["data"] = _UNFIT["http"]
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
        filesystem_class(place)
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
        return self._read(n_bytes)

    def read(self) -> bytes | None:
        return self._read()

    def write(self, data: memoryview, give_up: threading.Event) -> None:
        with foreign_errors():
            folder(self._place, self._directory).write(self._name, data, give_up)

    def delete(self) -> None:
        with foreign_errors():
            folder(self._place, self._directory).remove(self._name)

    def _read(self, n_bytes: int | None = None) -> bytes | None:
        with foreign_errors():
            return folder(self._place, self._directory).read(self._name, n_bytes)


def sweep(study: Study, data_dir: Path, sessions: Sessions, log: Callable[[str], None]) -> None:
    """Delete what is left, here and in the study's folder, of the checkpoints of trials that have ended.

    A trial that ends on another machine, or that is quarantined, leaves its file. What cannot be deleted is logged.
    Raises TunerError if this machine lacks the package for the study's folder.
    """
    for place, directory in _places(study, data_dir):
        try:
            with foreign_errors():
                there = folder(place, directory)
                named = {name: match for name in there.names() if (match := _FILE.fullmatch(name)) is not None}
            found = {name: int(match[1]) for name, match in named.items()}  # what killed writers left among it
            if not found:
                continue
            needed = checkpoints.still_needed(sessions, study.study_id, sorted(set(found.values())))
            with foreign_errors():
                for name in (name for name, number in found.items() if number not in needed):
                    there.remove(name)
        except SharedPlaceError as error:
            log(f"cannot look for old checkpoints in {place}/{directory}: {error}")


def delete_checkpoints(study: AnyStudy, data_dir: Path) -> list[str]:
    """Delete all checkpoints of a study that are here or in its folder; return a line for each that stay."""
    problems = []
    for place, directory in _places(study, data_dir):
        try:
            with foreign_errors():
                folder(place, directory).remove_all()
        except (SharedPlaceError, TunerError) as error:
            problems.append(f"the checkpoints in {place}/{directory} are left, delete them by hand: {error}")
    left_checkpoints.forget(study.directory, data_dir)
    return problems


def _places(study: AnyStudy, data_dir: Path) -> list[tuple[str, str]]:
    """Return the folders that may hold checkpoints of the study, each as its place and its name there."""
    here = checkpoint_directory(data_dir, study)
    found = [(str(here.parent), here.name)]
    if study.spec is not None and study.spec.checkpoints not in (DATABASE, LOCAL):
        found.append((study.spec.checkpoints, study.directory))
    return found


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
def foreign_errors() -> Iterator[None]:
    """Map what a folder or a bucket meets with to SharedPlaceError."""
    try:
        yield
    except TunerError:
        raise
    except OSError as error:
        raise SharedPlaceError(error.strerror or first_line(error) or type(error).__name__) from error
    except Exception as error:
        raise SharedPlaceError(f"{type(error).__name__}: {first_line(error)}") from error
