"""What commands that run trials on this machine have in common: options, and what their slots are told."""

from __future__ import annotations

import os
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner import cores
from tuner.cli.options import WORKERS, check_positive
from tuner.cli.settings import Settings

if TYPE_CHECKING:
    from tuner.study.joining import Study
    from tuner.study.registry import ObjectiveKind, ObjectiveSource
    from tuner.worker.processes import Slots

Workers = Annotated[
    int | None, typer.Option(help="Local worker processes (default: half the cores, 2 to 8).", rich_help_panel=WORKERS)
]
Device = Annotated[
    str | None,
    typer.Option(help="cuda, cuda:1, xpu, mps or cpu (default: the best there is).", rich_help_panel=WORKERS),
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Threads of each slot (default: OMP_NUM_THREADS, or else its share of this machine's cores).",
        rich_help_panel=WORKERS,
    ),
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
        return max(2, min(8, cores.count() // 2))
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


def import_for_slots(slots: Slots, settings: Settings, source: ObjectiveSource) -> ObjectiveKind:
    """Import the objective, with all that slots need, and have them forked from here; start the database meanwhile.

    What is wrong with the database is told when it is opened.
    """
    import storage  # noqa: F401 - no two threads shall import it at once
    from tuner.imports import quick_imports
    from tuner.study.registry import is_objective_class

    changed = {name: value for name, value in slots.environment().items() if os.environ.get(name) != value}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)  # torch and numpy look at it as they are imported
    with ThreadPoolExecutor(1) as pool:
        pool.submit(settings.start_database)
        kind = source.load()
        with quick_imports():
            import torch

            import tuner.slot.slot  # noqa: F401

            if is_objective_class(kind):
                import torchmetrics  # noqa: F401
    slots.has_imported()
    for name, value in before.items():
        if os.environ.get(name) != changed[name]:
            continue  # the objective had its own idea
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    if any(name in changed for name in cores.VARIABLES):
        torch.set_num_threads(cores.named() or cores.count())  # the export has them to itself
    return kind
