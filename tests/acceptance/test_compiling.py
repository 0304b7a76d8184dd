"""`--compile` as a user has it: slots whose trials compile beside one another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import Tuner

# torch's compiler follows gradients from 2.11 on.
WHAT = "the whole step" if hasattr(torch._dynamo.config, "trace_autograd_ops") else "model and loss"

OBJECTIVE = """
import os
import threading
from pathlib import Path

import torch
from torch import nn

from tuner.data import split_rows
from tuner.objective import Objective

HERE = Path(__file__).parent
pause = threading.Event()


class Signs(Objective):
    epochs = 5

    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)

    def load_data(self, root):
        points = torch.rand(300, 6, generator=torch.Generator().manual_seed(1))
        return split_rows(points, (points[:, 0] > points[:, 1]).long(), class_names=("below", "above"), seed=self.seed)

    def build_model(self, params):
        return nn.Linear(6, 2)

    def fit(self, *given, on_epoch, run, **others):
        def wait(epoch):
            if epoch.number == 2:
                forks = forked()
                (HERE / f"forks-{os.getpid()}").write_text(str(len(forks)))
                while not (HERE / "ended").exists():
                    pause.wait(0.1)
                    run.check()
                    if forks and all(map(has_ended, forks)):
                        (HERE / "ended").touch()
            on_epoch(epoch)

        return super().fit(*given, on_epoch=wait if run.may_fork else on_epoch, run=run, **others)


def forked():
    return Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()


def has_ended(child):
    return os.waitid(os.P_PID, int(child), os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_process_compiles_for_the_trials_of_two_slots(tuner: Tuner, tmp_path: Path) -> None:
    objective = tmp_path / "signs.py"
    objective.write_text(OBJECTIVE)
    options = ("--trials", "2", "--workers", "2", "--threads", "1", "--pruner", "none", "--compile", "--no-export")
    found = tuner("run", f"{objective}:Signs", *options, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert found.code == 0, found.stderr
    assert sorted(file.read_text() for file in tmp_path.glob("forks-*")) == ["0", "1"]
    trials = tuner("trials", "signs", "--json").json()
    assert [trial["user_attrs"]["compiled"] for trial in trials] == [WHAT] * 2
    assert found.stderr.count("--compile: a step took ") == 2, found.stderr
