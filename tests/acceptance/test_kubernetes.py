"""`tuner launch k8s`: what it prints, against the schemas of Kubernetes; and its very containers, as processes."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pods
import pytest
import yaml
from command import Finished, Tuner, wait_for

from storage import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    APod = Callable[[dict[str, Any], int, str], pods.Pod]

STUDY = "my$(HOME) study"
SECRET = "tuner-storage"
LAUNCH = [
    *("--image", "tuner:1.2", "--secret", SECRET),
    *("--volume", "code:/mnt/code:ro", "--objective", "/mnt/code/mine.py:objective"),
]
OBJECTIVE = """\
import time
from pathlib import Path

def objective(trial):
    x, step = trial.suggest_float("x", 0, 1), 0
    Path("/data/started").touch()
    while not Path("/data/go").exists():
        trial.report(x, step)
        step += 1
        time.sleep(0.05)
    return x
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A database that is reached by TCP and its password, as in a cluster."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    embedded = EmbeddedServer(tmp_path_factory.mktemp("kubernetes"))
    try:
        embedded.start(listen=f"127.0.0.1:{port}")
        yield embedded
    finally:
        embedded.destroy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an objective, whose trials go on until there is a file in their pod."""
    directory = tmp_path_factory.mktemp("code")
    directory.chmod(0o755)  # the pod's user is another one
    directory.joinpath("mine.py").write_text(OBJECTIVE)
    return directory


@pytest.fixture(scope="module")
def team(server: EmbeddedServer, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuner:
    """The command line of whoever launches, who has come to the database by a forwarded port; with a study."""
    port = server.status().url.rpartition("port=")[2]
    here = {
        "TUNER_STORAGE": f"postgresql://tuner@127.0.0.1:{port}/tuner",
        "TUNER_STORAGE_PASSWORD_FILE": str(server.password_file),
    }
    directory = tmp_path_factory.mktemp("team")
    tuner = Tuner({**here, "TUNER_DATA_DIR": str(directory / "data")}, directory)
    created = tuner("create", f"{folder}/mine.py:objective", "--study", STUDY, "--trials", "1")
    assert created.code == 0, created.stderr
    return tuner


def launched(team: Tuner, *options: str) -> list[dict[str, Any]]:
    """What is printed for workers of the study."""
    done = team("launch", "k8s", STUDY, *LAUNCH, *options)
    assert done.code == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture
def a_pod(team: Tuner, server: EmbeddedServer, folder: Path, tmp_path: Path) -> APod:
    """Starts pods; the Secret is as the comment of the manifests says to make it."""
    if (why := pods.why_not()) is not None:
        pytest.skip(why)
    secrets = {SECRET: {"url": team.environment["TUNER_STORAGE"], "password": server.password_file.read_text()}}

    def make(job: dict[str, Any], index: int, name: str) -> pods.Pod:
        directory = tmp_path / name
        directory.mkdir()
        return pods.Pod(job, index, f"node-{index}", secrets, {"code": folder}, directory)

    return make


def ended(pod: pods.Pod, container: str) -> Finished:
    """How a container ended that was left alone."""
    running = pod.start(container)
    try:
        return running.finish()
    finally:
        running.close()


def action(job: dict[str, Any], container: str, code: int) -> str | None:
    """What becomes of a pod whose container ended so."""
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"values": []})
        if codes.get("containerName") in (None, container) and code in codes["values"]:
            return str(rule["action"])
    return None


def test_a_pod_that_is_to_end_gives_its_trial_back_and_the_next_one_ends_with_the_study(
    team: Tuner, a_pod: APod
) -> None:
    [job] = launched(team, "--workers", "2", "--namespace", "ml", "--name", "mine")
    first = a_pod(job, 1, "first")
    running = first.start("worker")
    try:
        started = first.volume("data") / "started"
        wait_for(lambda: started.exists() or running.process.poll() is not None, "a trial", timeout_s=180)
        assert started.exists(), running.lines
        [worker] = team("status", STUDY, "--json").json()["workers"]
        running.process.send_signal(signal.SIGTERM)
        grace_s = job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        code = running.process.wait(timeout=grace_s)
    finally:
        running.close()
    assert (code, action(job, "worker", code)) == (143, "Ignore")
    told = {"engine": "k8s", "job": "ml/mine", "task": "1", "node": "node-1"}
    assert told.items() <= worker["placed_by"].items()
    trials = team("status", STUDY, "--json").json()["trials"]
    assert (trials["waiting"], trials["running"]) == (1, 0)

    again = a_pod(job, 1, "again")
    checked = ended(again, "check")
    assert (checked.code, checked.stderr) == (0, "")
    again.volume("data").joinpath("go").touch()
    last = ended(again, "worker")
    assert last.code == 0, last.stderr
    assert team("status", STUDY, "--json").json()["state"] == "finished"
    refused = team("launch", "k8s", STUDY, *LAUNCH)
    assert (refused.code, refused.stdout) == (1, "")
    assert "has nothing for workers to run" in refused.error()


def test_what_a_pod_lacks_is_told_by_its_check_and_not_tried_again(team: Tuner, a_pod: APod, folder: Path) -> None:
    assert team("create", f"{folder}/mine.py:objective", "--study", "other", "--trials", "1").code == 0
    done = team(
        "launch", "k8s", "other", "--image", "tuner", "--secret", SECRET, "--objective", "/app/mine.py:objective"
    )
    [job] = yaml.safe_load_all(done.stdout)
    pod = a_pod(job, 0, "pod")
    missing = ended(pod, "check")
    assert "no file /app/mine.py" in missing.error()
    assert team("delete", "other", "--yes").code == 0
    gone = ended(pod, "check")
    assert "no study named 'other'" in gone.error()
    assert [action(job, "check", each.code) for each in (missing, gone)] == ["FailIndex", "FailIndex"]


def test_the_password_is_printed_only_in_a_secret_that_was_asked_for(team: Tuner, server: EmbeddedServer) -> None:
    password = server.password_file.read_text().strip()
    done = team("launch", "k8s", STUDY, *LAUNCH)
    assert password not in done.stdout + done.stderr
    refused = team("launch", "k8s", STUDY, *LAUNCH, "--with-secret")
    assert (refused.code, refused.stdout) == (2, "")
    assert "its loopback" in refused.error()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["nope", "--image", "tuner", "--secret", "s"], 1, "no study named 'nope'"),
        (["x", "--secret", "s"], 2, "Missing option '--image'"),
        (["x", "--image", "tuner"], 2, "leads from each machine to itself"),
        (["x", "--image", "tuner", "--secret", "s", "--gpus", "-1"], 2, "--gpus needs a whole number from 0, got -1"),
        (["x", "--image", "tuner", "--secret", "s", "--objective", "mine.py:M"], 2, "the path that the file has"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_printed(
    team: Tuner, options: list[str], code: int, message: str
) -> None:
    done = team("launch", "k8s", *options)
    assert (done.code, done.stdout) == (code, "")
    assert message in done.error()


def test_without_a_cluster_here_no_engine_answers_for_kubernetes(team: Tuner, tmp_path: Path) -> None:
    nowhere = {"PATH": str(tmp_path), "KUBECONFIG": str(tmp_path / "none")}
    done = team("launch", "status", STUDY, **nowhere)
    assert done.code == 1
    assert "no Kubernetes here: no kubectl on the PATH" in done.error()
