"""Workers under Ray: a cluster of three nodes on this machine, one of which goes away, and what is refused before."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command import Tuner, wait_for
from sqlalchemy import text

from storage import EmbeddedServer, open_engine, parse_url
from tuner.exits import ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'tuner[ray]'")

N_TRIALS = 12
SLOW = """
import threading
from pathlib import Path
from limits import N_STEPS

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    for step in range(N_STEPS):
        threading.Event().wait(0.1)
        trial.report(x, step)
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
        """Add a node with room for two workers."""
        return self.nodes.add_node(num_cpus=2, num_gpus=1, resources={"part": 1})

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
        """The actors of ours that there are, and whether all resources are free."""
        return self.ask(
            "all_, free = ray.cluster_resources(), ray.available_resources()\n"
            "print(ray.util.list_named_actors(), all(free.get(n, 0) == all_[n] for n in ('CPU', 'GPU', 'part') if n in all_))"
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Three nodes: one that places nothing and does not reach the database, two for two workers each."""
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
def a_study(tuner: Tuner, tmp_path: Path) -> Callable[[str, int], str]:
    """Create a study of an objective in a file, which has a neighbour, and return what --objective is to say."""

    def create(name: str, n_steps: int) -> str:
        place = tmp_path / "mine"
        place.mkdir()
        (place / "slow.py").write_text(SLOW)
        (place / "limits.py").write_text(f"N_STEPS = {n_steps}\n")
        (place / "storage.py").write_text("raise RuntimeError('no module of ours')\n")
        made = tuner("create", "mine/slow.py:objective", "--study", name, "--trials", str(N_TRIALS), "--pruner", "none")
        assert made.code == 0, made.stderr
        return "mine/slow.py:objective"

    return create


def test_what_cannot_work_is_refused_before_an_actor_is_made(
    place: Place, tuner: Tuner, a_study: Callable[[str, int], str], tmp_path: Path
) -> None:
    objective = a_study("refused", 1)
    launch = ("launch", "ray", "refused", "--objective", objective)
    found = {
        "no study named 'other'": tuner("launch", "ray", "other", "--objective", objective),
        "needs 4 GPU, and no node of the cluster has more than 1": tuner(*launch, "--gpus-per-worker", "4"),
        "all that a worker needs: 1 cut, 1 GPU, 1 CPU": tuner(
            *launch, "--gpus-per-worker", "1", "--resources", '{"cut": 1}', "--cpus-per-worker", "1"
        ),
        "no Ray cluster answers at 127.0.0.1:9": tuner(*launch, "--address", "127.0.0.1:9"),
        "cannot reach PostgreSQL": tuner(*launch, "--resources", '{"cut": 1}'),
    }
    for told, done in found.items():
        assert told in done.error(), done
        assert place.password not in done.stderr
    assert place.demand() == "[] True"


def test_workers_outlive_a_node_and_go_with_the_study(
    place: Place, tuner: Tuner, a_study: Callable[[str, int], str]
) -> None:
    objective = a_study("cut", 25)
    import time; T0=time.time(); tell=lambda what: print(what, round(time.time()-T0,1))
    launched = tuner(
        *("launch", "ray", "cut", "--objective", objective, "--workers", "5", "--json"),
        *("--gpus-per-worker", "0.5", "--cpus-per-worker", "0.5", "--resources", '{"part": 0.5}'),
    )
    tell("launched")
    assert launched.code == 0, launched.stderr
    print(launched.stdout)

    def running() -> list[Any]:
        return place.rows(
            "SELECT w.placement->>'node' FROM tuner_workers w JOIN studies s USING (study_id) WHERE s.study_name='cut'"
        )
    wait_for(lambda: bool(place.rows("SELECT 1 FROM trial_intermediate_values")), "a report")
    tell("report")
    print(place.rows("SELECT * FROM tuner_workers"))
    print(tuner("status", "cut").stdout); tell('status')
    print(tuner("launch", "status", "cut").stdout); tell('lstatus')
    node = place.nodes.list_all_nodes[1] if hasattr(place.nodes,'list_all_nodes') else None
    place.nodes.remove_node(sorted(place.nodes.worker_nodes, key=lambda n: n.node_id)[0])
    tell("removed")
    place.add()
    tell("added")
    print(tuner("launch", "status", "cut").stdout)
    wait_for(lambda: place.rows("SELECT count(*) FROM trials WHERE state='COMPLETE'")[0][0] >= N_TRIALS, "done", 100)
    tell("done")
    wait_for(lambda: place.demand() == "[] True", "no demand", 30)
    tell("demand gone")
    print(place.rows("SELECT state,count(*) FROM trials group by 1"), place.rows("select outcome, count(*) from tuner_attempts group by 1"))
    tell('end')
    assert 0
