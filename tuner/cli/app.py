"""The commands put together, and what their errors become: one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from pydantic import ValidationError

from storage.errors import InvalidURLError, StorageError, UnreachableError
from tuner.cli import db, model, reading, search, service
from tuner.cli.settings import DataDir, Debug, Format, PasswordFile, Settings, Storage
from tuner.errors import TunerError, WorkerInterrupted
from tuner.spec import first_problem

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 1, 2, 3, 130

# Typer shows its errors in a box of several lines; these are the classes to catch them by.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="tuner",
    help="Hyperparameter search for PyTorch: search, watch, fetch the best params, export the model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "TUNER", "help_option_names": ["-h", "--help"]},
)
for commands in (search.commands, reading.commands, model.commands, service.commands):
    for name, function in commands.items():
        app.command(name)(function)
app.add_typer(db.app, name="db")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"tuner {version('tuner')}")
        raise typer.Exit


@app.callback()
def _global(
    context: typer.Context,
    storage: Storage = None,
    storage_password_file: PasswordFile = None,
    data_dir: DataDir = None,
    log_format: Format = None,
    debug: Debug = None,
    version: Annotated[  # noqa: ARG001 - acts by its callback
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    context.obj = Settings.of(storage, storage_password_file, data_dir, log_format, debug)


def main() -> None:
    """Run the command that the command line names and exit with its code."""
    debug = "--debug" in sys.argv or os.environ.get("TUNER_DEBUG", "").lower() in {"1", "true", "yes"}
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        code = _fail(_usage_text(error), EXIT_USAGE)
    except (KeyboardInterrupt, WorkerInterrupted, typer.Abort):
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away, as in `tuner trials digits | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    except (TunerError, StorageError, ValidationError) as error:
        if debug:
            raise
        code = _fail(first_problem(error) if isinstance(error, ValidationError) else str(error), _code_of(error))
    except Exception as error:
        if debug:
            raise
        code = _fail(f"this is a bug in tuner: {type(error).__name__}: {error}; --debug shows where", EXIT_FAILED)
    sys.exit(code or 0)


def _code_of(error: Exception) -> int:
    if isinstance(error, UnreachableError):
        return EXIT_UNREACHABLE
    if isinstance(error, InvalidURLError):
        return EXIT_USAGE
    return getattr(error, "exit_code", EXIT_FAILED)


def _usage_text(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "tuner"
    text = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    if "Usage:" in text:  # `tuner` alone: its help is the message
        return text
    return f"{text.rstrip('.')}; '{command} --help' shows how"


def _fail(message: str, code: int) -> int:
    text = " ".join(message.split("\n")) if "Usage:" not in message else message
    print(text if "Usage:" in message else f"tuner: {text}", file=sys.stderr)
    return code
