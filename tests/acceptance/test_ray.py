"""Workers under Ray: a cluster of three nodes on this machine, one of which goes away, and what is refused before."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command import Tuner, wait_for
from sqlalchemy import text

from storage import EmbeddedServer, open_engine, parse_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'tuner[ray]'")

N_TRIALS = 6
LONG_S = 120.0
REPORTED = """
    SELECT placement->>'node', number FROM tuner_workers w
    JOIN tuner_leases ON worker = name JOIN trials t USING (trial_id) JOIN studies s ON s.study_id = t.study_id
    WHERE study_name = 'cut' AND EXISTS (SELECT 1 FROM trial_intermediate_values v WHERE v.trial_id = t.trial_id)
"""
"""The node of each running trial that has reported, and its number."""
# The first two trials last until they are let go, so that nothing depends on when a node is taken away.
SLOW = """
import threading
from pathlib import Path
from limits import GO

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    for step in range(10_000):
        trial.report(x, step)
        if trial.number >= 2 or Path(GO).exists():
            return x
        threading.Event().wait(0.1)
    return x
"""


@dataclass(frozen=True)
class Place:
    """A cluster, and a database with a password that its nodes reach, but for the one that has the resource `cut`."""

    address: str
    nodes: Any
    url: str
    password: str
    logs: Path

    def add(self) -> Any:
        """Add a node with room for a worker."""
        return self.nodes.add_node(num_cpus=1, num_gpus=1, resources={"part": 1})

    def remove(self, node: str) -> None:
        """Lose a node, by the first digits of its id."""
        (lost,) = [each for each in self.nodes.worker_nodes if each.node_id.startswith(node)]
        self.nodes.remove_node(lost, allow_graceful=False)

    def rows(self, query: str) -> list[Any]:
        """What the database answers."""
        engine = open_engine(parse_url(self.url).set(password=self.password))
        try:
            with engine.connect() as conn:
                return list(conn.execute(text(query)))
        finally:
            engine.dispose()

    def ask(self, code: str) -> str:
        """Run some code that is connected to the cluster, in a process of its own: Ray's would stay in this one."""
        connect = f"import ray; ray.init({self.address!r}, namespace='tuner', logging_level='ERROR')\n"
        done = subprocess.run([sys.executable, "-c", connect + code], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def demand(self) -> str:
        """The actors of ours that there are, and what is not free."""
        return self.ask(
            "there, free = ray.cluster_resources(), ray.available_resources()\n"
            "names = [name for name in ('CPU', 'GPU', 'part') if free.get(name) != there.get(name)]\n"
            "print(ray.util.list_named_actors(), names)"
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Three nodes: one that places nothing and does not reach the database, two for a worker each."""
    from ray.cluster_utils import Cluster

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = EmbeddedServer(tmp_path_factory.mktemp("database"))
    server.start(f"127.0.0.1:{port}")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    away = {"PGHOSTADDR": "127.0.0.99"}
    head = {"num_cpus": 1, "include_dashboard": False, "env_vars": away, "resources": {"cut": 1}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        made = Place(
            address=cluster.address,
            nodes=cluster,
            url=f"postgresql://tuner@127.0.0.1:{port}/tuner",
            password=server.password_file.read_text().strip(),
            logs=Path(cluster.head_node.get_logs_dir_path()),
        )
        made.add()
        made.add()
        yield made
    finally:
        cluster.shutdown()
        server.destroy()


@pytest.fixture
def tuner(place: Place, tmp_path: Path) -> Tuner:
    """The command line, as on a node of the cluster."""
    password_file = tmp_path / "password"
    password_file.touch(0o600)
    password_file.write_text(place.password)
    its = {
        "TUNER_STORAGE": place.url,
        "TUNER_STORAGE_PASSWORD_FILE": str(password_file),
        "TUNER_DATA_DIR": str(tmp_path / "data"),
        "RAY_ADDRESS": place.address,
    }
    return Tuner(its, tmp_path)


@pytest.fixture
def a_study(tuner: Tuner, tmp_path: Path) -> Callable[[str], str]:
    """Create a study of an objective in a file, which has a neighbour, and return what --objective is to say."""

    def create(name: str) -> str:
        place = tmp_path / "mine"
        place.mkdir()
        (place / "slow.py").write_text(SLOW)
        (place / "limits.py").write_text(f"GO = {str(tmp_path / 'go')!r}\n")
        (place / "storage.py").write_text("raise RuntimeError('no module of ours')\n")
        made = tuner("create", "mine/slow.py:objective", "--study", name, "--trials", str(N_TRIALS), "--pruner", "none")
        assert made.code == 0, made.stderr
        return "mine/slow.py:objective"

    return create


def test_what_cannot_work_is_refused_before_an_actor_is_made(
    place: Place, tuner: Tuner, a_study: Callable[[str], str]
) -> None:
    objective = a_study("refused")
    launch = ("launch", "ray", "refused", "--objective", objective)
    found = {
        "no study named 'other'": tuner("launch", "ray", "other", "--objective", objective),
        "needs 4 GPU, and no node of the cluster has more than 1": tuner(*launch, "--gpus-per-worker", "4"),
        "no Ray cluster answers at 127.0.0.1:9": tuner(*launch, "--address", "127.0.0.1:9"),
        "cannot reach PostgreSQL": tuner(*launch, "--resources", '{"cut": 1}'),
    }
    for told, done in found.items():
        assert told in done.error(), done
        assert place.password not in done.stderr
    assert place.demand() == "[] []"


def test_workers_outlive_a_node_and_go_with_the_study(
    place: Place, tuner: Tuner, a_study: Callable[[str], str], tmp_path: Path
) -> None:
    objective = a_study("cut")
    began = time.monotonic()
    launched = tuner(
        *("launch", "ray", "cut", "--objective", objective, "--workers", "3", "--json"),
        *("--gpus-per-worker", "0.5", "--resources", '{"part": 0.5}'),
    )
    assert launched.code == 0, launched.stderr
    assert sum(job["wanted"] for job in launched.json()) == 3
    wait_for(lambda: bool(place.rows(REPORTED)), "a report", LONG_S)
    print(f"first report after {time.monotonic() - began:.1f} s")
    wait_for(lambda: len(place.rows(REPORTED)) == 2, "a report of both", LONG_S)
    (node, number), *_ = place.rows(REPORTED)
    jobs: dict[str, tuple[int, int]] = {}  # an actor that is slow to answer is taken for one that waits

    def both_answer() -> bool:
        told = tuner("launch", "status", "cut", "--json").json()
        jobs.update({job["state"]: (job["wanted"], job["running"]) for job in told})
        return jobs.get("ALIVE") == (2, 2)

    wait_for(both_answer, f"two run: {jobs}", LONG_S)
    assert jobs["PENDING"] == (1, 0)
    seen = tuner("status", "cut", "--json").json()["workers"]
    assert node in {worker["placed_by"]["node"] for worker in seen}
    assert {worker["placed_by"]["state"] for worker in seen} <= {"ALIVE", "RESTARTING"}
    assert {slot["share"] for worker in seen for slot in worker["slots"]} == {0.5}
    cut_at = time.monotonic()
    place.remove(node)
    place.add()
    again = "SELECT number FROM tuner_attempts JOIN trials USING (trial_id) GROUP BY number HAVING count(*) > 1"
    wait_for(lambda: (number,) in place.rows(again), "the trial is gone on with", LONG_S)
    print(f"gone on with after {time.monotonic() - cut_at:.1f} s")
    (tmp_path / "go").touch()
    wait_for(lambda: place.demand() == "[] []", "no actor is left, and none is asked for", LONG_S)
    trials = place.rows("SELECT number, t.state FROM trials t JOIN studies USING (study_id) WHERE study_name = 'cut'")
    assert sorted(map(tuple, trials)) == [(number, "COMPLETE") for number in range(N_TRIALS)]
    written = [log for log in place.logs.iterdir() if log.is_file() and place.password.encode() in log.read_bytes()]
    assert written == []
    logs = b"".join(log.read_bytes() for log in place.logs.glob("worker-*.err"))
    assert b"joined study cut" in logs


def test_stop_has_workers_give_their_trials_back(place: Place, tuner: Tuner, a_study: Callable[[str], str]) -> None:
    objective = a_study("stopped")
    launched = tuner(
        "launch", "ray", "stopped", "--objective", objective, "--workers", "2", "--resources", '{"part": 0.5}'
    )
    assert "ray " in launched.stdout, launched.stderr
    reported = REPORTED.replace("'cut'", "'stopped'")
    wait_for(lambda: bool(place.rows(reported)), "a report", LONG_S)
    stopped = tuner("launch", "stop", "stopped")
    assert stopped.stdout.startswith("ended ray "), stopped
    assert place.demand() == "[] []"
    outcomes = place.rows(
        "SELECT DISTINCT outcome FROM tuner_attempts JOIN trials USING (trial_id) JOIN studies USING (study_id)"
        " WHERE study_name = 'stopped'"
    )
    assert outcomes == [("released",)]
    assert "no engine that is here" in tuner("launch", "status", "stopped").stderr
