"""`tuner db`: the embedded PostgreSQL of the data directory."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tuner.cli.options import ask_first
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.errors import TunerError
from tuner.text import table

_command = functools.partial(command, group="db_")
app = typer.Typer(help="Start, stop and look at the embedded PostgreSQL.", no_args_is_help=True)


@_command
def start(
    settings: Settings,
    listen: Annotated[
        str | None,
        typer.Option(metavar="127.0.0.1:PORT", help="Also listen on this port of the loopback, with a password."),
    ] = None,
    idle_exit: Annotated[
        str,
        typer.Option(
            metavar="TIME|never",
            help="End it once nobody has used it for so long; servers that other commands start end after 15m, or"
            " TUNER_DB_IDLE_EXIT.",
        ),
    ] = "never",
) -> None:
    """Start the embedded server, or join it, and print its URL."""
    from storage import EmbeddedServer

    say(EmbeddedServer(settings.data_dir).start(listen, idle_exit=idle_exit))


@_command
def stop(settings: Settings) -> None:
    """Stop the embedded server; running workers wait for it to come back."""
    from storage import EmbeddedServer

    EmbeddedServer(settings.data_dir).stop()
    say("stopped")


@_command
def status(settings: Settings, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show whether the embedded server runs, and where its files are; starts nothing.

    They are in the data directory. As root, whose server runs as another user, they are below /var/lib/tuner,
    and stay there when the data directory is deleted: 'tuner db delete' deletes them.
    """
    from storage import EmbeddedServer

    fields = asdict(EmbeddedServer(settings.data_dir).status())
    if as_json:
        print(json.dumps(fields, default=str))
        return
    for name, value in fields.items():
        say(f"{name.replace('_', ' '):<18}{'-' if value is None else value}")


@_command
def url(settings: Settings) -> None:
    """Print the URL of the embedded server, for any Optuna client of this user; starts it if need be."""
    from storage import EmbeddedServer

    # SQLAlchemy 2.1 takes a URL without a driver's name for one of psycopg 3, which need not be installed.
    say(EmbeddedServer(settings.data_dir).start().replace("postgresql:", "postgresql+psycopg2:", 1))


@_command
def list_(
    settings: Settings,  # noqa: ARG001 - there is one list, whatever the data directory
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the embedded databases of this user: their data directories, sizes, and whether they run."""
    from storage.embedded.listing import databases

    found = databases()
    if as_json:
        fields = ("data_dir", "home", "size", "running")
        print(json.dumps([{name: getattr(one, name) for name in fields} for one in found], default=str))
        return
    rows = [
        [str(one.name), f"{one.size / 1e6:.0f} MB", "yes" if one.running else "no", _remark(one.data_dir)]
        for one in found
    ]
    for line in table(["directory", "size", "runs", ""], rows):
        say(line)


def _remark(data_dir: Path | None) -> str:
    if data_dir is None:
        return "its data directory is not known"
    return "" if data_dir.exists() else "the data directory is gone"


@_command
def delete(
    settings: Settings,
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="[DIRECTORY]", help="As 'tuner db list' shows it (default: the data directory)."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete an embedded database with every study in it; data sets and models stay. Refused while it is in use."""
    from storage.embedded.listing import find

    wanted = directory or settings.data_dir
    server = find(wanted)
    where = server.status().directory
    if not where.exists():
        raise TunerError(f"there is no embedded database of {wanted}; 'tuner db list' shows those there are")
    ask_first(f"{where} is deleted with every study in it", yes=yes)
    server.delete()
    say(f"deleted {where}")


for name, function in {
    "start": start,
    "stop": stop,
    "status": status,
    "url": url,
    "list": list_,
    "delete": delete,
}.items():
    app.command(name)(function)
