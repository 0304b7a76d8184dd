"""`tuner clean`: what was left on this machine."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli.options import ask_first
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.exits import ExitCode
from tuner.text import table

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from tuner.cleaning import Left


@command
def clean(
    settings: Settings,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what there is; delete nothing.")] = False,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Delete as well what another database, or another start, may still want: its checkpoints and results"
            " in this data directory, what is compiled.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Delete what was left on this machine: checkpoints of deleted studies, databases of lost data directories.

    Shows what there is, whose, how large and how old, and what it frees.
    """
    from tuner.cleaning import look, remove

    found = look(_open(settings), settings.own_data_dir())
    chosen = [left for left in found if left.fate == "goes" or (everything and left.fate == "asked")]
    if not as_json:
        _show(found, chosen)
    freed, problems = 0, []
    if chosen and not dry_run:
        ask_first(f"{len(chosen)} of them ({_size(sum(left.size for left in chosen))}) are deleted", yes=yes)
        for left in chosen:
            if (problem := remove(left)) is None:
                freed += left.size
            else:
                problems.append(problem)
                say(problem, err=True)
    if as_json:
        print(json.dumps({"found": [_fields(left, left in chosen) for left in found], "freed": freed}))
    elif dry_run:
        say(f"would free {_size(sum(left.size for left in chosen))}")
    else:
        say(f"freed {_size(freed)}")
    if problems:
        raise typer.Exit(ExitCode.FAILED)


def _open(settings: Settings) -> Engine | None:
    """Return the database; None if it would be the data directory's own and that has none."""
    from storage import EmbeddedServer

    if settings.storage is None and EmbeddedServer(settings.data_dir).status().version is None:
        return None
    return settings.open()


def _show(found: list[Left], chosen: list[Left]) -> None:
    rows = []
    for left in found:
        becomes = "goes" if left in chosen else "stays without --all" if left.fate == "asked" else "stays"
        rows.append([left.what, left.whose, _size(left.size), _age(left.changed), becomes, str(left.path)])
    for line in table(["what", "whose", "size", "age", "", "where"], rows) if rows else []:
        say(line)


def _fields(left: Left, is_chosen: bool) -> dict[str, object]:
    fields = {"what": left.what, "whose": left.whose, "path": str(left.path), "size": left.size}
    return {**fields, "age_s": round(max(0.0, time.time() - left.changed)), "chosen": is_chosen}


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.1f} GB"


def _age(changed: float) -> str:
    hours = max(0.0, time.time() - changed) / 3600
    return f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} d"
