"""What every command takes: where the database is, where data lies, how to log."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import shlex
from collections.abc import Callable
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints, overload

import typer
from typer.models import OptionInfo

from tuner.errors import UsageError
from tuner.log import Log, LogFormat

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine

_PANEL = "Options of every command"

Storage = Annotated[
    str | None,
    typer.Option(
        help="URL of the database, as postgresql://user@host/database (TUNER_STORAGE); without one, the"
        " embedded PostgreSQL of the data directory is started or joined.",
        show_envvar=False,
        rich_help_panel=_PANEL,
    ),
]
PasswordFile = Annotated[
    Path | None,
    typer.Option(
        help="File of mode 0600 that holds the database's password (TUNER_STORAGE_PASSWORD_FILE); PGPASSWORD and"
        " PGPASSFILE work as well.",
        show_envvar=False,
        rich_help_panel=_PANEL,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Directory for data sets, exported models and the embedded database (TUNER_DATA_DIR)"
        " (default: ~/.local/share/tuner)",
        show_envvar=False,
        rich_help_panel=_PANEL,
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        metavar="text|json",
        help="How to log to stderr (TUNER_LOG_FORMAT) (default: text)",
        show_envvar=False,
        rich_help_panel=_PANEL,
    ),
]
Debug = Annotated[
    bool | None,
    typer.Option("--debug", help="Show tracebacks (TUNER_DEBUG).", show_envvar=False, rich_help_panel=_PANEL),
]
_OPTIONS: dict[str, Any] = {
    "storage": Storage,
    "storage_password_file": PasswordFile,
    "data_dir": DataDir,
    "log_format": Format,
    "debug": Debug,
}


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


def command(function: Callable[..., None], group: str = "") -> Callable[..., None]:
    """Give a command the options of every command: its first parameter becomes the `Settings` they make.

    Each of its own options gets a variable: `--max-failures` of `run` is TUNER_RUN_MAX_FAILURES. A parameter that
    is a dataclass stands for an option for each of its fields, but for `given`: the names of those that the command
    line or a variable said.
    """
    prefix = f"TUNER_{group}{function.__name__.rstrip('_')}".upper()
    declared = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    groups: dict[str, Any] = {its.name: its.annotation for its in declared if is_dataclass(its.annotation)}
    own = [
        parameter.replace(
            kind=inspect.Parameter.KEYWORD_ONLY,
            annotation=_with_variable(parameter.annotation, prefix, parameter.name),
        )
        for declared_ in declared
        for parameter in (_fields(groups[declared_.name]) if declared_.name in groups else [declared_])
    ]
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _OPTIONS.items()
    ]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

    @functools.wraps(function)
    def run(**given: Any) -> None:
        context: typer.Context = given.pop("context")
        outer: Settings = context.obj
        given.pop("debug")  # `main` has looked for it, as it has to before there are any settings
        settings = Settings.of(**{name: given.pop(name) for name in _OPTIONS if name in given}).over(outer)
        given = {name: absolute(value) for name, value in given.items()}
        for name, kind in groups.items():
            own = {field.name: given.pop(field.name) for field in _options(kind)}
            given[name] = kind(**own, given=frozenset(field for field in own if _is_said(context, field)))
        function(settings, **given)

    parameters = [context, *own, *shared]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # its annotations would be read instead
    return run


def _fields(kind: Any) -> list[inspect.Parameter]:
    """Return the fields of a dataclass as parameters, apart from those that cannot be given."""
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in _options(kind)
    ]


def _options(kind: Any) -> list[Field[Any]]:
    return [field for field in fields(kind) if field.init and field.name != "given"]


def _is_said(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT", "PROMPT")


def _with_variable(annotation: Any, prefix: str, name: str) -> Any:
    """Return the annotation of an option with its environment variable; those of arguments stay as they are."""
    kind, info = annotation.__origin__, annotation.__metadata__[0]
    if not isinstance(info, OptionInfo):
        return annotation
    # Typer keeps the first name given to an annotated option as its default.
    given = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
    flag = next((text for text in given if text.startswith("--")), name)
    info = copy.copy(info)
    info.show_envvar = False  # one rule tells them all; shown with each, they squeeze the help
    info.envvar = f"{prefix}_{flag.partition('/')[0].strip('-').replace('-', '_').upper()}"
    return Annotated[kind, info]
