"""Lightning's Trainer in a plain function: it reports, prunes, and goes on from its checkpoint."""

from __future__ import annotations

import optuna
import pytest
import torch
from attempts import PruneAt, attempt
from optuna.trial import TrialState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tuner
from tuner.training import Interrupted

lightning = pytest.importorskip("lightning.pytorch", reason="the extra lightning is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Lightning's, of loaders and of what it finds missing
]


class Signs(lightning.LightningModule):
    def __init__(self, lr, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 2))

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, number):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, number):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def loaders():
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    rows = TensorDataset(x, (x[:, 0] > 0).long())
    return DataLoader(rows, batch_size=10, shuffle=True), DataLoader(rows, batch_size=60)


class Trains:
    """A function with a Trainer; `at` is called after each epoch."""

    def __init__(self, monitor="val_loss", at=lambda epoch: None, **options):
        self.monitor, self.options, self.epochs = monitor, options, []
        self.at = at

    def __call__(self, trial):
        callback = tuner.callbacks.Lightning(trial, self.monitor)
        model, (train, valid) = Signs(trial.suggest_float("lr", 0.01, 0.1)), loaders()
        outer = self

        class Tell(lightning.Callback):
            def on_train_epoch_start(self, trainer, module):
                outer.epochs.append(trainer.current_epoch)
                outer.at(trainer.current_epoch)

        trainer = lightning.Trainer(
            max_epochs=4,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback, Tell()],
            **self.options,
        )
        trainer.fit(model, train, valid, ckpt_path=callback.ckpt_path)
        tuner.keep_model(trial, model, torch.zeros(3, 2))
        return trainer.callback_metrics[self.monitor].item()


def a_study(pruner=None):
    study = optuna.create_study(direction="minimize", pruner=pruner or optuna.pruners.NopPruner())
    study.enqueue_trial({"lr": 0.05})
    return study


def interrupting(epoch):
    """Return what tells a trial to end once that epoch has begun, and the check that does it."""
    told = []

    def check():
        if told:
            raise Interrupted

    return (lambda its: told.append(its) if its >= epoch else None), check


def test_a_trainer_reports_each_epoch_and_ends_as_if_it_had_not_been_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr("tuner.slot.checked_trial.CheckedTrial.number", 0)
    whole, undisturbed = attempt(a_study(), Trains(), direction="minimize")
    assert whole.message == ""
    assert sorted(undisturbed.intermediate_values) == [0, 1, 2, 3]
    assert whole.value == undisturbed.intermediate_values[3]
    study = a_study()
    at, check = interrupting(2)
    first = Trains(at=at)
    with pytest.raises(Interrupted):
        attempt(study, first, checkpoints=tmp_path, check=check, direction="minimize")
    study.enqueue_trial({"lr": 0.05})
    second = Trains()
    outcome, trial = attempt(study, second, checkpoints=tmp_path, direction="minimize")
    assert (first.epochs, second.epochs) == ([0, 1, 2], [3])
    assert outcome.value == whole.value
    assert trial.intermediate_values == undisturbed.intermediate_values


def test_a_trainer_is_pruned(monkeypatch):
    trains = Trains()
    outcome, trial = attempt(a_study(PruneAt(1)), trains, direction="minimize")
    assert (outcome.state, trains.epochs) == (TrialState.PRUNED, [0, 1])
    assert sorted(trial.intermediate_values) == [0, 1]


def test_a_metric_that_is_not_logged_fails_the_trial():
    outcome, _ = attempt(a_study(), Trains(monitor="accuracy"), direction="minimize")
    told = "needs the metric 'accuracy', which validation_step is to log, got: val_loss"
    assert (outcome.failure, told in outcome.message) == ("user_error", True), outcome.message


def test_a_trainer_of_several_devices_is_refused_before_it_starts_a_process(monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *args, **options: started.append(args) or 1 / 0)
    trains = Trains(devices=2, strategy="ddp")
    outcome, _ = attempt(a_study(), trains, direction="minimize")
    assert "a trial has one device, got a Trainer of 2: give it devices=1" in outcome.message
    assert (outcome.failure, started) == ("user_error", [])


def test_lightning_is_asked_for_where_it_is_not_installed(start_python):
    code = (
        "import sys; sys.modules['lightning'] = None\nimport tuner\n"
        "try:\n    tuner.callbacks.Lightning\nexcept tuner.TunerError as error:\n    print(error)"
    )
    out, err = start_python(code).communicate(timeout=60)
    assert (out.strip(), err) == (
        "tuner.callbacks.Lightning needs lightning, got no lightning.pytorch: pip install 'tuner[lightning]'",
        "",
    )
