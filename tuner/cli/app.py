"""The commands put together, and what their errors become: one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError

from storage.database.errors import InvalidWriteError, StorageError
from tuner import cores
from tuner.cli import (
    cleaning,
    comparing,
    confirming,
    control,
    db,
    growing,
    importing,
    launching,
    model,
    predicting,
    reading,
    replaying,
    reporting,
    search,
    service,
    status,
)
from tuner.cli.settings import DataDir, Debug, Format, PasswordFile, Settings, Storage
from tuner.cli.streams import flush_streams, open_streams, say
from tuner.errors import AskedToStop, TunerError, first_line, is_debugging
from tuner.exits import ExitCode, exit_code, signals_as_requests
from tuner.log import Log
from tuner.spec import first_problem
from tuner.study.places import own_place

# Typer shows its errors in a box of several lines; these are the classes to catch them by.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

# What `tuner --help` shows, in this order.
_PANELS: dict[str, dict[str, Callable[..., None]]] = {
    "Search": {
        "run": search.run,
        "create": search.create,
        "worker": search.worker,
        "enqueue": control.enqueue,
        "cancel": control.cancel,
        "extend": growing.extend,
        "adopt": growing.adopt,
        "objectives": reading.objectives,
    },
    "Watch": {
        "status": status.status,
        "studies": reading.studies,
        "show": comparing.show,
        "trials": reading.trials,
        "compare": comparing.compare,
        "dashboard": service.dashboard,
    },
    "Results": {
        "best": reading.best,
        "report": reporting.report,
        "importance": reporting.importance,
        "replay": replaying.replay,
        "confirm": confirming.confirm,
        "export": model.export,
        "verify": model.verify,
        "predict": predicting.predict,
    },
    "Operate": {
        "pause": control.pause,
        "resume": control.resume,
        "stop": control.stop,
        "release": control.release,
        "delete": control.delete,
        "clean": cleaning.clean,
        "import": importing.import_,
        "doctor": service.doctor,
    },
}

app = typer.Typer(
    name="tuner",
    help="Hyperparameter search for PyTorch: search, watch, fetch the best params, export the model.",
    epilog="Each option of a command has a variable: --max-failures of run is TUNER_RUN_MAX_FAILURES.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for panel, commands in _PANELS.items():
    for name, function in commands.items():
        app.command(name, rich_help_panel=panel)(function)
app.add_typer(launching.app, name="launch", rich_help_panel="Operate")
app.add_typer(db.app, name="db", rich_help_panel="Operate")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say(f"tuner {version('tuner')}")
        raise typer.Exit


@app.callback()
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
    os.environ.update({**cores.WAITING, **os.environ})
    open_streams()
    arguments = sys.argv[1:]  # an objective that is imported gets others
    if "--debug" in arguments:
        os.environ["TUNER_DEBUG"] = "1"  # for slots, too
    fail = partial(_fail, as_json=_wants_json(arguments))
    try:
        with signals_as_requests():
            code = app(standalone_mode=False)
            sys.stdout.flush()
    except _UsageError as error:
        code = fail(_usage_text(error), ExitCode.USAGE)
    except (KeyboardInterrupt, AskedToStop, typer.Abort) as request:
        code = getattr(request, "exit_code", ExitCode.INTERRUPTED)
    except BrokenPipeError:
        code = ExitCode.FAILED  # the reader of our output went away, as in `tuner trials digits | head`
    except UnicodeEncodeError as error:  # of an argument that is no text, or a database without Unicode
        code = fail(f"{error.object!r} cannot be written as {error.encoding}; give text in UTF-8", ExitCode.USAGE)
    except (TunerError, StorageError, InvalidWriteError, ValidationError, OSError) as error:
        if is_debugging():
            raise
        code = fail(first_problem(error) if isinstance(error, ValidationError) else str(error), exit_code(error))
    except Exception as error:
        if is_debugging():
            raise
        from storage.database.refusals import refusal

        refused = refusal(error)
        code = fail(_unforeseen(error), ExitCode.FAILED) if refused is None else fail(str(refused), exit_code(refused))
    flush_streams()
    sys.exit(code or 0)


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _usage_text(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "tuner"
    text = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    return f"{text.rstrip('.')}; '{command} --help' shows how" if text else ""


def _unforeseen(error: Exception) -> str:
    """Return what to say of an error that nobody has put into words: whose it is, and where that can be told."""
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
