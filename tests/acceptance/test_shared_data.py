"""Data of slots on the CPU: loaded once and in memory once, or by each slot where no other way is safe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command import Tuner, wait_for
from optuna.trial import TrialState

from storage import open_storage

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

OBJECTIVE = """
import os, sys, threading
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from tuner import Objective
from tuner.data import Data, Split

HERE = Path(__file__).parent
N_ROWS, N_WIDE = 64, 1 << 16


def kilobytes_of_own(tensor):
    # Of the memory that holds the tensor, what no other process has as well.
    place, own = tensor.data_ptr(), 0
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, end = (int(each, 16) for each in first.split("-"))
            is_there = start <= place < end
        elif is_there and first in ("Private_Clean:", "Private_Dirty:"):
            own += int(rest.split()[0])
    return own


KEPT = {}


class Mine(Objective):
    epochs: ClassVar = 1

    def suggest(self, trial):
        return {"lr": trial.suggest_float("lr", 0.01, 0.1)}

    def load_data(self, root):
        with (HERE / "loads").open("a") as file:
            file.write(f"{os.getpid()}\\n")
        DO
        KEPT["inputs"] = torch.arange(N_ROWS * N_WIDE, dtype=torch.float32).reshape(N_ROWS, N_WIDE).remainder(97)
        targets = torch.arange(N_ROWS) % 2
        parts = [Split(KEPT["inputs"][rows], targets[rows]) for rows in (slice(0, 48), slice(48, 56), slice(56, 64))]
        return Data(*parts, class_names=("even", "odd"))

    def build_model(self, params):
        with (HERE / "own").open("a") as file:
            file.write(f"{os.getpid()} {kilobytes_of_own(KEPT['inputs'])} {torch.get_num_threads()}\\n")
        return nn.Linear(N_WIDE, 2)
"""
KB = 64 * (1 << 16) * 4 // 1024


def create(tuner: Tuner, does: str = "pass", trials: int = 6) -> tuple[str, ...]:
    """Create a study whose objective does something more as it loads its data; return the worker command for it."""
    (tuner.directory / "mine.py").write_text(OBJECTIVE.replace("DO", does))
    arguments = ("mine.py:Mine", "--study", "s", "--trials", str(trials), "--pruner", "none")
    done = tuner("create", *arguments)
    assert done.code == 0, done.stderr
    return ("worker", "s", "--objective", "mine.py:Mine", "--no-preflight", "--log-format", "json", "--slots", "cpu*3")


def lines_of(tuner: Tuner, name: str) -> list[list[str]]:
    """The words of each line that the objective has written."""
    path = tuner.directory / name
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def trials_of(database: str) -> list[FrozenTrial]:
    storage = open_storage(database)
    return storage.get_all_trials(storage.get_study_id_from_name("s"))


def test_slots_on_the_cpu_load_the_data_once_and_share_their_memory(tuner: Tuner, database: str) -> None:
    worker = create(tuner)
    done = tuner(*worker, "--threads", "2")
    assert done.code == 0, done.stderr
    assert [trial.state for trial in trials_of(database)] == [TrialState.COMPLETE] * 6
    assert len(lines_of(tuner, "loads")) == 1
    own = lines_of(tuner, "own")
    assert {pid for pid, *_ in own}.isdisjoint(pid for (pid,) in lines_of(tuner, "loads"))
    assert max(int(kilobytes) for _, kilobytes, _ in own) < KB / 10
    assert {n_threads for *_, n_threads in own} == {"2"}


def test_one_slot_loads_its_data_itself(tuner: Tuner) -> None:
    worker = create(tuner, trials=1)
    assert tuner(*worker[:-1], "cpu*1").code == 0
    assert [pid for (pid,) in lines_of(tuner, "loads")] == [pid for pid, *_ in lines_of(tuner, "own")]


def test_data_that_are_mapped_from_a_file_are_shared_as_well(tuner: Tuner, database: str) -> None:
    (tuner.directory / "numbers").write_bytes(bytes(4096))
    twice = "import numpy; KEPT['maps'] = [numpy.memmap(HERE / 'numbers', 'float32', 'r') for _ in range(2)]"
    done = tuner(*create(tuner, twice))
    assert done.code == 0, done.stderr
    assert [trial.state for trial in trials_of(database)] == [TrialState.COMPLETE] * 6
    assert len(lines_of(tuner, "loads")) == 1


@pytest.mark.parametrize(
    ("does", "why"),
    [
        (
            "threading.Thread(target=threading.Event().wait, daemon=True, name='own').start()",
            "loading them starts threads",
        ),
        ("KEPT['file'] = open(__file__)", "they keep files open, in which processes would share a place"),
        (
            "from mmap import mmap; KEPT['f'] = f = open(__file__, 'rb'); KEPT['map'] = mmap(f.fileno(), 0, prot=1)",
            "they keep files open, in which processes would share a place",
        ),
        (
            "import numpy; KEPT['map'] = numpy.memmap(HERE / 'numbers', 'float32', 'w+', shape=(8,))",
            "they keep files open, in which processes would share a place",
        ),
    ],
)
def test_data_that_no_fork_takes_along_are_loaded_by_each_slot(
    tuner: Tuner, database: str, does: str, why: str
) -> None:
    worker = create(tuner, does)
    with tuner.start(*worker) as running:
        done = running.finish()
    assert done.code == 0, done.stderr
    notes = [event["message"] for event in running.events("note") if "itself" in event["message"]]
    assert len(notes) == 1, done.stderr
    assert notes[0].startswith("each slot loads the data of mine.py:Mine itself: ")
    assert why in notes[0]
    assert [trial.state for trial in trials_of(database)] == [TrialState.COMPLETE] * 6
    loaded = {pid for (pid,) in lines_of(tuner, "loads")}
    assert {pid for pid, *_ in lines_of(tuner, "own")} < loaded


@pytest.mark.parametrize("ends", ["os._exit(3)", "os.kill(os.getpid(), 9)", "raise OSError('no such mirror')"])
def test_a_process_that_ends_as_it_loads_for_all_leaves_it_to_each(tuner: Tuner, database: str, ends: str) -> None:
    worker = create(tuner, f"if len((HERE / 'loads').read_text().split()) == 1: {ends}")
    done = tuner(*worker)
    assert done.code == 0, done.stderr
    assert [trial.state for trial in trials_of(database)] == [TrialState.COMPLETE] * 6
    loaded = [pid for (pid,) in lines_of(tuner, "loads")]
    assert {pid for pid, *_ in lines_of(tuner, "own")} <= set(loaded[1:])


def test_an_objective_that_no_fork_takes_along_is_told_of_as_ever(tuner: Tuner) -> None:
    worker = create(tuner, trials=1)
    file = tuner.directory / "mine.py"
    file.write_text(file.read_text() + "\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n")
    with tuner.start(*worker, "--allow-code-change") as running:
        done = running.finish()
    assert done.code == 0, done.stderr
    (note,) = (event["message"] for event in running.events("note") if "itself" in event["message"])
    assert note.startswith("each slot imports mine.py:Mine itself: importing it starts the thread")


def test_data_that_cannot_be_loaded_are_told_as_ever(tuner: Tuner) -> None:
    worker = create(tuner, "raise OSError('no such mirror')")
    done = tuner(*worker)
    told = json.loads(done.stderr.splitlines()[-1])
    assert (done.code, told["event"]) == (1, "failed")
    assert "Mine.load_data(" in told["message"]
    assert "no such mirror (" in told["message"]


def test_what_is_printed_as_they_load_is_told_once_and_is_no_event(tuner: Tuner) -> None:
    worker = create(tuner, "print('half of it is here')", trials=3)
    with tuner.start(*worker) as running:
        done = running.finish()
    assert done.code == 0, done.stderr
    assert done.stderr.count("half of it is here") == 1


@pytest.mark.parametrize("signals", [1, 2])
def test_a_worker_ends_in_time_though_its_data_never_come(tuner: Tuner, database: str, signals: int) -> None:
    worker = create(tuner, "threading.Event().wait()")
    with tuner.start(*worker) as running:
        wait_for(lambda: bool(lines_of(tuner, "loads")), "they are being loaded", 120)
        for _ in range(signals):
            running.process.terminate()
            wait_for(lambda: bool(running.events("stopping")), "it stops")
        assert running.finish().code == 143
    for (pid,) in lines_of(tuner, "loads"):
        assert_ended(pid)
    assert {trial.state for trial in trials_of(database)} <= {TrialState.WAITING}


def test_whoever_loads_for_a_worker_that_was_killed_ends(tuner: Tuner) -> None:
    worker = create(tuner, "threading.Event().wait()")
    with tuner.start(*worker) as running:
        wait_for(lambda: bool(lines_of(tuner, "loads")), "they are being loaded", 120)
        running.process.kill()
        running.finish()
    ((pid,),) = lines_of(tuner, "loads")
    assert_ended(pid)


def assert_ended(pid: Any) -> None:
    """Fail unless a process ends."""
    status = Path("/proc", pid, "status")
    wait_for(lambda: not status.exists() or "State:\tZ" in status.read_text(), "it has ended")
