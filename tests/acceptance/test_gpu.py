"""Slots that share a CUDA device, as processes: memory that runs out, and memory of one that was killed."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import pytest
import torch
from command import Tuner, wait_for

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.cuda

# Takes three fifths of the device's memory, and keeps it until its neighbour has tried to take as much.
GREEDY = """
import os, threading
from pathlib import Path

import torch

TRIED = Path(__file__).with_name("tried")

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        taken = torch.empty(int(total * 0.6), dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        TRIED.touch()
        raise
    trial.set_user_attr("pid", os.getpid())
    trial.report(x, 1)
    pause = threading.Event()
    for _ in range(3000):
        if TRIED.exists():
            return x + float(taken[:1].sum()) * 0
        pause.wait(0.01)
        trial.report(x, 1)
    return x
"""


# Trains well for an epoch, and then asks for a class that there is not.
OUT_OF_RANGE = """
from torch import nn

from objectives.digits import Digits


class Mine(Digits):
    def build_loss(self, params, train):
        calls = []

        def loss(outputs, targets):
            calls.append(1)
            return nn.functional.cross_entropy(outputs, targets + 100 * (len(calls) > 40))

        return loss

    def batch_size(self, params):
        return 32
"""


@pytest.fixture
def greedy(tmp_path: Path) -> Path:
    path = tmp_path / "greedy.py"
    path.write_text(GREEDY)
    return path


def test_a_trial_that_ran_out_of_memory_beside_another_runs_again_alone(tuner: Tuner, greedy: Path) -> None:
    assert tuner("create", f"{greedy}:objective", "--trials", "4", "--pruner", "none").code == 0
    arguments = ["--slots", "cuda:0*2", "--objective", f"{greedy}:objective", "--log-format", "json"]
    with tuner.start("worker", "greedy", *arguments) as worker:
        finished = worker.finish()
        assert finished.code == 0, finished.stderr
        assert worker.events("out_of_memory")
        ended = worker.events("trial_ended")
    assert [event["state"] for event in ended] == ["COMPLETE"] * 4


def test_the_memory_of_a_slot_that_was_killed_is_free_for_the_next(tuner: Tuner, greedy: Path) -> None:
    assert tuner("create", f"{greedy}:objective", "--trials", "1", "--pruner", "none").code == 0
    arguments = ["--slots", "cuda:0", "--objective", f"{greedy}:objective", "--log-format", "json"]
    before = torch.cuda.mem_get_info(0)[0]
    taken = torch.cuda.get_device_properties(0).total_memory * 0.55
    with tuner.start("worker", "greedy", *arguments) as worker:
        wait_for(lambda: bool(worker.events("report")), "the trial has its memory")
        assert before - torch.cuda.mem_get_info(0)[0] > taken
        (slot,) = [
            int(pid)
            for pid in os.listdir("/proc")
            if pid.isdigit() and int(pid) != os.getpid() and is_slot_of(int(pid), worker.process.pid)
        ]
        os.kill(slot, signal.SIGKILL)
        (greedy.with_name("tried")).touch()
        finished = worker.finish()
        assert finished.code == 0, finished.stderr
        (ended,) = worker.events("trial_ended")
    assert ended["state"] == "COMPLETE"
    assert ended["attempt"] == 2
    assert before - torch.cuda.mem_get_info(0)[0] < taken / 10


def is_slot_of(pid: int, worker: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return int(stat.read().rpartition(")")[2].split()[1]) == worker
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("data", ["resident", "stream"])
def test_an_index_that_fails_on_the_device_is_told_as_the_objectives_error(
    tuner: Tuner, tmp_path: Path, data: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OUT_OF_RANGE)
    options = ["--device", "cuda", "--workers", "1", "--trials", "1", "--max-failures", "0", "--data", data]
    done = tuner("run", f"{path}:Mine", *options, "--log-format", "json")
    assert done.code == 5
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    (ended,) = [event for event in events if event["event"] == "trial_ended"]
    assert (ended["state"], ended["failure"]) == ("FAIL", "user_error"), done.stderr
    assert "device-side assert" in ended["message"]
    assert "terminate called" not in done.stderr
