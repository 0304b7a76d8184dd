"""`tuner launch`: workers that an engine places on its machines, and what the engine says of them."""

from __future__ import annotations

import functools
import json
import math
import os
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.api.exporting import own_reference
from tuner.cli.launching_k8s import k8s
from tuner.cli.model import OBJECTIVE_HELP
from tuner.cli.options import WORKERS, check_positive, seconds
from tuner.cli.reading import AsJson, StudyName
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.cli.workers import AllowCodeChange
from tuner.errors import TunerError, UsageError
from tuner.text import printable, table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tuner.launch.engine import Engine, Job
    from tuner.study.joining import Study

_command = functools.partial(command, group="launch_")
app = typer.Typer(help="Have SLURM, Ray or Kubernetes run workers.", no_args_is_help=True)

_JOB = "Job"
Objective = Annotated[
    str | None, typer.Option(metavar="path/to/file.py:NAME", help=OBJECTIVE_HELP, rich_help_panel=WORKERS)
]
Slots = Annotated[
    str,
    typer.Option(
        metavar="auto|N|DEVICE[*N],...",
        help="Trials that each worker runs at the same time, as of tuner worker (auto: one for each GPU, or else one).",
        rich_help_panel=WORKERS,
    ),
]


@_command
def slurm(
    settings: Settings,
    study: StudyName,
    nodes: Annotated[
        int, typer.Option(help="Workers, each a task of one array job on a node.", rich_help_panel=_JOB)
    ] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(help="GPUs of each worker; without any it trains on the CPU.", rich_help_panel=_JOB)
    ] = 0,
    cpus_per_node: Annotated[
        int | None, typer.Option(help="Cores of each worker (default: the cluster's).", rich_help_panel=_JOB)
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Limit after which a worker makes room and waits for its next turn: 30m, 4h (default: the cluster's).",
            rich_help_panel=_JOB,
        ),
    ] = None,
    partition: Annotated[str | None, typer.Option(help="As of sbatch.", rich_help_panel=_JOB)] = None,
    account: Annotated[str | None, typer.Option(help="As of sbatch.", rich_help_panel=_JOB)] = None,
    container: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGE",
            help="Run workers in this image, which has tuner in it: by pyxis where SLURM has that, or else apptainer.",
            rich_help_panel=_JOB,
        ),
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LINE",
            help="Line of shell before the worker starts, as 'module load cuda'; may be repeated.",
            rich_help_panel=_JOB,
        ),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTIONS", help="More options of sbatch, as '--qos=low --mem=32G'.", rich_help_panel=_JOB),
    ] = None,
    logs: Annotated[
        Path, typer.Option(metavar="DIR", help="Where each task writes its log (default: here).", rich_help_panel=_JOB)
    ] = Path(),
    slots: Slots = "auto",
    objective: Objective = None,
    allow_code_change: AllowCodeChange = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Have no node see first whether a worker could run there.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job's script and submit nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Have SLURM run workers of STUDY, as an array job that ends with the study.

    Before a time limit, or when it is pre-empted, a worker gives its
    trials back with their checkpoints, and its task comes again.
    """
    from tuner.launch.slurm import engine, runtime_of
    from tuner.launch.slurm_script import MIN_MINUTES, Wanted, script

    check_positive("--nodes", nodes)
    check_positive("--cpus-per-node", 1 if cpus_per_node is None else cpus_per_node)
    if gpus_per_node < 0:
        raise UsageError(f"--gpus-per-node needs a whole number from 0, got {gpus_per_node}")
    minutes = None if time is None else math.ceil(seconds("--time", time) / 60)
    if minutes is not None and minutes < MIN_MINUTES:
        raise UsageError(f"--time needs at least {MIN_MINUTES}m, as workers are told before the end; got {time}")
    extra = [_options(text) for text in sbatch or ()]
    cluster = None if dry_run else engine()
    worker = _joining(settings, study, objective, in_image=container is not None, allow_code_change=allow_code_change)
    # A node may have GPUs that were not given to the job, and that nothing hides from it.
    device = "cpu" if not gpus_per_node and (slots == "auto" or slots.isdecimal()) else None
    wanted = Wanted(
        study=study,
        label=worker.label,
        arguments=worker.arguments(slots=slots, device=device),
        variables=worker.variables,
        programs=_programs(),
        nodes=nodes,
        gpus=gpus_per_node,
        cpus=cpus_per_node,
        minutes=minutes,
        partition=partition,
        account=account,
        container=container,
        runtime=None if container is None else runtime_of(container, may_be_elsewhere=dry_run),
        visible=worker.files,
        setup=setup or (),
        extra=extra,
        logs=logs,
    )
    if cluster is None:
        print(script(wanted), end="")
        return
    beside, unchecked, job = cluster.launch(wanted, check=not no_check)
    if unchecked is not None:
        say(f"not checked whether workers can run there: {unchecked}", err=True)
    pattern = f"{wanted.logs}/{wanted.label}-{job}_*.log"
    if as_json:
        print(json.dumps({"engine": cluster.name, "job": job, "workers": nodes, "logs": pattern}))
        return
    more = f", beside {beside} that run or wait" if beside else ""
    say(f"submitted job {job}: {nodes} worker{'' if nodes == 1 else 's'} of study {printable(study)}{more}")
    say(f"logs are in {pattern}; 'tuner launch status {shlex.quote(study)}' asks SLURM for them", err=True)


@dataclass(frozen=True, kw_only=True)
class _Joining:
    """What workers elsewhere join a study by; `objective` is None for an installed one.

    `files` are those, and the directories, that it names.
    """

    study: Study
    label: str
    objective: str | None
    variables: Mapping[str, str]
    files: Sequence[Path]
    allow_code_change: bool

    def arguments(self, *, slots: str, device: str | None) -> list[str]:
        """Return the arguments of their `tuner`."""
        from tuner.launch.command import worker_arguments

        return worker_arguments(
            self.study,
            objective=self.objective,
            slots=slots,
            device=device,
            allow_code_change=self.allow_code_change,
        )


def _joining(
    settings: Settings, name: str, objective: str | None, *, in_image: bool, allow_code_change: bool
) -> _Joining:
    """Return what workers join the study by. Raises TunerError, StorageError for what cannot work elsewhere.

    The objective is looked at here, unless it is in an image.
    """
    from tuner.launch.command import checked_study, label, local_objective, reachable_url, variables

    url = reachable_url(settings.storage)
    others = {
        "TUNER_STORAGE_PASSWORD_FILE": settings.storage_password_file,
        "TUNER_DATA_DIR": settings.given_data_dir,
        "TUNER_LOG_FORMAT": settings.given_log_format,
    }
    told = variables(url, others, os.environ)
    engine = settings.open()
    study = checked_study(engine, name)
    reference = objective or own_reference(settings, study)
    files = [
        Path(told[each]) for each in ("TUNER_STORAGE_PASSWORD_FILE", "PGPASSFILE", "TUNER_DATA_DIR") if each in told
    ]
    if not in_image or Path(reference.rpartition(":")[0]).is_file():
        source = local_objective(study, reference, allow_code_change=allow_code_change)
        if source.module is None:
            reference = f"{source.file.absolute()}:{source.attribute}"
            files.append(source.file.absolute().parent)
    return _Joining(
        study=study,
        label=label(engine, study),
        objective=reference if objective is not None or ":" in study.spec.objective.name else None,
        variables=told,
        files=files,
        allow_code_change=allow_code_change,
    )


def _programs() -> Path:
    """Return the directory of the `tuner` that runs, which nodes are to see as well."""
    beside = Path(sys.executable).parent
    found = None if (beside / "tuner").exists() else shutil.which("tuner")
    return beside if found is None else Path(found).absolute().parent


def _options(text: str) -> str:
    """Return further options of sbatch, as they are to stand in a line of its own. Raises UsageError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--sbatch: {text!r} cannot be read: {error}") from error
    if not words or not words[0].startswith("-") or not text.isprintable():
        raise UsageError(f"--sbatch needs options of sbatch in one line, as '--qos=low --mem=32G', got {text!r}")
    return text


@_command
def ray(
    settings: Settings,
    study: StudyName,
    workers: Annotated[
        int, typer.Option(help="Workers, each an actor of its own, placed as there is room.", rich_help_panel=_JOB)
    ] = 1,
    gpus_per_worker: Annotated[
        float,
        typer.Option(
            metavar="N",
            help="GPUs of each worker, or its part of one: 0.5; without any it trains on the CPU.",
            rich_help_panel=_JOB,
        ),
    ] = 0.0,
    cpus_per_worker: Annotated[
        float | None,
        typer.Option(
            metavar="N", help="Cores of each worker, for its threads (default: one for each GPU).", rich_help_panel=_JOB
        ),
    ] = None,
    resources: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='What each worker needs beside, of the cluster\'s own kinds: {"a100": 0.5}.',
            rich_help_panel=_JOB,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ray://HOST:PORT",
            help="The cluster (default: RAY_ADDRESS, or else the one of this machine).",
            rich_help_panel=_JOB,
        ),
    ] = None,
    elastic: Annotated[
        bool,
        typer.Option(
            "--elastic",
            help="Nodes come by demand: none has to be there yet that has what a worker needs.",
            rich_help_panel=_JOB,
        ),
    ] = False,
    objective: Objective = None,
    allow_code_change: AllowCodeChange = False,
    as_json: AsJson = False,
) -> None:
    """Have a Ray cluster run workers of STUDY, as actors that end with the study.

    They outlive this command, come again if their node is lost, and
    get a copy of the directory that the objective is in.
    """
    from tuner.launch.command import checked_study, label, local_objective
    from tuner.launch.engine import imported

    check_positive("--workers", workers)
    cluster = imported("ray")
    needs = cluster.Needs.checked(gpus_per_worker, cpus_per_worker, resources)
    engine = settings.open()
    joined = checked_study(engine, study)
    reference = objective or own_reference(settings, joined)
    source = local_objective(joined, reference, allow_code_change=allow_code_change)
    others = {
        "TUNER_DATA_DIR": settings.given_data_dir,
        "TUNER_LOG_FORMAT": settings.given_log_format,
        "TUNER_TRUSTED_DIRECTORIES": os.environ.get("TUNER_TRUSTED_DIRECTORIES"),
    }
    found = cluster.launch(
        joined,
        label(engine, joined),
        source,
        reference,
        workers=workers,
        needs=needs,
        storage=settings.storage,
        password_file=settings.storage_password_file,
        environment={name: str(value) for name, value in others.items() if value is not None},
        address=address,
        is_elastic=elastic,
        allow_code_change=allow_code_change,
    )
    if as_json:
        print(json.dumps([asdict(job) for job in found]))
        return
    for job in found:
        say(f"ray {job.id}: {job.wanted} worker{'' if job.wanted == 1 else 's'} {job.state}, {job.detail}")
    say(f"'tuner launch status {shlex.quote(study)}' asks Ray for them", err=True)


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
    """Return what the engines that are here answer; tell of one that does not, as where it has programs and no cluster.

    Raises TunerError if none is here, or none answers.
    """
    from tuner.launch.command import label
    from tuner.launch.engine import engines_here
    from tuner.study.joining import open_study

    database = settings.open()
    its = label(database, open_study(database, study))
    missing: list[str] = []
    engines = list(engines_here(missing))
    if not engines:
        raise TunerError("no engine is here: " + "; ".join(missing))
    found, silent = [], []
    for engine in engines:
        try:
            found += ask(engine, its)
        except TunerError as error:
            silent.append(f"{engine.name} does not answer: {error}")
    if len(silent) == len(engines):
        raise TunerError("; ".join(silent))
    say(*silent, err=True)
    return found


for name, function in {"slurm": slurm, "ray": ray, "k8s": k8s, "status": status, "stop": stop}.items():
    app.command(name)(function)
