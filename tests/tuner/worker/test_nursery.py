"""Slots forked from a process that has imported the objective, and when they are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from command import wait_for
from processes import children
from tqdm import tqdm

from tuner.worker.nursery import Nursery

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from command import Tuner

OBJECTIVE = """
import atexit, os, tempfile

MADE = tempfile.TemporaryDirectory()
atexit.register(os.write, 2, b"ended\\n")
os.write(2, f"imported {MADE.name}\\n".encode())

def objective(trial):
    return 0.0
"""


LINES: list[str] = []


class Streams:
    """The standard streams of a slot."""

    def __init__(self) -> None:
        (stdin, self.orders), (self.events, stdout) = os.pipe(), os.pipe()
        self.its = (stdin, stdout, os.open(os.devnull, os.O_WRONLY))

    def hand_over(self) -> None:
        for stream in self.its:
            os.close(stream)


@pytest.fixture(autouse=True)
def without_tqdms_thread() -> None:
    """End what a progress bar of another test has left running here, where it would count as the worker's own."""
    if tqdm.monitor is not None:
        tqdm.monitor.exit()
        tqdm.monitor = None


def importing(objective: str, directory: Path) -> Nursery:
    """A nursery that imports this objective."""
    nursery = Nursery.importing(dict(os.environ), str(directory), LINES.append)
    nursery.load(objective)
    return nursery


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    LINES.clear()
    (tmp_path / "plain.py").write_text(OBJECTIVE)
    nursery = importing(f"{tmp_path / 'plain.py'}:objective", tmp_path)
    try:
        yield nursery
    finally:
        nursery.close()


@pytest.mark.slow
def test_slots_are_forked_end_by_themselves_or_are_killed_and_the_objective_is_imported_once(nursery: Nursery) -> None:
    streams, others = Streams(), Streams()
    slot = nursery.fork({}, streams.its, pytest.fail)
    other = nursery.fork({}, others.its, pytest.fail)
    assert slot is not None
    assert other is not None
    for each in (streams, others):
        each.hand_over()
    os.close(streams.orders)
    assert slot.wait() == 0
    os.kill(other.pid, signal.SIGKILL)
    assert other.wait() == -signal.SIGKILL
    assert os.read(streams.events, 1) == b""  # nobody else holds the pipe
    (imported,) = LINES
    made = imported.removeprefix("imported ")
    assert os.path.isdir(made)  # it is not a slot's to delete
    nursery.close()
    assert not os.path.exists(made)
    wait_for(lambda: LINES[1:] == ["ended"], "the end is told once")


@pytest.mark.slow
def test_a_nursery_that_was_killed_forks_no_more_and_its_slots_count_as_killed(nursery: Nursery) -> None:
    streams = Streams()
    slot = nursery.fork({}, streams.its, pytest.fail)
    assert slot is not None
    (pid,) = (child for child in children(os.getpid()) if slot.pid in children(child))
    os.kill(pid, signal.SIGKILL)
    assert slot.wait() == -signal.SIGKILL
    assert nursery.fork({}, streams.its, pytest.fail) is None
    streams.hand_over()
    os.close(streams.orders)
    wait_for(lambda: not os.path.exists(f"/proc/{slot.pid}"), "the slot ends")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import threading\nthreading.Thread(target=threading.Event().wait, daemon=True, name='own').start()", "'own'"),
        ("import torch\ntorch.set_num_threads(2)\ntorch.ones(1 << 22).add_(1)", "computes with threads"),
        ("import os, shutil\nopened = os.open('/dev/dri', 0)", "opens a device"),
    ],
)
def test_an_objective_that_leaves_what_no_fork_takes_along_is_not_forked(tmp_path: Path, text: str, why: str) -> None:
    if "/dev/dri" in text and not os.path.isdir("/dev/dri"):
        pytest.skip("there is no such device")
    (tmp_path / "odd.py").write_text(OBJECTIVE + text)
    nursery = importing(f"{tmp_path / 'odd.py'}:objective", tmp_path)
    streams = Streams()
    told: list[str] = []
    try:
        assert nursery.fork({}, streams.its, told.append) is None
        assert nursery.fork({}, streams.its, pytest.fail) is None
    finally:
        nursery.close()
    (reason,) = told
    assert why in reason


@pytest.mark.slow
def test_a_worker_whose_output_is_a_file_has_its_slots_forked(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("def objective(trial):\n    return 0.0\n")
    assert tuner("create", "plain.py:objective", "--trials", "1", "--direction", "minimize").code == 0
    log = tmp_path / "log"
    environment = {**os.environ, **tuner.environment}
    worker = [sys.executable, "-P", "-m", "tuner", "worker", "plain", "--objective", "plain.py:objective"]
    with log.open("w") as file:
        subprocess.run(worker, stdout=file, stderr=file, check=True, env=environment, cwd=tmp_path)
    assert "trial 0 complete" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert "imports plain.py:objective itself" not in log.read_text()


def test_a_thread_of_the_process_that_is_copied_is_noticed_there() -> None:
    script = """
import os, threading
threading.Thread(target=threading.Event().wait, daemon=True, name="pool").start()
from tuner.worker.nursery import Nursery
print(Nursery.copied().fork({}, (0, 1, 2), print))
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    told, forked = done.stdout.splitlines()
    assert "starts the thread 'pool'" in told
    assert forked == "None"


def test_torchvision_and_scipy_are_imported_by_who_uses_what_torchmetrics_has_of_them() -> None:
    script = """
from tuner.imports import quick_imports
import sys
with quick_imports():
    import torchmetrics
assert not {"torchvision", "torchvision.models", "torch._dynamo", "scipy.signal"} & set(sys.modules)
import scipy.signal
assert scipy.signal.hamming is scipy.signal.windows.hamming and scipy.signal.find_peaks
images = sys.modules["torchmetrics.functional.image.arniqa"]
print(images.resnet50(weights=None).__class__.__name__, images.transforms.Normalize.__name__)
assert sys.modules["torchvision.models"].resnet50
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ResNet Normalize\n", "")
