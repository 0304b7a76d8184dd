"""What commands that run trials on this machine have in common: options, and the name of the worker that they are."""

from __future__ import annotations

from functools import cache
from typing import Annotated

import typer

from tuner.api.running import new_worker_name
from tuner.cli.options import WORKERS

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
        help="Threads of each slot (default: OMP_NUM_THREADS, or else those of its share of the cores that pay).",
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

worker_name = cache(new_worker_name)
"""Return who this worker is, the same for as long as the process lives."""
