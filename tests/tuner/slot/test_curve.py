"""What is kept of an attempt's epochs."""

import math
from pathlib import Path

import optuna
import pytest
import torch
from attempts import Signs, a_spec

from tuner.slot.attempt import TrialObjective, run_attempt
from tuner.slot.checked_trial import CheckedTrial
from tuner.slot.curve import Curve
from tuner.training import Epoch


def points_of(**spec):
    """Return the points that an attempt reported."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    trial = CheckedTrial(study, study.ask()._trial_id, lambda: None)
    points = []
    report = trial.report_point
    trial.report_point = lambda point: (points.append(point), report(point))
    outcome = run_attempt(TrialObjective.load(a_spec(**spec), Signs(), Path(), torch.device("cpu")), trial)
    assert outcome.value is not None, outcome.message
    return points


def test_metrics_of_the_training_split_are_kept_where_asked_for_and_change_nothing_else():
    without, asked = points_of(), points_of(train_metrics=True)
    assert [point.train_metrics for point in without] == [{}] * 3
    assert all(0 <= point.train_metrics["accuracy"] <= 1 for point in asked)
    assert [(point.train_loss, point.metrics) for point in without] == [
        (point.train_loss, point.metrics) for point in asked
    ]
    assert all(point.rates and point.seconds > 0 for point in asked)


def test_an_epoch_of_a_loop_of_ones_own_takes_the_time_since_the_last(monkeypatch):
    now = 100.0
    monkeypatch.setattr("tuner.slot.curve.time.perf_counter", lambda: now)
    curve = Curve("f1")
    now = 107.5
    metrics = {"f1": torch.tensor(0.5), "odd": math.nan}
    point = curve.point(Epoch(number=1, train_loss=torch.tensor(0.25), metrics=metrics))
    assert (point.seconds, point.train_loss, point.rates, point.metrics["f1"]) == (7.5, 0.25, (), 0.5)
    measured = curve.point(Epoch(number=2, train_loss=0.25, metrics=metrics, train_s=1.5, evaluate_s=0.5))
    assert measured.seconds == pytest.approx(2.0)
