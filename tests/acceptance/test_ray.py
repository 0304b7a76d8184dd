"""Workers under Ray: a cluster on this machine that loses nodes, or grows by demand, and what is refused before."""

from __future__ import annotations

import json
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
from proxy import Proxy
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
HERE = ray.util.get_node_ip_address()
AUTOSCALER = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
"""How Ray's own tests run its autoscaler."""
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


def scaling(address: str) -> dict[str, Any]:
    """A cluster's configuration by which it has up to two nodes of the resource `grown`, on this machine, by demand."""
    lists = ("cluster_synced_files", "initialization_commands", "rsync_exclude", "rsync_filter", "setup_commands")
    of_each = (f"{kind}_{what}_commands" for kind in ("head", "worker") for what in ("setup", "start_ray"))
    return {
        "cluster_name": "grows",
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,  # these two as on Kubernetes: else a node that is slow to start would be
            "worker_liveness_check": False,  # taken for lost
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"cut": 1}, "node_config": {}, "max_workers": 0},
            "grown": {"resources": {"CPU": 1, "grown": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.05,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in (*lists, *of_each)},
        "file_mounts_sync_continuously": False,
    }


@dataclass(frozen=True)
class Place:
    """A cluster, and a database with a password that its nodes reach, but for the one that has the resource `cut`."""

    address: str
    nodes: Any
    url: str
    password: str
    logs: Path
    modules: Path
    """Where the nodes that come by demand find modules. What is copied to a node is taken from those beside it on this
    machine for a moment, as each comes."""

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
    """A node that places nothing and does not reach the database, two for a worker each, and two more by demand."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
    from ray.cluster_utils import Cluster

    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("", 0)) as other:
        port, head_port = listener.getsockname()[1], other.getsockname()[1]
    server = EmbeddedServer(tmp_path_factory.mktemp("database"))
    server.start(f"127.0.0.1:{port}")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    grows = tmp_path_factory.mktemp("scaling") / "cluster.json"
    grows.write_text(json.dumps(scaling(f"{HERE}:{head_port}")))
    head = {
        "num_cpus": 1,
        "include_dashboard": False,
        "env_vars": {"PGHOSTADDR": "127.0.0.99", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID},
        "resources": {"cut": 1},
        "gcs_server_port": head_port,
        "autoscaling_config": str(grows),
    }
    modules = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AUTOSCALER.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(modules), prepend=os.pathsep)
        cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        made = Place(
            address=cluster.address,
            nodes=cluster,
            url=f"postgresql://tuner@127.0.0.1:{port}/tuner",
            password=server.password_file.read_text().strip(),
            logs=Path(cluster.head_node.get_logs_dir_path()),
            modules=modules,
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


@pytest.mark.skipif(HERE.startswith("127."), reason="needs an address by which other machines would reach this one")
def test_a_cluster_grows_by_the_demand_of_workers_and_shrinks_with_it(
    place: Place, tuner: Tuner, tmp_path: Path
) -> None:
    (place.modules / "slowly.py").write_text(SLOW)
    (place.modules / "limits.py").write_text(f"GO = {str(tmp_path / 'go')!r}\n")
    proxy = Proxy(place.url, HERE)  # nodes that are still to come would not find a loopback
    path = os.pathsep.join(filter(None, [str(place.modules), os.environ.get("PYTHONPATH")]))
    tuner = Tuner({**tuner.environment, "TUNER_STORAGE": str(proxy.url), "PYTHONPATH": path}, tmp_path)
    made = tuner("create", "slowly:objective", "--study", "grows", "--trials", str(N_TRIALS), "--pruner", "none")
    assert made.code == 0, made.stderr
    began = time.monotonic()
    wanted = ("--workers", "3", "--resources", '{"grown": 1}', "--elastic")
    launched = tuner("launch", "ray", "grows", "--objective", "slowly:objective", *wanted)
    assert "ray " in launched.stdout, launched.stderr
    reported = REPORTED.replace("'cut'", "'grows'")
    wait_for(lambda: len(place.rows(reported)) == 2, "a report from each of two nodes", LONG_S)
    assert place.ask("print(ray.cluster_resources()['grown'])") == "2.0"
    print(f"two nodes grew and reported after {time.monotonic() - began:.1f} s")
    (tmp_path / "go").touch()
    ended_at = time.monotonic()
    grown = "print(ray.cluster_resources().get('grown', 0), ray.util.list_named_actors())"
    wait_for(lambda: place.ask(grown) == "0 []", "no node that grew is left, and none is asked for", LONG_S)
    print(f"no node of them is left after {time.monotonic() - ended_at:.1f} s")
    trials = place.rows("SELECT number, t.state FROM trials t JOIN studies USING (study_id) WHERE study_name = 'grows'")
    assert sorted(map(tuple, trials)) == [(number, "COMPLETE") for number in range(N_TRIALS)]
    proxy.close()
