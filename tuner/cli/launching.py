"""`tuner launch`: workers that an engine places on its machines, and what the engine says of them."""

from __future__ import annotations

import functools
import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli.model import OBJECTIVE_HELP, installed_name
from tuner.cli.options import check_positive
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
def ray(
    settings: Settings,
    study: StudyName,
    workers: Annotated[int, typer.Option(help="Workers to ask the cluster for.")] = 1,
    gpus_per_worker: Annotated[
        float, typer.Option(metavar="N", help="GPUs of each, a slot on each, or the part of one: 0.5 (default: none).")
    ] = 0.0,
    cpus_per_worker: Annotated[
        float | None,
        typer.Option(metavar="N", help="CPUs of each, which its slots have as threads (default: one a slot)."),
    ] = None,
    resources: Annotated[
        str | None, typer.Option(metavar="JSON", help='What each needs of the cluster\'s own kinds: {"a100": 0.5}.')
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ray://HOST:PORT", help="The cluster (default: RAY_ADDRESS, or else the one of this machine)."
        ),
    ] = None,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="Nodes come by demand: none has to be there that has what a worker needs.")
    ] = False,
    objective: Annotated[
        str | None, typer.Option(metavar="path/to/file.py:NAME", help=f"{OBJECTIVE_HELP} Its directory is copied.")
    ] = None,
    allow_code_change: Annotated[
        bool, typer.Option("--allow-code-change", help="Go on although the objective's code is not the study's.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Have a Ray cluster run workers of STUDY, each an actor that outlives this command."""
    from tuner.launch.command import checked_study, label, local_objective
    from tuner.launch.engine import imported

    check_positive("--workers", workers)
    cluster = imported("ray")
    needs = cluster.Needs.checked(gpus_per_worker, cpus_per_worker, resources)
    database = settings.open()
    joined = checked_study(database, study)
    reference = objective or installed_name(joined)
    source = local_objective(joined, reference, allow_code_change=allow_code_change)
    found = cluster.launch(
        joined,
        label(database, joined),
        source,
        reference,
        workers=workers,
        needs=needs,
        storage=settings.storage,
        password_file=settings.storage_password_file,
        environment={} if settings.given_data_dir is None else {"TUNER_DATA_DIR": str(settings.given_data_dir)},
        address=address,
        is_elastic=elastic,
        allow_code_change=allow_code_change,
    )
    if as_json:
        print(json.dumps([asdict(job) for job in found]))
        return
    for job in found:
        say(f"ray {job.id}: {job.wanted} worker{'' if job.wanted == 1 else 's'} {job.state}, {job.detail}")
    say(f"'tuner launch status {shlex.quote(study)}' asks for them, 'tuner launch stop' ends them", err=True)


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


app.command("ray")(ray)
app.command("status")(status)
app.command("stop")(stop)
