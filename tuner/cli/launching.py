"""`tuner launch`: workers that an engine places on its machines, and what the engine says of them."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from tuner.cli.reading import AsJson, StudyName
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.errors import TunerError
from tuner.text import printable, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuner.launch.engine import Engine, Job

_command = functools.partial(command, group="launch_")
app = typer.Typer(help="Have SLURM, Ray or Kubernetes run workers.", no_args_is_help=True)


@_command
def status(settings: Settings, study: StudyName, as_json: AsJson = False) -> None:
    """Show what the engines that are here say of the workers of STUDY."""
    found = _of_engines(settings, study, lambda engine, label: engine.jobs(label))
    if as_json:
        print(json.dumps([asdict(job) for job in found]))
    elif not found:
        say(f"no engine that is here knows of workers of study {printable(study)}", err=True)
    else:
        rows = [[job.engine, job.id, job.state, f"{job.running}/{job.wanted}", job.detail or "-"] for job in found]
        for line in table(["engine", "job", "state", "workers", "detail"], rows):
            say(line)


@_command
def stop(settings: Settings, study: StudyName, as_json: AsJson = False) -> None:
    """End the workers of STUDY that engines run, and those that wait. They give their trials back.

    The study stays as it is: 'tuner stop' ends it for all workers.
    """
    found = _of_engines(settings, study, lambda engine, label: engine.stop(label))
    if as_json:
        print(json.dumps([asdict(job) for job in found]))
    elif not found:
        say(f"no engine that is here has workers of study {printable(study)}", err=True)
    else:
        for job in found:
            say(f"ended {job.engine} {job.id}: {job.wanted} worker{'' if job.wanted == 1 else 's'}, {job.state}")


def _of_engines(settings: Settings, study: str, ask: Callable[[Engine, str], list[Job]]) -> list[Job]:
    """Return what all engines that are here answer. Raises TunerError if none is here."""
    from tuner.launch.command import label
    from tuner.launch.engine import engines_here
    from tuner.study.joining import open_study

    database = settings.open()
    its = label(database, open_study(database, study))
    missing: list[str] = []
    engines = list(engines_here(missing))
    if not engines:
        raise TunerError("no engine is here: " + "; ".join(missing))
    return [job for engine in engines for job in ask(engine, its)]


app.command("status")(status)
app.command("stop")(stop)
