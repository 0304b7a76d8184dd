"""Kubernetes: what it says of the Jobs that `tuner launch k8s` printed, by kubectl."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Collection, Mapping
from typing import Any, Final

from tuner.errors import TunerError
from tuner.launch.engine import Job, NoEngineError
from tuner.launch.kubernetes_job import INDEX, JOB_LABEL, STUDY_LABEL
from tuner.placement import Placement

ASK_S: Final = 10
"""How long an answer of the cluster's may take; kubectl itself may take as long again."""

_ENDED: Final = ("Complete", "Failed", "SuccessCriteriaMet", "FailureTarget")
_NEXT: Final = {"SuccessCriteriaMet": "Completing", "FailureTarget": "Failing"}

Found = Mapping[str, Any]


class Kubernetes:
    """The cluster that kubectl leads to from here."""

    name: Final = "k8s"

    def jobs(self, label: str) -> list[Job]:
        """Return the study's Jobs, of all namespaces that may be listed."""
        return jobs_of(_listed("jobs.batch,pods", f"{STUDY_LABEL}={label}"))

    def stop(self, label: str) -> list[Job]:
        """Delete the study's Jobs and what was to keep their pods, but for Jobs that have ended."""
        found = [job for job in self.jobs(label) if job.wanted]
        for job in found:
            namespace, _, name = job.id.partition("/")
            its = [f"jobs.batch/{name}", f"poddisruptionbudgets.policy/{name}"]
            _kubectl("delete", *its, f"--namespace={namespace}", "--ignore-not-found", "--wait=false")
        return found

    def states(self, placements: Collection[Placement]) -> Mapping[Placement, str]:
        """Return the state of each worker's pod, of the last one where an index has had several."""
        names = sorted({each.job.partition("/")[2] for each in placements})
        pods = _listed("pods", f"{JOB_LABEL} in ({','.join(names)})") if all(names) and names else []
        return states_of(pods, placements)


def engine() -> Kubernetes:
    """Return the cluster. Raises NoEngineError if kubectl is not here, or knows of none."""
    if shutil.which("kubectl") is None:
        raise NoEngineError(
            "no Kubernetes here: no kubectl on the PATH (https://kubernetes.io/docs/tasks/tools);"
            " 'tuner launch k8s' alone does without"
        )
    if "KUBERNETES_SERVICE_HOST" not in os.environ:  # in a pod kubectl needs no context
        try:
            _kubectl("config", "current-context")
        except TunerError as error:
            raise NoEngineError(
                "no Kubernetes here: kubectl has no current context; 'kubectl config use-context' sets one"
            ) from error
    return Kubernetes()


def jobs_of(found: Collection[Found]) -> list[Job]:
    """Return the Jobs among what was listed; the pods beside them tell why one does not run."""
    pods = [each for each in found if each["kind"] == "Pod"]
    jobs = [each for each in found if each["kind"] == "Job"]
    return sorted((_job(each, pods) for each in jobs), key=lambda job: job.id)


def states_of(pods: Collection[Found], placements: Collection[Placement]) -> dict[Placement, str]:
    """Return the states of those placements that pods are of."""
    last: dict[tuple[str, str | None], str] = {}
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp"))):
        metadata = pod["metadata"]
        job = f"{metadata['namespace']}/{metadata.get('labels', {}).get(JOB_LABEL)}"
        last[job, metadata.get("annotations", {}).get(INDEX)] = _pod_state(pod)
    return {each: last[each.job, each.task] for each in placements if (each.job, each.task) in last}


def _job(job: Found, pods: Collection[Found]) -> Job:
    metadata, spec, status = job["metadata"], job["spec"], job.get("status", {})
    conditions = {each["type"]: each for each in status.get("conditions", []) if each["status"] == "True"}
    ended = next((name for name in _ENDED if name in conditions), None)
    running = status.get("ready", 0)
    done = status.get("succeeded", 0) + _n_indexes(status.get("failedIndexes", ""))
    own = [
        pod
        for pod in pods
        if pod["metadata"]["namespace"] == metadata["namespace"]
        and pod["metadata"].get("labels", {}).get(JOB_LABEL) == metadata["name"]
    ]
    if ended is not None:
        state = _NEXT.get(ended, ended)
    elif spec.get("suspend"):
        state = "Suspended"
    else:
        state = "Running" if running else "Pending"
    reasons = [conditions[ended].get("message", "")] if ended in ("Failed", "FailureTarget") else []
    reasons += [word for pod in own if (word := _why(pod))]
    return Job(
        engine=Kubernetes.name,
        id=f"{metadata['namespace']}/{metadata['name']}",
        state=state,
        wanted=0 if ended else max(spec.get("completions", 1) - done, 0),
        running=running,
        detail="; ".join(dict.fromkeys(filter(None, reasons))),
    )


def _n_indexes(text: str) -> int:
    """Return how many indexes a list such as 1,3-5 has."""
    ranges = [part.partition("-") for part in text.split(",") if part]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)


def _pod_state(pod: Found) -> str:
    """Return the state as kubectl shows it, as far as that differs from the phase."""
    if "deletionTimestamp" in pod["metadata"]:
        return "Terminating"
    waiting = [word for each in _containers(pod) if (word := each["state"].get("waiting", {}).get("reason"))]
    named = [word for word in waiting if word not in ("PodInitializing", "ContainerCreating")]
    return str(named[0] if named else pod.get("status", {}).get("phase", "Unknown"))


def _why(pod: Found) -> str | None:
    """Return why a pod does not run, or failed, in one line; None where nothing is amiss."""
    status = pod.get("status", {})
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return _line(condition.get("message") or condition.get("reason"))
    for container in _containers(pod):
        waiting, terminated = (container["state"].get(name) for name in ("waiting", "terminated"))
        if waiting and waiting.get("reason") not in ("PodInitializing", "ContainerCreating"):
            return _line(f"{waiting.get('reason')}: {waiting.get('message', '')}")
        if terminated and terminated.get("exitCode") and status.get("phase") == "Failed":
            last = str(terminated.get("message") or terminated.get("reason") or "").strip().rpartition("\n")[2]
            return _line(f"exit code {terminated['exitCode']}: {last}")
    return None


def _containers(pod: Found) -> list[Found]:
    status = pod.get("status", {})
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def _line(text: str | None) -> str | None:
    return " ".join(text.split()) if text else None


def _listed(kinds: str, selector: str) -> list[Found]:
    """Return what has these labels, of all namespaces, or of the current one where no more may be listed."""
    asked = ("get", kinds, f"--selector={selector}", "--output=json")
    try:
        told = _kubectl(*asked, "--all-namespaces")
    except TunerError as error:
        if "forbidden" not in str(error).lower():
            raise
        told = _kubectl(*asked)
    items: list[Found] = json.loads(told)["items"]
    return items


def _kubectl(*arguments: str) -> str:
    """Return what kubectl prints. Raises TunerError with its word if it fails or does not answer."""
    command = ["kubectl", *arguments, f"--request-timeout={ASK_S}s"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2 * ASK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TunerError(f"kubectl does not answer: {error}") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TunerError(f"kubectl {arguments[0]} failed: {last}")
    return done.stdout
