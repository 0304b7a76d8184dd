"""What kubectl answers, as `tuner launch status|stop` and `tuner status` tell it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuner.errors import TunerError
from tuner.launch.engine import NoEngineError
from tuner.launch.kubernetes import engine, jobs_of, states_of
from tuner.placement import Placement

LABEL = "tuner-digits-0123abcd"


def a_job(**status: Any) -> dict[str, Any]:
    metadata = {"name": LABEL, "namespace": "ml"}
    return {"kind": "Job", "metadata": metadata, "spec": {"completions": 8, "parallelism": 8}, "status": status}


def a_pod(index: int, created: str, **status: Any) -> dict[str, Any]:
    metadata = {
        "name": f"{LABEL}-{index}-{created}",
        "namespace": "ml",
        "creationTimestamp": created,
        "labels": {"batch.kubernetes.io/job-name": LABEL},
        "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
    }
    return {"kind": "Pod", "metadata": metadata, "status": status}


FULL = "0/9 nodes are available: 9 Insufficient nvidia.com/gpu."
WAITS = a_pod(
    1,
    "2026-11-01T00:00:00Z",
    phase="Pending",
    conditions=[{"type": "PodScheduled", "status": "False", "message": FULL}],
)
REFUSED = a_pod(
    2,
    "2026-11-01T00:00:00Z",
    phase="Failed",
    initContainerStatuses=[{"state": {"terminated": {"exitCode": 1, "message": "one\ntuner: no file /app/mine.py\n"}}}],
)
NO_IMAGE = a_pod(
    3,
    "2026-11-01T00:00:00Z",
    phase="Pending",
    initContainerStatuses=[{"state": {"waiting": {"reason": "ErrImagePull", "message": "not found"}}}],
    containerStatuses=[{"state": {"waiting": {"reason": "PodInitializing"}}}],
)


def test_a_job_tells_how_many_run_and_why_others_do_not() -> None:
    [job] = jobs_of([a_job(ready=4, failedIndexes="2,5-6"), WAITS, REFUSED, NO_IMAGE])
    assert (job.engine, job.id, job.state, job.wanted, job.running) == ("k8s", f"ml/{LABEL}", "Running", 5, 4)
    assert job.detail == f"{FULL}; exit code 1: tuner: no file /app/mine.py; ErrImagePull: not found"


@pytest.mark.parametrize("word", ["Complete", "Failed"])
def test_a_job_that_has_ended_wants_no_workers(word: str) -> None:
    condition = {"type": word, "status": "True", "message": "why"}
    [job] = jobs_of([a_job(succeeded=3, conditions=[condition])])
    assert (job.state, job.wanted, job.detail) == (word, 0, "why" if word == "Failed" else "")


def test_a_worker_s_state_is_that_of_the_last_pod_of_its_index() -> None:
    first, other = (Placement(engine="k8s", job=f"ml/{LABEL}", task=task, node="n") for task in ("3", "9"))
    later = a_pod(3, "2026-11-02T00:00:00Z", phase="Running")
    assert states_of([later, NO_IMAGE], [first, other]) == {first: "Running"}
    assert states_of([NO_IMAGE], [first]) == {first: "ErrImagePull"}


def test_kubectl_is_asked_for_the_study_s_jobs_and_deletes_those(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    (tmp_path / "answer").write_text(json.dumps({"items": [a_job(ready=8)]}))
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        f'case "$*" in *all-namespaces*) echo "jobs is forbidden" >&2; exit 1;; get*) cat {tmp_path}/answer;; esac\n'
    )
    kubectl.chmod(0o755)
    [job] = engine().stop(LABEL)
    assert job.id == f"ml/{LABEL}"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[-2].startswith(f"get jobs.batch,pods --selector=tuner/study={LABEL} --output=json")
    assert asked[-1].startswith(f"delete jobs.batch/{LABEL} poddisruptionbudgets.policy/{LABEL} --namespace=ml")

    kubectl.write_text("#!/bin/sh\necho one >&2\necho 'Unable to connect' >&2\nexit 1\n")
    with pytest.raises(NoEngineError, match="kubectl has no current context"):
        engine()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(TunerError, match="kubectl get failed: Unable to connect"):
        engine().jobs(LABEL)
