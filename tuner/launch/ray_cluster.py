"""Ray: an actor for each worker, detached from who launched it, placed and made again by a cluster that runs already.

Workers need not start together, so there is no placement group: it would hold all of them back until the cluster has
room for the last, for ever where it cannot grow that far. Each actor that waits is a demand of its own instead, which
a cluster that scales answers node by node, and which goes with the study: actors end by themselves, and the first that
finds nothing left to do ends those that still wait.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from storage.database.url import parse_url, read_password
from tuner.errors import TunerError, UsageError, first_line
from tuner.launch import ray_actor
from tuner.launch.command import reachable_url, worker_arguments
from tuner.launch.engine import Job, NoEngineError
from tuner.launch.ray_actor import NAMESPACE, Order
from tuner.placement import Placement
from tuner.study.by_path import module_place

if TYPE_CHECKING:
    from tuner.study.joining import Study
    from tuner.study.registry import ObjectiveSource

VARIABLE: Final = "RAY_ADDRESS"
_REACH_S: Final = 5.0
_CHECK_S: Final = ray_actor.CHECK_S + 30
_STOP_S: Final = 2 * ray_actor.DRAIN_S + ray_actor.ANSWER_S
_START_S: Final = 10.0
"""How long actors may take to run before they are said to wait."""
_NOT_COPIED: Final = (".git", ".venv", "venv", "__pycache__", "*.pyc")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What Ray is to set aside for each worker."""

    gpus: float = 0.0
    cpus: float | None = None
    resources: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def checked(cls, gpus: float, cpus: float | None, resources: str | None) -> Needs:
        """Return what the options ask for. Raises UsageError."""
        if not (0 <= gpus < math.inf) or (gpus > 1 and gpus != int(gpus)):
            raise UsageError(f"--gpus-per-worker needs a part of one GPU, as 0.5, or a whole number, got {gpus:g}")
        if cpus is not None and not 0 < cpus < math.inf:
            raise UsageError(f"--cpus-per-worker needs a number above 0, got {cpus:g}")
        return cls(gpus=gpus, cpus=cpus, resources=_custom(resources))

    @property
    def slots(self) -> int:
        """How many trials a worker runs at once: one for each of its GPUs."""
        return max(1, int(self.gpus))

    @property
    def cores(self) -> float:
        """How many CPUs Ray counts for a worker: one for each slot unless it was said."""
        return float(self.slots) if self.cpus is None else self.cpus

    def named(self) -> dict[str, float]:
        """Return them by Ray's names."""
        found = {**self.resources, "GPU": self.gpus, "CPU": self.cores}
        return {name: amount for name, amount in found.items() if amount}

    def options(self) -> dict[str, Any]:
        """Return them as the options of an actor."""
        return {"num_cpus": self.cores, "num_gpus": self.gpus, "resources": dict(self.resources)}

    def worker_options(self) -> list[str]:
        """Return the options of `tuner worker` for what Ray gives it: its devices are the only ones that it sees."""
        threads = ["--threads", str(max(1, int(self.cores) // self.slots))]
        if not self.gpus:
            return ["--slots", "cpu", *threads]
        share = ["--device-share", f"{self.gpus:g}"] if self.gpus < 1 else []
        return ["--slots", str(self.slots), *threads, *share]


class Ray:
    """The cluster at an address."""

    name: Final = "ray"

    def __init__(self, address: str) -> None:
        self._address = address

    def jobs(self, label: str) -> list[Job]:
        """Return the study's workers that run, and those that wait for a node, of each launch."""
        with connected(self._address):
            handles = ray_actor.actors(label)
            return _jobs(handles, ray_actor.looks(handles))

    def stop(self, label: str) -> list[Job]:
        """End the study's actors: those that run once their workers have given their trials back."""
        with connected(self._address):
            handles = ray_actor.actors(label)
            looks = ray_actor.looks(handles)
            asked = [handles[name].stop.remote() for name in looks]
            for name in handles.keys() - looks.keys():
                ray.kill(handles[name], no_restart=True)
            if asked:
                ray.wait(asked, num_returns=len(asked), timeout=_STOP_S)
            left = ray_actor.actors(label)
            for name in left.keys() & looks.keys():  # it is about to end, or its worker would not
                with suppress(RayError):
                    ray.kill(left[name], no_restart=True)
            return _jobs(handles, looks)

    def states(self, placements: Collection[Placement]) -> Mapping[Placement, str]:
        """Return whether each worker's actor runs, or is made again; one that is gone is left out."""
        with connected(self._address):
            handles = ray_actor.actors(None)
            looks = ray_actor.looks(handles)
        by_task = {tuple(name.split(".")[1:]): name for name in handles}
        names = {each: by_task.get((each.job, str(each.task))) for each in placements}
        return {each: "ALIVE" if name in looks else "RESTARTING" for each, name in names.items() if name is not None}


def engine() -> Ray:
    """Return the cluster that RAY_ADDRESS names, or else that of this machine. Raises NoEngineError."""
    address = os.environ.get(VARIABLE) or "auto"
    with connected(address):
        return Ray(address)


def launch(
    study: Study,
    label: str,
    source: ObjectiveSource,
    reference: str,
    *,
    workers: int,
    needs: Needs,
    storage: str | None,
    password_file: Path | None,
    environment: Mapping[str, str],
    address: str | None = None,
    is_elastic: bool = False,
    allow_code_change: bool = False,
) -> list[Job]:
    """Ask the cluster for workers of a study, and return how they are after some seconds.

    `reference` is the objective's, as it was given; `environment` what workers find in theirs beside the database.
    `is_elastic` if nodes come by demand, so that none has to be there that has what a worker needs.
    Raises NoEngineError, UsageError or TunerError before any is asked for that cannot run.
    """
    address = address or os.environ.get(VARIABLE) or "auto"
    with connected(address):
        nodes = [node for node in ray.nodes() if node["Alive"]]
    fitting = [node for node in nodes if _fits(node, needs)]
    if not fitting and not is_elastic:
        raise UsageError(_too_much(nodes, needs))
    place, reference = _carried(source, reference)
    order = Order(
        label=label,
        launch=secrets.token_hex(3),
        number=0,
        arguments=tuple(_arguments(study, source, reference, needs, allow_code_change=allow_code_change)),
        environment={**environment, **_of_database(storage, password_file, None if is_elastic else nodes)},
    )
    with connected(address, place):
        ray.cloudpickle.register_pickle_by_value(ray_actor)
        try:
            _check_nodes(fitting, order)
            handles = {}
            kind = ray.remote(ray_actor.WorkerActor)
            for number in range(workers):
                one = replace(order, number=number)
                handles[one.name] = kind.options(
                    name=one.name,
                    namespace=NAMESPACE,
                    lifetime="detached",
                    max_restarts=-1,
                    max_concurrency=4,
                    **needs.options(),
                ).remote(one)
            # A driver that ended at once could take those along whose creation is on its way to the cluster.
            started = [handle.look.remote() for handle in handles.values()]
            ray.wait(started, num_returns=len(started), timeout=_START_S)
            return _jobs(handles, ray_actor.looks(handles))
        finally:
            ray.cloudpickle.unregister_pickle_by_value(ray_actor)


@contextmanager
def connected(address: str, directory: Path | None = None) -> Iterator[None]:
    """Be connected to a cluster for a while; `directory` is copied to the nodes that run something of it.

    Raises NoEngineError if none is there, UsageError if the directory is too large for that.
    """
    _check_address(address)
    runtime_env = None if directory is None else {"working_dir": str(directory), "excludes": list(_NOT_COPIED)}
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            runtime_env=runtime_env,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except ConnectionError as error:
        raise NoEngineError(_nobody(address, first_line(error))) from error
    except (RayError, RuntimeError, ValueError) as error:
        if "exceeds the maximum" in str(error):
            raise UsageError(
                f"the objective's directory {directory} is copied to the nodes, and is too large for that; move the"
                f" objective, or list what trials do not need in {directory}/.rayignore: {first_line(error)}"
            ) from error
        raise TunerError(f"the Ray cluster at {address} lets nobody in: {first_line(error)}") from error
    try:
        yield
    except RayError as error:
        raise TunerError(f"the Ray cluster at {address} failed: {first_line(error)}") from error
    finally:
        ray.shutdown()
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _check_address(address: str) -> None:
    """Raise what says that nobody listens there, which Ray itself would take minutes to find."""
    if address == "auto":
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port or (10001 if parts.scheme == "ray" else None)
    except ValueError:
        host = port = None
    if parts.scheme not in ("ray", "") or host is None or port is None:
        raise UsageError(
            f"a Ray cluster's address is ray://HOST:10001, or HOST:6379 from one of its nodes, got {address!r}"
            f" (--address, or {VARIABLE})"
        )
    try:
        socket.create_connection((host, port), timeout=_REACH_S).close()
    except OSError as error:
        raise NoEngineError(_nobody(address, str(error))) from error


def _nobody(address: str, why: str) -> str:
    if address == "auto":
        return f"no Ray cluster runs on this machine; name one by --address ray://HOST:10001 or {VARIABLE}"
    return f"no Ray cluster answers at {address}: {why}; --address or {VARIABLE} names another"


def _custom(text: str | None) -> dict[str, float]:
    wanted = 'a JSON object of resources and how much of each a worker needs, as {"a100": 0.5}'
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise UsageError(f"--resources needs {wanted}, got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"--resources needs {wanted}, got {text!r}")
    for name, amount in found.items():
        if name.upper() in ("CPU", "GPU"):
            raise UsageError(f"--resources has {name}: --{name.lower()}s-per-worker says how many")
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < math.inf:
            raise UsageError(f"--resources needs {wanted}, got {amount!r} of {name!r}")
        if amount > 1 and amount != int(amount):
            raise UsageError(f"--resources: Ray has parts of one {name}, and whole ones, not {amount:g}")
    return {name: float(amount) for name, amount in found.items()}


def _fits(node: Mapping[str, Any], needs: Needs) -> bool:
    return all(node["Resources"].get(name, 0) >= amount for name, amount in needs.named().items())


def _too_much(nodes: Collection[Mapping[str, Any]], needs: Needs) -> str:
    grows = "; if nodes come by demand, --elastic asks for them"
    for name, amount in needs.named().items():
        most = max((node["Resources"].get(name, 0) for node in nodes), default=0)
        if most < amount:
            return f"a worker needs {amount:g} {name}, and no node of the cluster has more than {most:g}{grows}"
    wanted = ", ".join(f"{amount:g} {name}" for name, amount in needs.named().items())
    return f"no node of the cluster has all that a worker needs: {wanted}{grows}"


def _carried(source: ObjectiveSource, reference: str) -> tuple[Path | None, str]:
    """Return the directory that is copied to the nodes for an objective, None for an installed one, and its name there.

    That directory is where the modules that it imports are looked for here. Raises UsageError for one of everything.
    """
    is_file = reference.rpartition(":")[0].endswith(".py")
    if source.module is not None or not (is_file or source.file.is_relative_to(Path.cwd())):
        return None, reference
    root, _ = module_place(source.file)
    if root in (Path.home(), Path(tempfile.gettempdir()), Path(root.anchor)):
        raise UsageError(
            f"the directory of an objective is copied to the nodes, and {source.file} lies in {root}, with all else;"
            " move it into a directory of its own"
        )
    return root, f"{source.file.relative_to(root)}:{source.attribute}"


def _of_database(
    storage: str | None, password_file: Path | None, nodes: Collection[Mapping[str, Any]] | None
) -> dict[str, str]:
    """Return the variables by which workers reach the database: its URL with the password, and what libpq goes by.

    `nodes` are all that there will be, None if others may come. Raises UsageError for a URL that leads nowhere there.
    """
    is_here = nodes is not None and {node["NodeManagerHostname"] for node in nodes} == {socket.gethostname()}
    url = parse_url(storage) if storage is not None and is_here else reachable_url(storage)
    if password_file is not None:
        url = url.set(password=read_password(password_file))
    libpq = {name: value for name, value in os.environ.items() if name.startswith("PG") and name != "PGPASSFILE"}
    return {**libpq, "TUNER_STORAGE": url.render_as_string(hide_password=False)}


def _arguments(
    study: Study, source: ObjectiveSource, reference: str, needs: Needs, *, allow_code_change: bool
) -> list[str]:
    command, *rest = worker_arguments(
        study, objective=None if source.module is not None else reference, allow_code_change=allow_code_change
    )
    return [command, *needs.worker_options(), *rest]


def _check_nodes(nodes: Collection[Mapping[str, Any]], order: Order) -> None:
    """Raise TunerError if a worker could not work on one of these nodes, with the exit code that it would have."""
    look = ray.remote(ray_actor.look_around)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = look.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        asked[task.remote(order.arguments, order.environment)] = node
    ready, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_CHECK_S) if asked else ([], [])
    for ref in ready:
        try:
            code, told = ray.get(ref)
        except RayError as error:
            code, told = 1, f"Ray starts nothing there: {first_line(error)}"
        if code:
            raise TunerError(f"{_node_name(asked[ref])}: {told}", code)
    if silent:
        raise TunerError(f"{_node_name(asked[silent[0]])} does not answer within {_CHECK_S:g} s")


def _node_name(node: Mapping[str, Any]) -> str:
    return f"node {node['NodeManagerHostname']} ({node['NodeID'][:12]})"


def _jobs(handles: Mapping[str, Any], looks: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    found = []
    for launched in sorted({name.split(".")[1] for name in handles}):
        names = [name for name in handles if name.split(".")[1] == launched]
        running = [name for name in names if name in looks]
        if running:
            nodes = ", ".join(sorted({looks[name]["node"] for name in running}))
            found.append(_job(launched, "ALIVE", len(running), len(running), f"on {nodes}"))
        if waiting := len(names) - len(running):
            found.append(_job(launched, "PENDING", waiting, 0, "until a node has room"))
    return found


def _job(launched: str, state: str, wanted: int, running: int, detail: str) -> Job:
    return Job(engine=Ray.name, id=launched, state=state, wanted=wanted, running=running, detail=detail)
