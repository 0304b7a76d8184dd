"""Retraining is the recipe that won: its schedule, its epochs and its rates."""

import pytest
import torch
from exporting import code
from safetensors.torch import load_file

from tuner.formats.weights import WEIGHTS
from tuner.model.manifest import Retraining

# Writes down what each epoch was trained with.
SEEN = """
    from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

    def build_scheduler(self, optimizer, params, epochs):
        def write_down(*_):
            with open(__file__ + ".rates", "a") as file:
                print(optimizer.param_groups[0]["lr"], file=file)

        optimizer.register_step_pre_hook(write_down)
        return {schedule}

    Signs.build_scheduler = build_scheduler
    Signs.batch_size = lambda self, params: 80  # one step an epoch
"""
COSINE = SEEN.format(schedule="CosineAnnealingLR(optimizer, epochs)")
PLATEAU = SEEN.format(schedule="ReduceLROnPlateau(optimizer, mode='max', patience=0)")


def _rates(exporting):
    lines = exporting.path.with_name(exporting.path.name + ".rates").read_text().split()
    return [float(line) for line in lines]


def _planned(epochs):
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.slow
@pytest.mark.parametrize(("how", "epochs"), [({}, 7), ({"full_schedule": True}, 20)])
def test_the_schedule_is_the_studys_and_ends_after_the_best_epoch(exporting, how, epochs, capsys):
    exporting.start(code(more=COSINE), epoch=7)
    manifest = exporting(**how).manifest
    assert _rates(exporting) == pytest.approx(_planned(epochs))
    assert manifest.epochs == epochs
    assert manifest.retraining == Retraining(schedule="planned", schedule_epochs=20)
    shown = "20 epochs" if how else "7 of 20 epochs"
    assert f"retraining trial 1 on train + valid for {shown}\n" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [None, 0, 21, "last", 2.5])
def test_a_best_epoch_that_is_none_is_the_last(exporting, epoch):
    exporting.start(code(), epoch=None, attrs={"epoch": epoch})
    assert exporting().manifest.epochs == 20


def test_a_schedule_that_follows_a_metric_gives_the_rates_of_the_trial(exporting):
    exporting.start(code(more=PLATEAU), epoch=3, rates=[[0.05], [0.05], [0.02], [0.01]])
    manifest = exporting().manifest
    assert _rates(exporting) == [0.05, 0.05, 0.02]
    assert manifest.retraining == Retraining(schedule="replayed", schedule_epochs=20)


@pytest.mark.slow
@pytest.mark.parametrize("rates", [[], [[], []], [[0.02], [None]]])
def test_a_trial_without_recorded_rates_says_so(exporting, rates):
    exporting.start(code(more=PLATEAU), epoch=3, rates=rates)
    manifest = exporting().manifest
    assert _rates(exporting) == [0.05] * 3
    assert manifest.retraining.schedule == "unrecorded"
    assert "the rate stays as it is" in manifest.retraining.notes[0]


OWN = """
    from tuner.training import Epoch, Run

    def fit(self, model, train, valid, params, *, metrics, epochs, seed, on_epoch=None, run=Run()):
        history = []
        for number in range(1, epochs + 1):
            with torch.no_grad():
                model.layers[1].weight.fill_(number)
            history.append(Epoch(number=number, train_loss=0.0, metrics={{}}))
            {call}
        with torch.no_grad():
            model.layers[1].bias.fill_(7.0)
        return history

    Signs.fit = fit
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "weight", "is_finished"),
    [
        ("on_epoch(history[-1])", 3.0, False),
        ("on_epoch(history[-1])\n            if number == run.until: break", 3.0, True),
        ("pass", 20.0, True),
    ],
    ids=["calls back", "heeds until", "does neither"],
)
def test_a_loop_of_ones_own_gives_the_model_of_the_best_epoch(exporting, call, weight, is_finished):
    exporting.start(code(more=OWN.format(call=call)), epoch=3)
    manifest = exporting().manifest
    weights = load_file(exporting.output / WEIGHTS)
    assert manifest.epochs == int(weight)
    assert weights["layers.1.weight"].unique().tolist() == [weight]
    assert (weights["layers.1.bias"] == 7.0).all().item() == is_finished
