"""The commands put together, and what their errors become: one line on stderr and an exit code."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from storage.database.errors import InvalidWriteError, StorageError
from tuner import cores
from tuner.cli.settings import DataDir, Debug, Format, PasswordFile, Settings, Storage
from tuner.cli.streams import flush_streams, open_streams, say
from tuner.errors import AskedToStop, TunerError, first_line, is_debugging
from tuner.exits import ExitCode, exit_code, signals_as_requests
from tuner.log import Log

# Typer shows its errors in a box of several lines; these are the classes to catch them by.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

# What `tuner --help` shows, in this order, and where in this room it is.
_PANELS: dict[str, dict[str, str]] = {
    "Search": {
        "run": "search.run",
        "create": "search.create",
        "worker": "search.worker",
        "enqueue": "control.enqueue",
        "cancel": "control.cancel",
        "extend": "growing.extend",
        "adopt": "growing.adopt",
        "objectives": "reading.objectives",
    },
    "Watch": {
        "status": "status.status",
        "studies": "reading.studies",
        "show": "comparing.show",
        "trials": "reading.trials",
        "compare": "comparing.compare",
        "dashboard": "service.dashboard",
    },
    "Results": {
        "best": "reading.best",
        "report": "reporting.report",
        "importance": "reporting.importance",
        "replay": "replaying.replay",
        "confirm": "confirming.confirm",
        "export": "model.export",
        "verify": "model.verify",
        "predict": "predicting.predict",
    },
    "Operate": {
        "pause": "control.pause",
        "resume": "control.resume",
        "stop": "control.stop",
        "release": "control.release",
        "delete": "control.delete",
        "clean": "cleaning.clean",
        "import": "importing.import_",
        "doctor": "service.doctor",
        "launch": "launching.app",
        "db": "db.app",
    },
}


def make_app(only: str | None = None) -> typer.Typer:
    """Return the app of all commands; or that of one, which imports nothing of what the others need."""
    app = typer.Typer(
        name="tuner",
        help="Hyperparameter search for PyTorch: search, watch, fetch the best params, export the model.",
        epilog="Each option of a command has a variable: --max-failures of run is TUNER_RUN_MAX_FAILURES.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_global)
    for panel, commands in _PANELS.items():
        for name, place in commands.items():
            if only not in (None, name):
                continue
            module, _, its_name = place.partition(".")
            command = getattr(import_module(f"tuner.cli.{module}"), its_name)
            if isinstance(command, typer.Typer):
                app.add_typer(command, name=name, rich_help_panel=panel)
            else:
                app.command(name, rich_help_panel=panel)(command)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say(f"tuner {version('tuner')}")
        raise typer.Exit


def _global(
    context: typer.Context,
    storage: Storage = None,
    storage_password_file: PasswordFile = None,
    data_dir: DataDir = None,
    log_format: Format = None,
    debug: Debug = None,  # noqa: ARG001 - `main` looks for it
    version: Annotated[  # noqa: ARG001 - acts by its callback
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    environ = os.environ
    context.obj = Settings.of(
        storage or environ.get("TUNER_STORAGE"),
        storage_password_file or _path(environ.get("TUNER_STORAGE_PASSWORD_FILE")),
        data_dir or _path(environ.get("TUNER_DATA_DIR")),
        log_format or environ.get("TUNER_LOG_FORMAT") or None,
    )


def main() -> None:
    """Run the command that the command line names and exit with its code."""
    gc.set_threshold(20_000)  # imports make next to no garbage: `tuner status` takes 0.9 of the time with fewer looks
    os.environ.update(cores.waiting())
    open_streams()
    arguments = sys.argv[1:]  # an objective that is imported gets others
    if "--debug" in arguments:
        os.environ["TUNER_DEBUG"] = "1"  # for slots, too
    fail = partial(_fail, as_json=_wants_json(arguments))
    try:
        with signals_as_requests():
            code = make_app(_command(arguments))(standalone_mode=False)
            sys.stdout.flush()
    except _UsageError as error:
        code = fail(_usage_text(error), ExitCode.USAGE)
    except (KeyboardInterrupt, AskedToStop, typer.Abort) as request:
        code = getattr(request, "exit_code", ExitCode.INTERRUPTED)
    except BrokenPipeError:
        code = ExitCode.FAILED  # the reader of our output went away, as in `tuner trials digits | head`
    except UnicodeEncodeError as error:  # of an argument that is no text, or a database without Unicode
        code = fail(f"{error.object!r} cannot be written as {error.encoding}; give text in UTF-8", ExitCode.USAGE)
    except (TunerError, StorageError, InvalidWriteError, OSError) as error:
        if is_debugging():
            raise
        code = fail(str(error), exit_code(error))
    except Exception as error:
        if is_debugging():
            raise
        code = fail(*_foreseen(error) or (_unforeseen(error), ExitCode.FAILED))
    flush_streams()
    gc.freeze()  # nothing is garbage as long as it takes to end: `tuner best` takes 0.8 of the time without a look
    sys.exit(code or 0)


def _command(arguments: Sequence[str]) -> str | None:
    """Return the command that comes first, if one does: all others are then of no concern."""
    first = arguments[0] if arguments else None
    return first if any(first in commands for commands in _PANELS.values()) else None


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _usage_text(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "tuner"
    text = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    return f"{text.rstrip('.')}; '{command} --help' shows how" if text else ""


def _foreseen(error: Exception) -> tuple[str, int] | None:
    """Return what to say, with the exit code, of what pydantic or the database refused."""
    from pydantic import ValidationError

    from storage.database.refusals import refusal
    from tuner.spec import first_problem

    if isinstance(error, ValidationError):
        return first_problem(error), exit_code(error)
    refused = refusal(error)
    return None if refused is None else (str(refused), exit_code(refused))


def _unforeseen(error: Exception) -> str:
    """Return what to say of an error that nobody has put into words: whose it is, and where that can be told."""
    from sqlalchemy.exc import DBAPIError

    from tuner.study.places import own_place

    told = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, DBAPIError):  # a value that it cannot hold, a role that may not
        return f"the database refused it: {first_line(error.orig or error)}"
    if (place := own_place(error, sys.argv[0])) is not None:
        return f"the objective's code failed: {told} ({place[0]}, line {place[1]})"
    if isinstance(error, MemoryError) or "can't start new thread" in told:
        return f"this machine has no memory, or no process, left for it: {told}"
    return f"this is a bug in tuner: {told}; --debug shows where"


def _wants_json(arguments: Sequence[str]) -> bool:
    given = [text for flag, text in pairwise(arguments) if flag == "--log-format"]
    given += [text.partition("=")[2] for text in arguments if text.startswith("--log-format=")]
    return (given or [os.environ.get("TUNER_LOG_FORMAT", "text")])[-1] == "json"


def _fail(message: str, code: int, *, as_json: bool) -> int:
    """Say why the command failed, in one line; `tuner` alone has shown its help instead."""
    if message and as_json:
        Log("json").event("failed", " ".join(message.split()), exit_code=code)
    elif message:
        with suppress(OSError):  # nobody reads it
            say(f"tuner: {' '.join(message.split())}", err=True)
    return code
