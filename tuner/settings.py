"""Where the database is, where data lies and how to log: what the caller says, the environment or else a default."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

from tuner.errors import UsageError
from tuner.log import Log, LogFormat

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one command; None where neither the command line nor the environment says anything."""

    storage: str | None = None
    storage_password_file: Path | None = None
    given_data_dir: Path | None = None
    given_log_format: LogFormat | None = None

    @classmethod
    def of(
        cls,
        storage: str | None,
        storage_password_file: Path | None,
        data_dir: Path | None,
        log_format: str | None,
    ) -> Settings:
        """Check what was given; paths are absolute from now on. Raises UsageError."""
        formats: dict[str | None, LogFormat | None] = {None: None, "text": "text", "json": "json"}
        if log_format not in formats:
            raise UsageError(f"--log-format needs text or json, got {log_format!r}")
        return cls(
            storage=storage or None,
            storage_password_file=absolute(storage_password_file),
            given_data_dir=absolute(data_dir),
            given_log_format=formats[log_format],
        )

    @classmethod
    def of_environment(cls, storage: str | None = None, data_dir: str | Path | None = None) -> Self:
        """Return what is given, and else what the variables say that the command line looks at."""
        environ = os.environ
        password_file, data_dir = environ.get("TUNER_STORAGE_PASSWORD_FILE"), data_dir or environ.get("TUNER_DATA_DIR")
        return cls(
            storage=storage or environ.get("TUNER_STORAGE") or None,
            storage_password_file=absolute(Path(password_file)) if password_file else None,
            given_data_dir=absolute(Path(data_dir).expanduser()) if data_dir else None,
        )

    def over(self, other: Settings) -> Settings:
        """Return these settings, and `other`'s where these say nothing."""
        return Settings(
            **{name: ours if ours is not None else getattr(other, name) for name, ours in vars(self).items()}
        )

    @property
    def data_dir(self) -> Path:
        """The data directory, absolute."""
        if self.given_data_dir is not None:
            return self.given_data_dir
        given = Path(os.environ.get("XDG_DATA_HOME", ""))
        if given.is_absolute():  # another is to be ignored, by the XDG Base Directory Specification
            return given / "tuner"
        try:
            return Path.home().absolute() / ".local" / "share" / "tuner"
        except RuntimeError as error:
            raise UsageError("--data-dir is needed where HOME is not set and the user has no home directory") from error

    def own_data_dir(self) -> Path:
        """Return the data directory for what is read and written there. Raises UntrustedError if others could, too."""
        from storage.files import require_own

        require_own(self.data_dir)
        return self.data_dir

    def log(self, **fields: Any) -> Log:
        """Return a log in the chosen format with these fields in every line."""
        return Log(self.given_log_format or "text", **fields)

    def storage_url(self) -> URL:
        """Return the database's URL, the embedded server's after starting or joining it."""
        from storage import EmbeddedServer, parse_url
        from storage.database.url import with_password_file

        if self.storage is None:
            return parse_url(EmbeddedServer(self.data_dir).start())
        if self.storage_password_file is not None:
            return with_password_file(self.storage, self.storage_password_file)
        return parse_url(self.storage)

    def start_database(self) -> None:
        """Start the embedded server, where it is that."""
        from storage import EmbeddedServer

        if self.storage is None:
            EmbeddedServer(self.data_dir).start()

    def open(self) -> Engine:
        """Return an engine of the database, its schema made or checked."""
        from storage import ensure_schema, open_engine

        engine = open_engine(self.storage_url())
        ensure_schema(engine)
        return engine

    def open_for_work(self) -> Engine:
        """Return what `open` does, also from a server that has no connection free just now, or that is starting.

        Waits for it for ten minutes.
        """
        from storage import NotReadyError
        from storage.database.sessions import Backoff

        def notice(error: Exception) -> None:
            self.log().event("database_away", f"{error}; trying again")

        return Backoff(notice=notice, is_away=lambda error: isinstance(error, NotReadyError))(self.open)

    def options(self) -> str:
        """Return the options that lead another command to the same database, for the messages that name one."""
        parts = []
        if self.storage is not None and "TUNER_STORAGE" not in os.environ:
            from storage import mask_url

            parts.append(f" --storage {shlex.quote(mask_url(self.storage))}")
        if self.given_data_dir is not None and "TUNER_DATA_DIR" not in os.environ:
            parts.append(f" --data-dir {shlex.quote(str(self.given_data_dir))}")
        return "".join(parts)


@overload
def absolute(value: Path | None) -> Path | None: ...
@overload
def absolute(value: Any) -> Any: ...
def absolute(value: Any) -> Any:
    """Return a path as it is now, before an objective changes the directory; what is no path as it is."""
    try:
        return value.absolute() if isinstance(value, Path) else value
    except FileNotFoundError as error:
        raise UsageError(
            f"cannot tell where {value} is: the current directory was deleted; give a full path"
        ) from error
