"""What commands that run trials on this machine have in common: options, and what their slots are told."""

from __future__ import annotations

import os
import secrets
import socket
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli.options import WORKERS, check_positive
from tuner.cli.settings import Settings

if TYPE_CHECKING:
    from tuner.study.joining import Study
    from tuner.study.registry import ObjectiveSource

Workers = Annotated[
    int | None, typer.Option(help="Local worker processes (default: half the cores, 2 to 8).", rich_help_panel=WORKERS)
]
Device = Annotated[
    str | None,
    typer.Option(help="cuda, cuda:1, xpu, mps or cpu (default: the best there is).", rich_help_panel=WORKERS),
]
AllowCodeChange = Annotated[
    bool,
    typer.Option(
        "--allow-code-change",
        help="Go on although the objective's code is not the study's.",
        rich_help_panel=WORKERS,
    ),
]


def n_workers(count: int | None) -> int:
    """Return how many processes run trials. Raises UsageError."""
    if count is None:
        return max(2, min(8, (os.cpu_count() or 1) // 2))
    check_positive("--workers", count)
    return count


@cache
def worker_name() -> str:
    """Return who this worker is: containers may have one hostname, and give their first process one number."""
    return f"{socket.gethostname()}:{os.getpid()}-{secrets.token_hex(3)}"


def slot_config(
    settings: Settings,
    study: Study,
    source: ObjectiveSource,
    reference: str,
    *,
    allow_code_change: bool,
    preflight: bool,
    allow_leak: bool,
) -> dict[str, Any]:
    """Return what the slots of a worker are told alike, a `tuner.slot.slot.SlotConfig` in part."""
    # With the password, where the URL has one: it goes through a pipe, and is in no process's arguments.
    url = settings.storage_url().render_as_string(hide_password=False)
    return {
        "storage": url,
        "study": study.name,
        "worker": worker_name(),
        "objective": reference if source.module is not None else f"{source.file}:{source.attribute}",
        "data_dir": str(settings.own_data_dir()),
        "allow_code_change": allow_code_change,
        "preflight": preflight,
        "allow_leak": allow_leak,
    }
