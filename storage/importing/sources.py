"""Studies of any Optuna storage, to be read only: SQLite, MySQL, PostgreSQL and journal files.

Nothing is ever written to a source, which is why Optuna's own RDBStorage does not open it: that creates a SQLite file
that is not there, and stamps tables of unknown age with its own version. (SQLite itself may leave an empty -wal and a
-shm file beside a file in its WAL mode, which every reader needs.)
"""

from __future__ import annotations

import datetime as dt
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial
from sqlalchemy import URL, Connection, Engine, NullPool, column, create_engine, inspect, make_url, select, table
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from storage.database.engine import open_engine
from storage.database.errors import InvalidURLError, SchemaVersionError, StorageError, UnreachableError
from storage.database.sessions import explained
from storage.database.tables import trials, tuner_curves, tuner_studies
from storage.database.url import mask_url
from storage.database.values import utc_time
from storage.importing.portable import read_trials
from storage.optuna_storage.studies import all_studies

OPTUNA_REVISION: Final = "v3.2.0.a"
"""Of Optuna's tables, those of Optuna 3.2 to 5; a test holds it against Optuna."""

_OLDER_REVISIONS: Final = frozenset(
    ("v0.9.0.a", "v1.2.0.a", "v1.3.0.a", "v2.4.0.a", "v2.6.0.a", "v3.0.0.a", "v3.0.0.b", "v3.0.0.c", "v3.0.0.d")
)
_OPTUNA_TABLES: Final = frozenset({"studies", "study_directions", "trials", "trial_values", "version_info"})
_WANTED: Final = (
    "tuner imports from sqlite:///FILE, mysql+pymysql://user@host/database, postgresql://user@host/database,"
    " or the path of a SQLite or journal file"
)
_DRIVERS: Final = {
    "MySQLdb": "mysqlclient",
    "mysql": "mysql-connector-python",
    "pymysql": "pymysql",
    "mariadb": "mariadb",
}
_SQLITE_HEADER: Final = b"SQLite format 3\0"


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """What tells a trial from any other, cheap to read. Times are naive UTC."""

    trial_id: int
    number: int | None
    is_finished: bool
    started: dt.datetime | None
    ended: dt.datetime | None


def stamp_of(trial: FrozenTrial) -> Stamp:
    """Return the stamp of a trial that was read."""
    return Stamp(
        trial_id=trial._trial_id,
        number=trial.number,
        is_finished=trial.state.is_finished(),
        started=utc_time(trial.datetime_start),
        ended=utc_time(trial.datetime_complete),
    )


class Source(ABC):
    """An Optuna storage that studies are read from; `shown` is its URL without secrets."""

    shown: str

    @abstractmethod
    def studies(self) -> list[FrozenStudy]:
        """Return the studies, oldest first."""

    @abstractmethod
    def stamps(self, study_id: int) -> list[Stamp]:
        """Return one stamp for each trial of a study, in no order."""

    @abstractmethod
    def trials(self, trial_ids: Sequence[int]) -> list[FrozenTrial]:
        """Return the trials of these ids, in no order; a trial that is gone by now is left out."""

    def spec(self, study_id: int) -> dict[str, Any] | None:  # noqa: ARG002 - for subclasses
        """Return what tuner created the study with, by the columns' names; None for a study of other programs."""
        return None

    def curves(self, trial_ids: Sequence[int]) -> list[dict[str, Any]]:  # noqa: ARG002 - for subclasses
        """Return the rows that tuner keeps of the epochs of these trials, by the columns' names."""
        return []


class JournalSource(Source):
    """An Optuna journal file, read as a whole."""

    def __init__(self, path: Path) -> None:
        self.shown = f"journal:{path}"
        try:
            self._storage = JournalStorage(JournalFileBackend(str(path)))
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            # Optuna replays whatever lines of JSON there are, and stumbles over what it finds in them.
            raise StorageError(f"{path} is no Optuna journal ({type(error).__name__}: {error}); {_WANTED}") from error
        self._trials: dict[int, FrozenTrial] = {}  # by id, of the studies whose stamps were asked for

    def studies(self) -> list[FrozenStudy]:
        return self._storage.get_all_studies()

    def stamps(self, study_id: int) -> list[Stamp]:
        found = self._storage.get_all_trials(study_id, deepcopy=False)
        self._trials |= {trial._trial_id: trial for trial in found}
        return [stamp_of(trial) for trial in found]

    def trials(self, trial_ids: Sequence[int]) -> list[FrozenTrial]:
        return [self._trials[trial_id] for trial_id in trial_ids]


class SqlSource(Source):
    """Optuna's tables in a database of any kind.

    A live study may go on meanwhile. The row of a trial is read before what belongs to it, and a finished trial no
    longer changes, so that a finished trial is whole even where statements do not share a snapshot.
    """

    def __init__(self, engine: Engine, shown: str) -> None:
        self.engine = engine
        self.shown = shown
        with self.connect() as conn:
            names = set(inspect(conn).get_table_names())
            _check_tables(conn, names, shown)
            ours = inspect(conn).get_columns(tuner_studies.name) if tuner_studies.name in names else []
        has = {column["name"] for column in ours}  # version 0.1 had no history, and no curves
        self._kept = [tuner_studies.c[name] for name in ("spec", "created_at", "history") if name in has]
        self._has_curves = tuner_curves.name in names

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """Give a connection for one transaction. Raises StorageErrors."""
        try:
            with self.engine.connect() as conn:
                if conn.dialect.name in ("mysql", "mariadb"):
                    conn.exec_driver_sql("SET SESSION TRANSACTION READ ONLY")
                yield conn
        except DBAPIError as error:
            raise self._explained(error) from error

    def _explained(self, error: DBAPIError) -> Exception:
        reason = " ".join(str(error.orig).split())
        if self.engine.dialect.name == "postgresql":
            return explained(error, self.shown)
        if self.engine.dialect.name == "sqlite":
            return StorageError(f"cannot read {self.shown}: {reason}; check that it is a SQLite file that nobody locks")
        if isinstance(error, OperationalError):
            return UnreachableError(f"cannot reach {self.shown}: {reason}; check the server, the user and the password")
        return StorageError(f"{self.shown} refused: {reason}")

    def studies(self) -> list[FrozenStudy]:
        with self.connect() as conn:
            return all_studies(conn)

    def stamps(self, study_id: int) -> list[Stamp]:
        query = select(
            trials.c.trial_id, trials.c.number, trials.c.state, trials.c.datetime_start, trials.c.datetime_complete
        ).where(trials.c.study_id == study_id)
        with self.connect() as conn:
            return [
                Stamp(
                    trial_id=row.trial_id,
                    number=row.number,
                    is_finished=row.state not in ("RUNNING", "WAITING"),
                    started=row.datetime_start,
                    ended=row.datetime_complete,
                )
                for row in conn.execute(query)
            ]

    def trials(self, trial_ids: Sequence[int]) -> list[FrozenTrial]:
        try:
            with self.connect() as conn:
                return read_trials(conn, trial_ids)
        except (LookupError, ValueError) as error:
            raise StorageError(
                f"{self.shown} holds what Optuna cannot read either, in trials of the ids {min(trial_ids)} to"
                f" {max(trial_ids)}: {error}; mend or delete them there"
            ) from error

    def spec(self, study_id: int) -> dict[str, Any] | None:
        if not self._kept:
            return None
        query = select(*self._kept).where(tuner_studies.c.study_id == study_id)
        with self.connect() as conn:
            row = conn.execute(query).one_or_none()
        return None if row is None else dict(row._mapping)

    def curves(self, trial_ids: Sequence[int]) -> list[dict[str, Any]]:
        if not self._has_curves:
            return []
        query = select(tuner_curves).where(tuner_curves.c.trial_id.in_(trial_ids))
        with self.connect() as conn:
            return [dict(row._mapping) for row in conn.execute(query)]


@contextmanager
def open_source(given: str, password: str | None = None) -> Iterator[Source]:
    """Open what `given` names: a URL, `journal:PATH`, or the path of a SQLite or journal file.

    `password` is added to a URL that has none.
    Raises InvalidURLError, UnreachableError, SchemaVersionError, or StorageError for what holds no Optuna studies.
    """
    if given.startswith("journal:"):
        yield JournalSource(_file(given.removeprefix("journal:").removeprefix("//")))
        return
    if "://" not in given:
        path = _file(given)
        if not _is_sqlite(path):
            yield JournalSource(path)
            return
        url = URL.create("sqlite", database=str(path))
    else:
        url = _parsed(given)
    if password is not None:
        url = _with_password(url, password)
    shown = _shown(url)
    engine = _engine(url, shown)
    try:
        yield SqlSource(engine, shown)
    finally:
        engine.dispose()


def _parsed(given: str) -> URL:
    try:
        url = make_url("postgresql" + given.removeprefix("postgres") if given.startswith("postgres://") else given)
    except (ArgumentError, ValueError):
        # The original error quotes what it took for the port, which may be a piece of the password.
        raise InvalidURLError(f"{_WANTED}; this URL is malformed (in a password write '@' as %40)") from None
    if url.get_backend_name() not in ("sqlite", "mysql", "mariadb", "postgresql"):
        raise InvalidURLError(f"{_WANTED}; got {url.drivername[:40]!a}")
    return url.set(database=str(_file(url.database or ""))) if url.get_backend_name() == "sqlite" else url


def _with_password(url: URL, password: str) -> URL:
    if url.get_backend_name() == "sqlite":
        raise InvalidURLError(f"{_shown(url)} takes no password; drop the password file")
    if url.password is not None:
        raise InvalidURLError(f"{_shown(url)} has a password already; drop it or the password file")
    return url.set(password=password)


def _shown(url: URL) -> str:
    if url.get_backend_name() == "postgresql":
        return mask_url(url)
    return url.set(query={}).render_as_string(hide_password=True)


def _engine(url: URL, shown: str) -> Engine:
    if url.get_backend_name() == "postgresql":
        return open_engine(url, read_only=True, application_name="tuner import")
    if url.get_backend_name() == "sqlite":
        # Percent-encoded: a '?' in the file's name would end it.
        uri = f"file:{quote(url.database or '')}?mode=ro"
        return create_engine(
            "sqlite://", creator=lambda: sqlite3.connect(uri, uri=True, timeout=60), poolclass=NullPool
        )
    try:
        return create_engine(url, pool_pre_ping=True)
    except NoSuchModuleError:
        raise InvalidURLError(f"{_WANTED}; got {url.drivername[:40]!a}") from None
    except ModuleNotFoundError as error:
        package = _DRIVERS.get(error.name or "", error.name)
        raise StorageError(
            f"reading {shown} needs the Python module {error.name!r}, which is not installed: pip install {package}"
            " (mysql+pymysql:// needs pymysql, without a compiler)"
        ) from None


def _file(name: str) -> Path:
    path = Path(name).expanduser().absolute()
    if not name or not path.exists():
        # What has an '@' may be a URL whose scheme was forgotten, password and all.
        shown = "of that name" if "@" in name else repr(name)
        raise StorageError(f"there is no file {shown} to import from; {_WANTED}")
    if not path.is_file():
        raise StorageError(f"{path} is not a file; {_WANTED}")
    return path


def _is_sqlite(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_SQLITE_HEADER)) == _SQLITE_HEADER


def _check_tables(conn: Connection, names: set[str], shown: str) -> None:
    if not names >= _OPTUNA_TABLES:
        raise StorageError(f"{shown} holds no Optuna studies: it lacks Optuna's tables; check that it is the right one")
    revision = None
    if "alembic_version" in names:
        revision = conn.scalar(select(column("version_num")).select_from(table("alembic_version")))
    if revision is None or revision in _OLDER_REVISIONS:
        raise SchemaVersionError(
            f"the tables of {shown} are of an older Optuna (revision {revision}, wanted {OPTUNA_REVISION});"
            " make a backup, run 'optuna storage upgrade --storage URL', then import again"
        )
    if revision != OPTUNA_REVISION:
        raise SchemaVersionError(
            f"the tables of {shown} have revision {revision}, this tuner reads {OPTUNA_REVISION} of Optuna 3.2 to 5;"
            " upgrade tuner: pip install --upgrade tuner"
        )
