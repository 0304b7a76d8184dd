"""What every command takes: where the database is, where data lies, how to log."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.models import OptionInfo

from tuner.settings import Settings, absolute

__all__ = ["DataDir", "Debug", "Format", "PasswordFile", "Settings", "Storage", "absolute", "command"]

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
