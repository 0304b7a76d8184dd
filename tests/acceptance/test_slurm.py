"""`tuner launch` under a real SLURM of two nodes: what its users and its administrators do to jobs, and its limits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm
from command import Tuner, wait_for
from gate import Gate
from slurm import Cluster
from sqlalchemy import Engine, text

from storage import open_engine

WHY_NOT = slurm.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

STUDY = "odd/näme (1)"
PASSWORD = "correct horse battery"
# Trains 20 batches an epoch, and from the second on slowly until the file `gate` is beside it.
OBJECTIVE = """
import threading
from pathlib import Path

import torch
from torch import nn

from tuner.data import Data, Split
from tuner.objective import Objective

GATE = Path(__file__).with_name("gate")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("n_batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.n_batches += 1
            if self.n_batches > 2000 and not GATE.exists():  # for some minutes in all, unless it is told to stop
                threading.Event().wait(0.2)
        return self.layer(x)


class Trains(Objective):
    epochs = 2

    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)

    def load_data(self, root):
        drawn = [torch.randn(4000, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        return Data(*(Split(x, (x[:, 0] > 0).long()) for x in drawn), class_names=("a", "b"))

    def build_model(self, params):
        return Model()

    def batch_size(self, params):
        return 2
"""


def soon(what: str, condition: Callable[[], bool]) -> None:
    """Wait for what takes seconds, or minutes where other tests run at the same time."""
    wait_for(condition, what, 200)


class Team:
    """A database and a cluster that reaches it, and the command line on both."""

    def __init__(self, cluster: Cluster, url: str, place: Path) -> None:
        self.cluster = cluster
        self.url = url
        self.place = place
        password = place / "password"
        password.touch(0o600)
        password.write_text(PASSWORD)
        environment = {
            "TUNER_STORAGE": url,
            "TUNER_STORAGE_PASSWORD_FILE": str(password),
            "TUNER_DATA_DIR": str(place / "data"),
            "TUNER_LAUNCH_SLURM_LOGS": str(place / "logs of tasks"),
            **cluster.environment,
        }
        self.tuner = Tuner(environment, place)
        self._engine: Engine = open_engine(url)

    def close(self) -> None:
        self._engine.dispose()

    def study(self, name: str, trials: int) -> Path:
        """Create a study, and return the file of its objective."""
        folder = self.place / re.sub(r"\W", "-", name)
        folder.mkdir()
        path = folder / "mine.py"
        path.write_text(OBJECTIVE)
        created = self.tuner("create", f"{path}:Trains", "--study", name, "--trials", str(trials), "--pruner", "none")
        assert created.code == 0, created.stderr
        return path

    def launch(self, study: str, path: Path, *options: str, **environment: str) -> str:
        """Launch workers of a study, and return the id of their job."""
        arguments = ("launch", "slurm", study, "--objective", f"{path}:Trains", "--json", *options)
        done = self.tuner(*arguments, **environment)
        assert done.code == 0, done.stderr
        job: str = done.json()["job"]
        return job

    def log(self, job: str, task: int = 0) -> str:
        """What a task has written."""
        [path] = (self.place / "logs of tasks").glob(f"*-{job}_{task}.log")
        return path.read_text()

    def query(self, statement: str, **values: Any) -> list[tuple[Any, ...]]:
        with self._engine.connect() as conn:
            return [tuple(row) for row in conn.execute(text(statement), values)]

    def running(self, study: str) -> dict[int, str]:
        """The task of SLURM's that runs each trial of a study which has told of an epoch, as JOB_TASK."""
        rows = self.query(
            "select number, placement->>'job', placement->>'task' from trials join studies using (study_id)"
            " join tuner_leases using (trial_id) join tuner_workers on tuner_workers.name = tuner_leases.worker"
            " where study_name = :study and state = 'RUNNING'"
            " and exists (select from trial_intermediate_values its where its.trial_id = trials.trial_id)",
            study=study,
        )
        return {number: f"{job}_{task}" for number, job, task in rows}

    def attempts(self, study: str) -> dict[int, list[str]]:
        """How each attempt at each trial of a study ended, in their order."""
        rows = self.query(
            "select number, outcome from tuner_attempts join trials using (trial_id) join studies using (study_id)"
            " where study_name = :study order by tuner_attempts.started_at",
            study=study,
        )
        found: dict[int, list[str]] = {}
        for number, outcome in rows:
            found.setdefault(number, []).append(outcome)
        return found


@pytest.fixture(scope="module")
def team(module_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    gate = Gate(module_database, slurm.address())
    try:
        with slurm.cluster() as cluster:
            team = Team(cluster, gate.url.render_as_string(False), tmp_path_factory.mktemp("team"))
            try:
                yield team
            finally:
                team.close()
    finally:
        gate.close()


@pytest.fixture(scope="module")
def limited(team: Team) -> tuple[Path, str]:
    """The objective and the job of a study whose worker has a time limit, launched before all else."""
    path = team.study("limited", 1)
    return path, team.launch("limited", path, "--time", "10m", "--no-check")


@pytest.mark.usefixtures("limited")
def test_a_search_goes_through_all_that_befalls_its_tasks(team: Team) -> None:
    cluster = team.cluster
    path = team.study(STUDY, 3)
    tell = 'echo "PGPASSWORD: ${PGPASSWORD-none}, GPU: $CUDA_VISIBLE_DEVICES"'
    options = ("--nodes", "2", "--gpus-per-node", "1", "--setup", tell)
    job = team.launch(STUDY, path, *options, PGPASSWORD=PASSWORD)
    soon("both tasks run a trial", lambda: set(team.running(STUDY).values()) == {f"{job}_0", f"{job}_1"})

    # What is told of them, and what is not.
    [first], [second] = ([n for n, its in team.running(STUDY).items() if its == f"{job}_{task}"] for task in "01")
    workers = team.tuner("status", STUDY, "--json").json()["workers"]
    assert {worker["placed_by"]["state"] for worker in workers} == {"RUNNING"}
    assert {worker["placed_by"]["task"]: worker["placed_by"]["node"] for worker in workers}.keys() == {"0", "1"}
    jobs = team.tuner("launch", "status", STUDY, "--json").json()
    assert [(each["id"], each["state"], each["running"]) for each in jobs] == [
        (f"{job}_0", "RUNNING", 1),
        (f"{job}_1", "RUNNING", 1),
    ]
    shown = cluster("scontrol", "show", "job", job) + cluster("scontrol", "write", "batch_script", job, "-")
    assert "tuner-odd-n-me-1-" in shown
    assert PASSWORD not in shown
    assert "PGPASSWORD: none, GPU: 0\n" in team.log(job)

    # A task that is cancelled gives its trial back; one that is launched later goes on with it.
    cluster("scancel", f"{job}_1")
    soon("the trial of the cancelled task is given back", lambda: team.attempts(STUDY)[second] == ["released"])
    more = team.launch(STUDY, path, "--no-check")
    soon("it goes on elsewhere", lambda: team.running(STUDY).get(second) == f"{more}_0")
    assert f"trial {second}: resumed after epoch" in team.log(more)

    # A node is drained, and what SLURM sends before a time limit makes its task come again, on the other node.
    [node] = [its["placed_by"]["node"] for its in workers if its["placed_by"]["task"] == "0"]
    cluster("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    cluster("scancel", "--batch", "--signal=USR1", f"{job}_0")
    soon("it goes on after its task came again", lambda: len(team.attempts(STUDY)[first]) == 2)
    assert cluster("squeue", "--noheader", f"--jobs={job}_0", "--format=%N").strip() == {"n0": "n1", "n1": "n0"}[node]
    cluster("scontrol", "update", f"nodename={node}", "state=resume")

    # So does an administrator's requeue. What waits when the study is done does not come again.
    cluster("scontrol", "requeue", f"{more}_0")
    soon("its trial is given back again", lambda: team.attempts(STUDY)[second][:2] == ["released", "released"])
    path.with_name("gate").touch()
    soon("the study ends all tasks", lambda: not cluster("squeue", "--noheader", f"--jobs={job},{more}"))
    assert [its[-1] for its in team.attempts(STUDY).values()] == ["complete"] * 3
    assert team.query("select count(*) from trials join studies using (study_id) where study_name = :s", s=STUDY) == [
        (3,)
    ]


def test_a_time_limit_gives_the_trial_back_and_the_task_comes_again(team: Team, limited: tuple[Path, str]) -> None:
    path, job = limited
    soon("it runs a trial", lambda: team.running("limited") == {0: f"{job}_0"})
    # As if its limit had been so near: SLURM looks every half a minute.
    minutes = int(team.cluster("squeue", "--noheader", f"--jobs={job}_0", "--format=%M").strip().split(":")[-2])
    team.cluster("scontrol", "update", f"jobid={job}_0", f"timelimit={minutes + 2}")
    soon("it gives its trial back", lambda: "released" in team.attempts("limited").get(0, []))
    path.with_name("gate").touch()
    soon("the study ends its task", lambda: team.cluster.states(job) == {"0": "COMPLETED"})
    assert team.attempts("limited").keys() == {0}
    assert team.attempts("limited")[0][-1] == "complete"
    assert team.log(job).count("joined study limited") >= 2
    done = team.tuner("launch", "slurm", "limited", "--objective", f"{path}:Trains")
    assert "study 'limited' has nothing for workers to run: the budget of 1 trials is used up" in done.error()


def test_workers_that_wait_are_told_of_and_ended(team: Team) -> None:
    path = team.study("waits", 1)
    job = team.launch("waits", path, "--nodes", "3", "--sbatch", "--begin=now+1hour", "--no-check")
    again = team.tuner("launch", "slurm", "waits", "--objective", f"{path}:Trains", "--sbatch=--hold", "--no-check")
    assert "1 worker of study waits, beside 3 that run or wait\n" in again.stdout
    shown = team.tuner("launch", "status", "waits").stdout.splitlines()
    assert shown[0].split() == ["engine", "job", "state", "workers", "detail"]
    assert shown[1].split() == ["slurm", f"{job}_[0-2]", "PENDING", "0/3", "BeginTime"]
    assert team.tuner("launch", "stop", "waits").stdout.startswith(f"ended slurm {job}_[0-2]: 3 workers, PENDING\n")
    assert not team.cluster("squeue", "--noheader", f"--jobs={job}")
    assert [its["wanted"] for its in team.tuner("launch", "status", "waits", "--json").json()] == [0, 0]


REFUSED = {
    ("--gpus-per-node", "3"): (2, "--gpus-per-node 3 is more than any node of partition debug has: 2"),
    ("--cpus-per-node", "64"): (2, "--cpus-per-node 64 is more than any node of partition debug has: 2"),
    ("--partition", "nosuch"): (2, "SLURM has no partition 'nosuch'; there are: debug, short"),
    ("--partition", "short", "--time", "1h"): (2, "--time 60m is more than partition short allows: 5m"),
    ("--account", "x", "--sbatch", "--nosuch=1", "--no-check"): (1, "sbatch failed: .*nosuch"),
    ("--sbatch", "high"): (2, "--sbatch needs options of sbatch in one line, as .*, got 'high'"),
    ("--container", "image.sqsh"): (1, "nothing here runs the image image.sqsh: .* without --container"),
    # What a node finds, and this machine does not.
    ("--setup", "PATH=/usr/bin:/bin"): (1, r"node n\d finds no tuner in /.*; .* --setup 'source"),
    ("--setup", "mv {objective} {objective}.away"): (1, r"node n\d: no file .*mine.py"),
    ("--setup", "export TUNER_STORAGE=postgresql://tuner@127.0.0.9:9/x"): (3, r"node n\d: cannot reach PostgreSQL at"),
}


@pytest.mark.parametrize("options", REFUSED, ids=" ".join)
def test_what_cannot_work_is_refused_before_anything_is_submitted(team: Team, options: tuple[str, ...]) -> None:
    if not (path := team.place / "refused" / "mine.py").parent.exists():
        team.study("refused", 1)
    path.write_text(OBJECTIVE)
    given = [option.format(objective=path) for option in options]
    done = team.tuner("launch", "slurm", "refused", "--objective", f"{path}:Trains", *given)
    code, error = REFUSED[options]
    assert re.search(error, done.error()), done.error()
    assert done.code == code
    assert team.tuner("launch", "status", "refused", "--json").json() == []
