"""`tuner launch k8s`: workers as manifests for Kubernetes, printed."""

from __future__ import annotations

import functools
import os
import shlex
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli.options import WORKERS
from tuner.cli.reading import StudyName
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.cli.workers import AllowCodeChange
from tuner.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL

    from tuner.launch.kubernetes_job import Wanted

_command = functools.partial(command, group="launch_")

_JOB, _POD, _SECRET = "Job", "Pod", "Secret"
_DEFAULT_SECRET = "tuner-storage"  # noqa: S105 - the name of one
_CPUS, _MEMORY_GI = 4, 16


@_command
def k8s(
    settings: Settings,
    study: StudyName,
    image: Annotated[
        str,
        typer.Option(help="Image with tuner and the objective, as the Dockerfile here builds.", rich_help_panel=_JOB),
    ],
    workers: Annotated[int, typer.Option(help="Workers, each a pod of one Indexed Job.", rich_help_panel=_JOB)] = 1,
    namespace: Annotated[
        str | None, typer.Option(help="Where they run (default: kubectl's own).", rich_help_panel=_JOB)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Of the Job; a second one of the same study needs one (default: by the study).", rich_help_panel=_JOB
        ),
    ] = None,
    pdb: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Workers that stay while nodes are emptied: a PodDisruptionBudget.", rich_help_panel=_JOB
        ),
    ] = None,
    secret: Annotated[
        str | None,
        typer.Option(
            help=f"Secret with the database's url, as pods reach it, and password (default: {_DEFAULT_SECRET}).",
            rich_help_panel=_SECRET,
        ),
    ] = None,
    with_secret: Annotated[
        bool,
        typer.Option(
            "--with-secret",
            help="Print that Secret as well, of the database and the password that are used here.",
            rich_help_panel=_SECRET,
        ),
    ] = False,
    gpus: Annotated[
        int, typer.Option(help="GPUs of each worker; without any it trains on the CPU.", rich_help_panel=_POD)
    ] = 0,
    gpu_resource: Annotated[
        str, typer.Option(metavar="NAME", help="What GPUs are called: amd.com/gpu, ...", rich_help_panel=_POD)
    ] = "nvidia.com/gpu",
    cpus: Annotated[
        str | None, typer.Option(help=f"Cores of each worker (default: {_CPUS} a GPU).", rich_help_panel=_POD)
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help=f"Of each worker (default: {_MEMORY_GI}Gi a GPU).", rich_help_panel=_POD),
    ] = None,
    shm: Annotated[
        str, typer.Option(metavar="SIZE", help="Of the memory, for readers of data: /dev/shm.", rich_help_panel=_POD)
    ] = "2Gi",
    disk: Annotated[
        str,
        typer.Option(metavar="SIZE", help="For data sets, checkpoints and what is compiled.", rich_help_panel=_POD),
    ] = "20Gi",
    volume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLAIM:PATH[:ro]", help="Mount a PersistentVolumeClaim; may be repeated.", rich_help_panel=_POD
        ),
    ] = None,
    node_selector: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Label of the nodes; may be repeated.", rich_help_panel=_POD),
    ] = None,
    toleration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[=VALUE][:EFFECT]",
            help="Taint of nodes that is no harm; may be repeated.",
            rich_help_panel=_POD,
        ),
    ] = None,
    spread: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL",
            help="Spread evenly over this label of nodes, as kubernetes.io/hostname, where that can be.",
            rich_help_panel=_POD,
        ),
    ] = None,
    env_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECRET",
            help="Secret whose keys become variables, as of a bucket; may be repeated.",
            rich_help_panel=_POD,
        ),
    ] = None,
    service_account: Annotated[
        str | None, typer.Option(metavar="NAME", help="As of a pod; no token is mounted.", rich_help_panel=_POD)
    ] = None,
    image_pull_secret: Annotated[
        str | None, typer.Option(metavar="NAME", help="As of a pod.", rich_help_panel=_POD)
    ] = None,
    slots: Annotated[
        str,
        typer.Option(
            metavar="auto|N|DEVICE[*N],...",
            help="Trials that each worker runs at the same time, as of tuner worker (auto: one for each GPU, or else"
            " one).",
            rich_help_panel=WORKERS,
        ),
    ] = "auto",
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="/path/in/image.py:NAME",
            help="Where the image has the objective, if it is not an installed one.",
            rich_help_panel=WORKERS,
        ),
    ] = None,
    allow_code_change: AllowCodeChange = False,
) -> None:
    """Print manifests that have Kubernetes run workers of STUDY, for kubectl apply -f -.

    The Job ends with the study. A worker whose pod is evicted or whose node
    is emptied gives its trials back, and its pod comes again.
    """
    from tuner.launch import kubernetes_job
    from tuner.launch.command import checked_study, label, worker_arguments

    resources = kubernetes_job.Resources(
        gpus=gpus,
        gpu_resource=gpu_resource,
        cpus=str(_CPUS * max(gpus, 1)) if cpus is None else cpus,
        memory=f"{_MEMORY_GI * max(gpus, 1)}Gi" if memory is None else memory,
        shared_memory=shm,
        disk=disk,
    )
    selector = kubernetes_job.selected(node_selector or ())
    tolerations = [kubernetes_job.toleration(text) for text in toleration or ()]
    claims = [kubernetes_job.claim(text) for text in volume or ()]
    _check_place(objective)
    url = _url(settings, is_of_secret=secret is None or with_secret)
    engine = settings.open()
    found = checked_study(engine, study)
    if objective is None and ":" in found.spec.objective.name:
        raise UsageError(
            f"study {found.name!r} searches {found.spec.objective.name!r}, a file of the one who created it;"
            f" tell where the image has it: --objective /path/in/image/{found.spec.objective.name}"
        )
    its = label(engine, found)
    device = None if gpus or slots != "auto" else "cpu"  # a node's GPUs may be seen by pods that have none
    wanted = kubernetes_job.Wanted(
        study_name=found.name,
        label=its,
        name=its if name is None else name,
        namespace=namespace,
        image=image,
        workers=workers,
        resources=resources,
        arguments=worker_arguments(
            found, objective=objective, slots=slots, device=device, allow_code_change=allow_code_change
        ),
        secret=_DEFAULT_SECRET if secret is None else secret,
        storage=_with_password(settings, url) if with_secret else None,
        pdb=pdb,
        spread=spread,
        selector=selector,
        tolerations=tolerations,
        claims=claims,
        environment_from=env_from or (),
        service_account=service_account,
        pull_secret=image_pull_secret,
        log_format=settings.given_log_format,
    )
    comment = list(_comment(wanted, url))
    print(kubernetes_job.as_yaml(kubernetes_job.manifests(wanted), comment), end="")
    if with_secret:
        say("the password is in what was printed: keep it to yourself, and out of version control", err=True)


def _check_place(objective: str | None) -> None:
    """Raise UsageError for an objective in a file that is not named by its full path, as the image has it."""
    path = (objective or "").rpartition(":")[0]
    if path.endswith(".py") and not PurePosixPath(path).is_absolute():
        raise UsageError(
            f"--objective {objective}: give the path that the file has in the image, from its root: /app/{path}:NAME"
        )


def _url(settings: Settings, *, is_of_secret: bool) -> URL:
    """Return the database's URL. Raises UsageError if pods cannot reach it and the Secret is to have it.

    A Secret that is named has another one, where this machine has come by a tunnel or `kubectl port-forward`.
    """
    from tuner.launch.command import reachable_url

    if is_of_secret or settings.storage is None:
        try:
            return reachable_url(settings.storage)
        except UsageError as error:
            hint = "; or name a Secret whose url leads there from pods: --secret NAME" if settings.storage else ""
            raise UsageError(f"{error}{hint}") from error
    return settings.storage_url()


def _with_password(settings: Settings, url: URL) -> tuple[str, str]:
    """Return the URL without its password, and the password that is used here. Raises UsageError if none is known."""
    from storage.database.url import read_password

    if url.password is not None:
        password = str(url.password)
    elif settings.storage_password_file is not None:
        password = read_password(settings.storage_password_file)
    else:
        password = os.environ.get("PGPASSWORD", "")
    if not password:
        raise UsageError(
            "--with-secret needs the database's password: give --storage-password-file FILE, or PGPASSWORD"
        )
    return url.set(drivername="postgresql", password=None).render_as_string(hide_password=False), password


def _comment(wanted: Wanted, url: URL) -> Iterator[str]:
    """Yield what is to be known of the manifests, and done before they are applied."""
    from storage.database.url import mask_url

    yield f"Workers of study {wanted.study_name!r}. 'kubectl apply -f FILE' starts them; with another number of"
    yield "workers printed anew, it changes how many there are. They end with the study."
    if wanted.storage is not None:
        yield f"The Secret {wanted.secret} below holds the database's password."
        return
    where = "" if wanted.namespace is None else f" --namespace={wanted.namespace}"
    theirs = mask_url(url.set(password=None))
    yield f"They find the database by the Secret {wanted.secret}, which has to be there. It is made once, with the URL"
    yield "by which pods reach it, without the password, which FILE holds:"
    yield f"  kubectl create secret generic {wanted.secret}{where} --from-literal=url={shlex.quote(theirs)} \\"
    yield "    --from-file=password=FILE"
