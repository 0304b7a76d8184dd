"""Workers on several machines: a server across a network, over TLS, which loses one of them for a while."""

from __future__ import annotations

import re
import threading
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING

import machines
import optuna
import pytest
from command import Tuner, wait_for
from optuna.trial import TrialState
from sqlalchemy import text

from storage import open_engine, open_storage
from tuner.exits import ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WORKERS = ("a", "b", "c")
N_TRIALS = 40
CUT_OFF_S = 30.0  # leases last for 60
# In steps of 0.2 s, of the first trial on the machine that is cut off. At 94 of 169, a second before the lease is due
# to be renewed, the attempt would be lost: a renewal that failed is tried again only 20 s later.
CUT_OFF_AT_STEP = 5
N_STEPS, N_STEPS_OF_FIRST = 10, CUT_OFF_AT_STEP + 25

# The first trial of each worker takes longer, so that it is in its midst when all workers have one.
STEPPING = f"""
import threading

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    pause = threading.Event()
    for step in range({N_STEPS_OF_FIRST} if trial.number < {len(WORKERS)} else {N_STEPS}):
        pause.wait(0.2)
        trial.report(x, step)
    return x
"""


@pytest.fixture(scope="module")
def network() -> Iterator[machines.Network]:
    """A machine for the server, and one for each worker."""
    if (reason := machines.why_not()) is not None:
        pytest.skip(reason)
    with machines.network(["db", *WORKERS]) as made:
        yield made


@pytest.fixture(scope="module")
def server(network: machines.Network) -> Iterator[machines.Server]:
    """PostgreSQL on the machine `db`."""
    with machines.server_on(network, "db") as started:
        yield started


@pytest.fixture
def tuner_on(network: machines.Network, server: machines.Server, tmp_path: Path) -> Callable[[str], Tuner]:
    """The command line on a machine, with a data directory of its own."""

    def on(machine: str) -> Tuner:
        environment = {
            "TUNER_STORAGE": server.url,
            "TUNER_STORAGE_PASSWORD_FILE": str(server.password_file),
            "TUNER_DATA_DIR": str(tmp_path / machine),
        }
        return Tuner(environment, tmp_path, within=network.within(machine))

    return on


def test_what_lets_nobody_in_is_one_line_that_says_what_to_check(
    server: machines.Server, tuner_on: Callable[[str], Tuner], tmp_path: Path
) -> None:
    other = machines.Authority(tmp_path / "other").certificate
    missing = tmp_path / "missing.pem"
    wrong_password = tmp_path / "wrong"
    wrong_password.touch(0o600)
    wrong_password.write_text("not the password\n")
    refusals = {
        server.url_as(authority=other): f"sslrootcert={other}: .* certificate verify failed; sslrootcert .* authority",
        server.url_as(authority=missing): f'root certificate file "{missing}" does not exist; name the file .*sslrootc',
        server.url_as(host="other.test"): r'for "db.test" does not match .* "other.test"; write the host in the URL as',
        server.url_as(sslmode="disable"): r"no encryption; the server may want TLS: sslmode=verify-full",
    }
    found = [
        (tuner_on("a")("worker", "any", TUNER_STORAGE=url), expected, server.password)
        for url, expected in refusals.items()
    ]
    refused = tuner_on("a")("worker", "any", TUNER_STORAGE_PASSWORD_FILE=str(wrong_password))
    found.append((refused, "password authentication failed .*; check the user name and the password", "not the pass"))
    for done, expected, password in found:
        assert done.code == ExitCode.NOT_LET_IN, done
        assert re.search(expected, done.error()), done
        assert done.stderr.count("\n") == 1
        assert password not in done.stderr
    allowed = tuner_on("a")("studies", "--json")
    assert allowed.code == 0, allowed.stderr


def test_a_machine_that_is_cut_off_for_half_a_lease_costs_no_attempt(
    network: machines.Network, server: machines.Server, tuner_on: Callable[[str], Tuner], tmp_path: Path
) -> None:
    objective = f"{tmp_path / 'stepping.py'}:objective"
    (tmp_path / "stepping.py").write_text(STEPPING)
    made = tuner_on("a")("create", objective, "--trials", str(N_TRIALS), "--sampler", "random", "--pruner", "none")
    assert made.code == 0, made.stderr
    with ExitStack() as stack:
        workers = {
            machine: stack.enter_context(
                tuner_on(machine).start("worker", "stepping", "--objective", objective, "--log-format", "json")
            )
            for machine in WORKERS
        }
        study = optuna.load_study(study_name="stepping", storage=open_storage(server.url_from_here))
        for machine, worker in workers.items():
            wait_for(lambda worker=worker: bool(worker.events("trial_started")), f"a trial on {machine}")
        held = workers["a"].events("trial_started")[0]["trial"]
        wait_for(lambda: len(study.trials[held].intermediate_values) >= CUT_OFF_AT_STEP, "the trial is in its midst")
        with network.cut_off("a"):
            asking = stack.enter_context(tuner_on("a").start("status", "stepping"))
            threading.Event().wait(CUT_OFF_S)
            lost = asking.finish()
        done = {machine: worker.finish() for machine, worker in workers.items()}
    assert (lost.code, "cannot reach PostgreSQL" in lost.error()) == (ExitCode.UNREACHABLE, True)
    assert {machine: finished.code for machine, finished in done.items()} == dict.fromkeys(WORKERS, 0), done
    trials = study.get_trials(deepcopy=False)
    assert [(trial.number, trial.state) for trial in trials] == [(n, TrialState.COMPLETE) for n in range(N_TRIALS)]
    n_long = len(WORKERS)
    steps = [N_STEPS_OF_FIRST] * n_long + [N_STEPS] * (N_TRIALS - n_long)
    assert [len(trial.intermediate_values) for trial in trials] == steps
    assert outcomes(server) == {"complete": N_TRIALS}
    ended = {machine: [event["trial"] for event in worker.events("trial_ended")] for machine, worker in workers.items()}
    assert sorted(number for numbers in ended.values() for number in numbers) == list(range(N_TRIALS))
    assert ended["a"][0] == held


def outcomes(server: machines.Server) -> dict[str, int]:
    """How all attempts ended."""
    engine = open_engine(server.url_from_here)
    with engine.connect() as conn:
        found = Counter(conn.scalars(text("SELECT outcome FROM tuner_attempts")))
    engine.dispose()
    return found
