"""Schedules that follow a metric: what they are fed, the rates that are recorded, and replaying those."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, ReduceLROnPlateau
from torchmetrics.classification import MulticlassAccuracy

from tuner.data import Split
from tuner.training import Interrupted, Run, fit
from tuner.training.checkpoint import Checkpoint
from tuner.training.schedules import wants_metric


class Halving(LRScheduler):
    """Halves the rate in each epoch whose metric is below 2, as own schedules are written."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.seen = []

    def step(self, metrics):
        self.seen.append(float(metrics))
        if metrics < 2:
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.5


def _rows(seed):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))
    return Split(x, (x[:, 0] > 0).long())


def _train(build, *, valid=True, epochs=4, groups=False, on_epoch=None, **run):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    params = [{"params": [model.weight]}, {"params": [model.bias], "lr": 1.0}] if groups else model.parameters()
    optimizer = torch.optim.SGD(params, lr=0.5)
    history = fit(
        model,
        _rows(0),
        _rows(1) if valid else None,
        optimizer=optimizer,
        scheduler=build(optimizer),
        loss=nn.CrossEntropyLoss(),
        metrics={"accuracy": MulticlassAccuracy(2)},
        epochs=epochs,
        batch_size=8,
        seed=3,
        on_epoch=on_epoch,
        run=Run(metric="accuracy", **run),
    )
    return model, optimizer, history


def _falling(optimizer):
    """Falls in each epoch, as no accuracy is above 2."""
    return ReduceLROnPlateau(optimizer, mode="max", threshold=2.0, threshold_mode="abs", patience=0, factor=0.5)


@pytest.mark.parametrize(
    ("build", "wants"),
    [(_falling, True), (Halving, True), (lambda its: CosineAnnealingLR(its, 4), False), (LinearLR, False)],
)
def test_an_epoch_says_whether_its_rates_follow_a_metric(build, wants):
    assert wants_metric(build(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.5))) == wants
    _, _, history = _train(build)
    assert [epoch.follow_metric for epoch in history] == [wants] * 4
    assert all(epoch.rates for epoch in history)


def test_the_rates_are_those_that_each_epoch_was_trained_with():
    _, optimizer, history = _train(_falling, groups=True)
    # The first value is the best so far, whatever it is.
    assert [epoch.rates for epoch in history] == [(0.5, 1.0), (0.5, 1.0), (0.25, 0.5), (0.125, 0.25)]
    assert [group["lr"] for group in optimizer.param_groups] == [0.0625, 0.125]


@pytest.mark.parametrize("build", [_falling, Halving])
def test_a_replay_trains_with_the_recorded_rates_and_without_a_metric(build):
    rates = [[0.4, 0.3], [0.2, 0.1]]
    _, _, history = _train(build, valid=False, groups=True, rates=rates)
    assert [epoch.rates for epoch in history] == [(0.4, 0.3), (0.2, 0.1), (0.2, 0.1), (0.2, 0.1)]


def test_rates_are_replayed_into_a_tensor_that_a_captured_step_reads():
    def on_device(optimizer):
        schedule = _falling(optimizer)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
        seen.append(optimizer.param_groups[0]["lr"])
        return schedule

    seen = []
    _, optimizer, history = _train(on_device, valid=False, epochs=2, rates=[[0.25], [0.125]])
    assert optimizer.param_groups[0]["lr"] is seen[0]
    assert [epoch.rates for epoch in history] == [(0.25,), (0.125,)]


def test_a_schedule_of_the_epochs_is_no_replay():
    rates = [[9.0]] * 4
    model, _, _ = _train(lambda its: CosineAnnealingLR(its, 4), rates=rates)
    plain, _, _ = _train(lambda its: CosineAnnealingLR(its, 4))
    assert torch.equal(model.weight, plain.weight)


def test_without_a_metric_one_that_is_to_fall_gets_the_training_loss_and_others_none():
    lines = []
    _, optimizer, _ = _train(_falling, valid=False, log=lines.append)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert lines == ["the schedule waits for a metric to grow, and none is computed here: the rate stays as it is"]
    schedules = []
    _, _, history = _train(lambda its: schedules.append(Halving(its)) or schedules[0], valid=False)
    assert schedules[0].seen == [epoch.train_loss for epoch in history]


def test_a_training_ends_where_it_is_told_by_the_schedule_of_all_its_epochs():
    stopped, _, history = _train(lambda its: CosineAnnealingLR(its, 4), until=2)
    kept = []
    _train(
        lambda its: CosineAnnealingLR(its, 4),
        on_epoch=lambda epoch: kept.append(None),
    )
    assert (len(history), len(kept)) == (2, 4)
    squeezed, _, _ = _train(lambda its: CosineAnnealingLR(its, 2), epochs=2)
    assert not torch.equal(stopped.weight, squeezed.weight)


def test_the_rates_survive_a_resume(tmp_path):
    def interrupt(epoch):
        if epoch.number == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        _train(_falling, on_epoch=interrupt, checkpoint=Checkpoint(tmp_path / "trial.pt"))
    _, _, resumed = _train(_falling, checkpoint=Checkpoint(tmp_path / "trial.pt"))
    _, _, whole = _train(_falling)
    assert [epoch.rates for epoch in resumed] == [epoch.rates for epoch in whole]
