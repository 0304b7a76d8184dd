"""A worker's slots: how many, how long, what they share, and devices that fail."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from command import Tuner, wait_for
from optuna.trial import TrialState
from sqlalchemy import text

from storage import open_engine, open_storage, parse_url
from tuner import cores

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

OBJECTIVES = """
import os, threading
from pathlib import Path

import torch

from tuner import cores

HERE = Path(__file__).parent
pause = threading.Event()

def environment(trial):
    trial.set_user_attr("visible", os.environ["CUDA_VISIBLE_DEVICES"])
    trial.set_user_attr("threads", torch.get_num_threads())
    pause.wait(0.3)
    return 1.0

def waits_for_all_cores(trial):
    for step in range(900):
        if torch.get_num_threads() == cores.count():
            break
        pause.wait(0.1)
        trial.report(1.0, step)
    return 1.0

def short(trial):
    pause.wait(0.2)
    return 1.0

def needs_much_memory(trial):
    mark = HERE / f"running-{os.getpid()}"
    mark.touch()
    try:
        for step in range(1, 11):
            pause.wait(0.1)
            if trial.number == 1 and len(list(HERE.glob("running-*"))) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
            trial.report(step, step)
    finally:
        mark.unlink()
    return 1.0

def device_fails(trial):
    with (HERE / "attempts").open("a") as file:
        file.write(f"{trial.number} {os.getpid()}\\n")
    raise RuntimeError("CUDA error: unspecified launch failure")

def hears_nothing(trial):
    (HERE / "deaf").touch()
    pause.wait(600)
    return 1.0

def takes_its_device_along_late(trial):
    (HERE / f"runs-{os.getpid()}").touch()
    if trial.number == 0 and len(list(HERE.glob("runs-*"))) == 1:
        while not (HERE / "gate").exists():
            pause.wait(0.05)
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")
    return 1.0

class Pinned:
    def __del__(self):  # as torch does where the device is needed to free memory
        os.abort()

def takes_its_device_along(trial):
    trial.set_user_attr("pid", os.getpid())
    if trial.number == 0:
        pinned = Pinned()
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")
    return 1.0
"""


def create(tuner: Tuner, name: str, trials: int, *options: str) -> tuple[str, ...]:
    """Create the study and return the worker command for it."""
    path = tuner.directory / "mine.py"
    path.write_text(OBJECTIVES)
    arguments = (f"{path}:{name}", "--study", "s", "--trials", str(trials), "--pruner", "none", *options)
    assert tuner("create", *arguments).code == 0
    return ("worker", "s", "--objective", f"{path}:{name}", "--log-format", "json")


def trials_of(database: str) -> list[FrozenTrial]:
    storage = open_storage(database)
    return storage.get_all_trials(storage.get_study_id_from_name("s"))


def query(database: str, statement: str) -> list[tuple[object, ...]]:
    engine = open_engine(database)
    with engine.connect() as conn:
        rows = [tuple(row) for row in conn.execute(text(statement))]
    engine.dispose()
    return rows


def test_cpu_slots_see_no_gpu_and_say_where_they_ran(tuner: Tuner, database: str) -> None:
    worker = create(tuner, "environment", 4)
    with tuner.start(*worker, "--slots", "cpu*2") as running:
        done = running.finish()
    assert done.code == 0, done.stderr
    assert [event["device"] for event in running.events("ready")] == ["cpu", "cpu"]
    assert {trial.user_attrs["visible"] for trial in trials_of(database)} == {""}
    # One slot may have run them all by the time that the other was ready.
    attempts = set(query(database, "select distinct slot, device, share from tuner_attempts"))
    assert attempts
    assert attempts <= {(0, "cpu", 0.5), (1, "cpu", 0.5)}
    ((name, slots, ended),) = query(database, "select name, slots, ended_at is not null from tuner_workers")
    assert (len(slots), ended) == (2, True)
    assert {event["worker"] for event in running.events("ready")} == {name}


def test_threads_are_as_many_as_openmp_s_variable_says(tuner: Tuner, database: str) -> None:
    worker = create(tuner, "short", 1)
    assert tuner(*worker, "--device", "cpu", OMP_NUM_THREADS="1").code == 0
    (trial,) = trials_of(database)
    assert trial.user_attrs["threads"] == 1


@pytest.mark.skipif(cores.count() < 2, reason="a slot has one core, whatever the others do")
def test_the_last_trial_has_the_cores_of_slots_that_have_none(tuner: Tuner, database: str, tmp_path: Path) -> None:
    worker = create(tuner, "waits_for_all_cores", 1)
    (tmp_path / "tmp").mkdir()  # where other tests' workers are not seen, and share no cores
    done = tuner(*worker, "--slots", f"cpu*{cores.count()}", TMPDIR=str(tmp_path / "tmp"))
    assert done.code == 0, done.stderr
    (trial,) = trials_of(database)
    assert trial.user_attrs["threads"] == cores.count()


def test_every_line_tells_worker_slot_study_trial_attempt_and_epoch(tuner: Tuner) -> None:
    worker = create(tuner, "needs_much_memory", 1)
    with tuner.start(*worker) as running:
        assert running.finish().code == 0
    assert [event["epoch"] for event in running.events("report")] == list(range(1, 11))
    reported = running.events("report")[0]
    assert (reported["slot"], reported["study"], reported["trial"], reported["attempt"]) == (0, "s", 0, 1)
    keys = {"time", "event", "worker", "study", "slot", "trial", "attempt", "epoch", "message"}
    for name in ("study", "ready", "trial_started", "report", "trial_ended", "progress", "done"):
        for event in running.events(name):
            assert event.keys() >= keys, event


def test_a_workers_trials_are_exact_whichever_slot_runs_them(tuner: Tuner, database: str) -> None:
    worker = create(tuner, "short", 20)
    done = tuner(*worker, "--slots", "2", "--trials", "5")
    assert done.code == 0, done.stderr
    assert "this worker ran its 5 trials" in done.stderr
    assert [trial.state for trial in trials_of(database)] == [TrialState.COMPLETE] * 5


def test_a_worker_claims_no_trial_after_its_time(tuner: Tuner, database: str) -> None:
    worker = create(tuner, "short", 10_000)
    start = time.monotonic()
    done = tuner(*worker, "--timeout", "8s")
    assert done.code == 0, done.stderr
    assert "this worker's time of 8 s is over" in done.stderr
    assert time.monotonic() - start < 40
    assert {trial.state for trial in trials_of(database)} <= {TrialState.COMPLETE}  # none at all on a busy machine


def test_a_worker_without_a_trial_to_claim_ends_by_itself_if_told_to(tuner: Tuner) -> None:
    worker = create(tuner, "short", 3)
    assert tuner("pause", "s").code == 0
    with tuner.start(*worker) as waiting, tuner.start(*worker, "--idle-exit", "2s") as leaving:
        done = leaving.finish()
        assert done.code == 0, done.stderr
        assert "no trial to claim for 2 s" in done.stderr
        assert waiting.process.poll() is None
        assert tuner("resume", "s").code == 0
        assert waiting.finish().code == 0


def test_times_and_counts_that_are_none_are_refused(tuner: Tuner) -> None:
    worker = create(tuner, "short", 3)
    for option, value in (("--timeout", "soon"), ("--idle-exit", "0"), ("--trials", "0"), ("--slots", "gpu")):
        done = tuner(*worker[:4], option, value)
        assert done.code == 2, done.stderr
        assert f"tuner: {option} needs" in done.error()


def test_a_trial_that_ran_out_of_memory_on_a_shared_device_runs_again_alone(tuner: Tuner, database: str) -> None:
    worker = create(tuner, "needs_much_memory", 4)
    with tuner.start(*worker, "--slots", "cpu*2") as running:
        done = running.finish()
    assert done.code == 0, done.stderr
    assert [event["trial"] for event in running.events("out_of_memory")] == [1]
    trials = trials_of(database)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    assert trials[1].intermediate_values == {step: float(step) for step in range(1, 11)}
    ((attempts,),) = query(
        database, "select count(*) from tuner_attempts join trials using (trial_id) where number = 1"
    )
    assert attempts == 1


def test_out_of_memory_on_a_device_of_its_own_fails_the_trial(tuner: Tuner, database: str) -> None:
    path = tuner.directory / "mine.py"
    worker = create(tuner, "needs_much_memory", 2)
    path.write_text(
        OBJECTIVES.replace('trial.number == 1 and len(list(HERE.glob("running-*"))) > 1', "trial.number == 0")
    )
    done = tuner(*worker, "--allow-code-change")
    assert done.code == 0, done.stderr
    failed, *others = trials_of(database)
    assert (failed.state, failed.user_attrs["failure"]) == (TrialState.FAIL, "oom")
    assert [trial.state for trial in others] == [TrialState.COMPLETE] * 2


def test_a_device_that_fails_pauses_its_slot_and_leaves_the_budget_alone(tuner: Tuner, database: str) -> None:
    worker = create(tuner, "device_fails", 30, "--max-failures", "30")
    with tuner.start(*worker) as running:
        wait_for(lambda: bool(running.events("slot_broken")), "the slot is paused", 120)
        (broken,) = running.events("slot_broken")
        assert "CUDA error: unspecified launch failure" in broken["message"]
        assert "pausing it for 60 s" in broken["message"]
        states = [trial.state for trial in trials_of(database)]
        assert states.count(TrialState.FAIL) <= 1
        assert not {TrialState.COMPLETE, TrialState.PRUNED} & set(states)
        wait_for(lambda: "broken" in str(query(database, "select slots from tuner_workers")), "others see that it is")
        running.process.terminate()
        assert running.finish().code == 143
    attempts = [line.split() for line in (tuner.directory / "attempts").read_text().splitlines()]
    assert len({pid for _, pid in attempts}) == len(attempts)  # each in a process of its own
    assert {trial.state for trial in trials_of(database)} <= {TrialState.WAITING, TrialState.FAIL}
    assert query(database, "select distinct outcome from tuner_attempts") == [("lost",)]


def test_a_trial_that_takes_its_device_along_fails_and_the_slot_goes_on_in_a_new_process(
    tuner: Tuner, database: str
) -> None:
    worker = create(tuner, "takes_its_device_along", 2)
    done = tuner(*worker)
    assert done.code == 0, done.stderr
    first, *others = trials_of(database)
    assert (first.state, first.user_attrs["failure"]) == (TrialState.FAIL, "user_error")
    assert [trial.state for trial in others] == [TrialState.COMPLETE] * 2
    assert first.user_attrs["pid"] != others[0].user_attrs["pid"] == others[1].user_attrs["pid"]


def test_a_worker_waits_for_a_connection_of_a_full_server(tuner: Tuner, database: str) -> None:
    worker = create(tuner, "short", 2)
    limit = f'ALTER DATABASE "{parse_url(database).database}" CONNECTION LIMIT'
    engine = open_engine(database)
    with engine.connect() as conn:
        conn.execution_options(isolation_level="AUTOCOMMIT").execute(text(f"{limit} 1"))
        with tuner.start(*worker) as running:
            running.wait_for_line("too many connections for database")
            (told,) = running.events("database_away")
            assert "raise max_connections above 2 x processes, or start fewer; trying again" in told["message"]
            conn.execute(text(f"{limit} -1"))
            assert running.finish().code == 0
    engine.dispose()
    assert [trial.state for trial in trials_of(database)] == [TrialState.COMPLETE] * 2


@pytest.mark.parametrize("signals", [1, 2])
def test_a_worker_ends_in_time_though_its_trial_hears_nothing(tuner: Tuner, database: str, signals: int) -> None:
    worker = create(tuner, "hears_nothing", 1)
    with tuner.start(*worker) as running:
        wait_for((tuner.directory / "deaf").exists, "the trial runs", 120)
        start = time.monotonic()
        for _ in range(signals):
            running.process.terminate()
            wait_for(lambda: bool(running.events("stopping")), "it stops")
        assert running.finish().code == 143
        assert time.monotonic() - start < (13 if signals == 1 else 5)  # a second or more of it is Python's own end
    (trial,) = trials_of(database)
    assert trial.state == TrialState.WAITING
    assert query(database, "select attempts, token from tuner_leases") == [(0, None)]


def test_workers_in_different_time_zones_take_no_trial_from_each_other(tuner: Tuner, database: str) -> None:
    worker = create(tuner, "needs_much_memory", 6)
    with (
        tuner.start(*worker, TZ="Pacific/Auckland") as east,
        tuner.start(*worker, TZ="America/Los_Angeles") as west,
    ):
        done = [running.finish() for running in (east, west)]
    assert [finished.code for finished in done] == [0, 0], done
    outcomes = query(database, "select outcome, count(*) from tuner_attempts group by 1 order by 1")
    assert outcomes in ([("complete", 6)], [("complete", 6), ("fail", 1)])  # out of memory beside the other worker's
    assert {abs(trial.duration.total_seconds()) < 60 for trial in trials_of(database) if trial.duration} == {True}


def test_a_process_whose_device_is_lost_ends_whatever_became_of_its_trial(tuner: Tuner, database: str) -> None:
    worker = create(tuner, "takes_its_device_along_late", 1)
    with tuner.start(*worker) as running:
        wait_for(lambda: len(list(tuner.directory.glob("runs-*"))) == 1, "the trial runs")
        assert tuner("release", "s", "0").code == 0
        (tuner.directory / "gate").touch()
        done = running.finish()
    assert done.code == 0, done.stderr
    assert len(list(tuner.directory.glob("runs-*"))) == 2  # each of a process of its own
    assert [trial.state for trial in trials_of(database)] == [TrialState.COMPLETE]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device that torch can use")
def test_slots_that_nobody_named_take_another_device_where_torch_cannot_use_the_gpu(
    tuner: Tuner, database: str, tmp_path: Path
) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-7f)'\n")
    smi.chmod(0o755)
    worker = create(tuner, "short", 1)
    with tuner.start(*worker, PATH=f"{smi.parent}:{os.environ['PATH']}") as running:
        done = running.finish()
    assert done.code == 0, done.stderr
    assert [event["device"] for event in running.events("ready")] == ["cpu"]
    (note,) = running.events("note")
    assert note["message"].startswith("torch cannot use cuda:0, which this machine has, and takes cpu instead")
    assert query(database, "select device from tuner_attempts") == [("cpu",)]
