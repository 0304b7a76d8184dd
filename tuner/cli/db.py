"""`tuner db`: the embedded PostgreSQL of the data directory."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from typing import Annotated

import typer

from tuner.cli.settings import Settings, command

_command = functools.partial(command, group="db_")
app = typer.Typer(help="Start, stop and look at the embedded PostgreSQL.", no_args_is_help=True)


@_command
def start(
    settings: Settings,
    listen: Annotated[
        str | None,
        typer.Option(metavar="127.0.0.1:PORT", help="Also listen on this port of the loopback, with a password."),
    ] = None,
) -> None:
    """Start the embedded server, or join it, and print its URL."""
    from storage import EmbeddedServer

    print(EmbeddedServer(settings.data_dir).start(listen))


@_command
def stop(settings: Settings) -> None:
    """Stop the embedded server; running workers wait for it to come back."""
    from storage import EmbeddedServer

    EmbeddedServer(settings.data_dir).stop()
    print("stopped")


@_command
def status(settings: Settings, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show whether the embedded server runs, and where; starts nothing."""
    from storage import EmbeddedServer

    fields = asdict(EmbeddedServer(settings.data_dir).status())
    if as_json:
        print(json.dumps(fields, default=str))
        return
    for name, value in fields.items():
        print(f"{name.replace('_', ' '):<18}{'-' if value is None else value}")


@_command
def url(settings: Settings) -> None:
    """Print the URL of the embedded server, for any Optuna client of this user; starts it if need be."""
    from storage import EmbeddedServer

    # SQLAlchemy 2.1 takes a URL without a driver's name for one of psycopg 3, which need not be installed.
    print(EmbeddedServer(settings.data_dir).start().replace("postgresql:", "postgresql+psycopg2:", 1))


for name, function in {"start": start, "stop": stop, "status": status, "url": url}.items():
    app.command(name)(function)
