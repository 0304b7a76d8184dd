"""Slots forked from a process that has imported the objective, and when they are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from command import Tuner

SCRIPT = Path(__file__).parents[2] / "support" / "nurseries.py"


def in_a_process_of_its_own(*arguments: str | Path) -> str:
    """What a function of that script prints; a process that has run other tests has threads."""
    environment = {**os.environ, "PYTHONPATH": f"{SCRIPT.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-P", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    ["fork_and_kill_slots", "kill_the_nursery", "end_it_while_it_imports", "kill_its_worker_while_it_imports"],
)
def test_a_nursery_and_its_slots_end_or_are_killed_and_leave_nothing(tmp_path: Path, function: str) -> None:
    assert in_a_process_of_its_own(function, tmp_path) == "all as it should\n"


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
    assert why in in_a_process_of_its_own("import_odd", tmp_path, text)


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


@pytest.mark.slow
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
