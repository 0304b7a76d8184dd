"""What runs on the nodes of a Ray cluster: an actor that keeps a worker running, and a look around before there is one.

Sent to the nodes as it is here, as Ray sends what is typed into a notebook: it has to say what is missing where there
is no tuner, or another version of it. So it imports nothing but Ray and the standard library.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

NAMESPACE = "tuner"
DRAIN_S = 15.0
"""How long a worker has to end that was asked to; by itself it does in ten seconds."""
ANSWER_S = 5.0
"""How long actors that run may take to say so; those that wait for a node say nothing."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
"""How long after its end a worker is started again; twice as long each time, until one has run for the longest."""
CHECK_S = 90.0
_STUDY_IS_OVER = (0, 5)
_NEEDS_PEOPLE = (1, 2, 4)
"""Exit codes of tuner.exits: the next worker would end as this one did."""
_NOT_STARTED = -1
_OF_ANOTHER_PROCESS = ("TUNER_STORAGE_PASSWORD_FILE", "TUNER_WORKER_SLOTS", "TUNER_WORKER_DEVICE", "PGPASSFILE")


@dataclass(frozen=True, kw_only=True)
class Order:
    """A worker: its arguments, what its environment says beside the node's, and its place in what was launched.

    `environment` has the database's password. It is an argument of the actor, and not part of its runtime
    environment, which the dashboard shows.
    """

    label: str
    launch: str
    number: int
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(repr=False)

    @property
    def name(self) -> str:
        """The actor's name."""
        return f"{self.label}.{self.launch}.{self.number}"


class WorkerActor:
    """Runs a worker, and again if it dies; ends with it once nothing is left to do.

    Ray makes it anew, from the same order, on another node if it loses its own.
    """

    def __init__(self, order: Order) -> None:
        import ray

        context = ray.get_runtime_context()
        self._order = order
        self._this = context.current_actor
        self._node = context.get_node_id()[:12]
        self._process: subprocess.Popen[bytes] | None = None
        self._asked, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def look(self) -> dict[str, Any]:
        """Return where it is."""
        return {"node": self._node, "pid": None if self._process is None else self._process.pid}

    def stop(self) -> None:
        """Have the worker give its trials back, and return when it has."""
        self._asked.set()
        process = self._process
        if process is not None:
            process.terminate()
            if not self._ended.wait(DRAIN_S):
                process.kill()
        self._ended.wait(DRAIN_S)

    def leave(self) -> None:
        """End this actor for good: Ray makes no other."""
        import ray

        ray.actor.exit_actor()

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._asked.is_set():
            began = time.monotonic()
            try:
                code = self._work()
            except OSError as error:  # no process or no memory left
                say(f"no worker can be started: {error}")
                code = _NOT_STARTED
            if code in _STUDY_IS_OVER or code in _NEEDS_PEOPLE or self._asked.is_set():
                say(f"worker {self._order.name} ended with exit code {code}")
                break
            if time.monotonic() - began > LONGEST_PAUSE_S:
                pause_s = FIRST_PAUSE_S
            say(f"worker {self._order.name} ended with exit code {code} and is started again in {pause_s:g} s")
            self._asked.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._ended.set()
        try:
            if not self._asked.is_set() and code in _STUDY_IS_OVER:
                end_waiting(self._order.label)
        finally:
            self._this.leave.remote()

    def _work(self) -> int:
        """Run a worker to its end, its log being this actor's."""
        order = self._order
        environment = {
            **own_environment(),
            **order.environment,
            "TUNER_PLACED_BY": "ray",
            "TUNER_PLACED_JOB": order.launch,
            "TUNER_PLACED_TASK": str(order.number),
            "TUNER_PLACED_NODE": self._node,
        }
        # Should Ray kill the actor, nobody reads the log any more: its worker gives its trials back then.
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "tuner", *order.arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=directory(),
            start_new_session=True,
        ) as process:
            self._process = process
            if self._asked.is_set():
                process.terminate()
            assert process.stderr is not None
            for line in process.stderr:
                say(line.decode(errors="replace").rstrip("\n"))
        return process.returncode


def look_around(arguments: tuple[str, ...], environment: dict[str, str]) -> tuple[int, str]:
    """Return with which exit code a worker would end on this node before it runs a trial, and why."""
    command, *rest = arguments
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "tuner", command, "--check", *rest],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**own_environment(), **environment},
            cwd=directory(),
            timeout=CHECK_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {CHECK_S:g} s"
    told = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].removeprefix("tuner: ")
    if "No module named tuner" in told or "No such option" in told:
        return 1, f"no tuner in {sys.executable}, or an older one ({told}); install it there as it is here"
    return done.returncode, told


def directory() -> str:
    """Return the directory that this process was started in, which is the objective's.

    Nodes of one machine may share it. Each that comes makes it anew, so that this process is in one that is gone.
    """
    try:
        return os.getcwd()
    except FileNotFoundError:
        return os.readlink("/proc/self/cwd").removesuffix(" (deleted)")


def own_environment() -> dict[str, str]:
    """Return this process's environment without what is meant for others.

    Ray has Python look for modules in the directory of the objective, whose `storage.py` would be taken for ours.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_PROCESS}
    here = os.path.realpath(directory())
    paths = environment.pop("PYTHONPATH", "").split(os.pathsep)
    kept = [path for path in paths if path and os.path.realpath(path) != here]
    return {**environment, "PYTHONPATH": os.pathsep.join(kept)} if kept else environment


def actors(label: str | None) -> dict[str, Any]:
    """Return the handles of a study's actors by their names, those of all studies for None."""
    import ray

    found = {}
    for each in ray.util.list_named_actors(all_namespaces=True):
        if each["namespace"] == NAMESPACE and (label is None or each["name"].startswith(f"{label}.")):
            with suppress(ValueError):  # it has ended meanwhile
                found[each["name"]] = ray.get_actor(each["name"], namespace=NAMESPACE)
    return found


def looks(handles: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what those actors say that run; the others wait for a node with room for them."""
    import ray

    asked = {name: handle.look.remote() for name, handle in handles.items()}
    if not asked:
        return {}
    answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
    found = {}
    for name, ref in asked.items():
        if ref in answered:
            with suppress(ray.exceptions.RayError):  # its actor has ended, or lost its node
                found[name] = ray.get(ref)
    return found


def end_waiting(label: str) -> None:
    """End the actors of a study that wait for a node: the demand of a cluster that scales goes with them."""
    import ray

    handles = actors(label)
    for name in handles.keys() - looks(handles).keys():
        ray.kill(handles[name], no_restart=True)


def say(line: str) -> None:
    """Write a line to this actor's log."""
    with suppress(OSError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
