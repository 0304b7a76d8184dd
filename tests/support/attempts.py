"""One attempt at a trial of a small objective, as a slot makes it."""

import dataclasses
from pathlib import Path

import optuna
import torch
from torch import nn
from torchmetrics import Metric

from tuner.data import Data, Split
from tuner.objective import Objective
from tuner.slot.attempt import TrialObjective, run_attempt
from tuner.slot.checked_trial import CheckedTrial
from tuner.spec import Spec


def a_spec(*, epochs=3, metric="accuracy", direction="maximize", **training):
    return Spec.model_validate(
        {
            "objective": {"name": "signs", "code_hash": "0"},
            "metric": metric,
            "direction": direction,
            "budget": {"trials": 9},
            "epochs": epochs,
            "seed": 11,
            "training": training,
        }
    )


class Signs(Objective):
    """Tell negative numbers from positive ones."""

    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)

    def load_data(self, root):
        splits = []
        for seed in range(3):
            numbers = torch.randn(40, 2, generator=torch.Generator().manual_seed(seed))
            splits.append(Split(numbers, (numbers[:, 0] > 0).long()))
        return Data(*splits, class_names=("negative", "positive"))

    def build_model(self, params):
        return nn.Linear(2, 2)


def attempt(study, objective, *, check=lambda: None, checkpoints=None, log=print, threads=None, **spec):
    """Run the study's next trial and tell its end, as a slot does."""
    cpu = torch.device("cpu")
    what = TrialObjective.load(a_spec(**spec), objective, Path(), cpu, checkpoints=checkpoints, log=log)
    if threads is not None:
        what = dataclasses.replace(what, threads=threads)
    trial = CheckedTrial(study, study.ask()._trial_id, check)
    outcome = run_attempt(what, trial)
    study.tell(trial, outcome.value, outcome.state)
    return outcome, study.trials[-1]


class PruneAt(optuna.pruners.BasePruner):
    def __init__(self, step):
        self.step = step

    def prune(self, study, trial):
        return trial.last_step >= self.step


class Constant(Metric):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def update(self, outputs, targets):
        pass

    def compute(self):
        return torch.tensor(self.value)
