"""Functions as users of Optuna have them, after its examples for PyTorch: they run as they are, here and there."""

from __future__ import annotations

import textwrap

import optuna
import pytest
from attempts import attempt
from optuna.trial import TrialState

from tuner.study.registry import find_objective

# As `pytorch_simple`: layers and optimizer are suggested, the trial reports and is pruned.
SIMPLE = """
    import optuna
    import torch
    from sklearn.datasets import load_digits
    from torch import nn, optim
    from torch.utils.data import DataLoader, TensorDataset

    DEVICE = torch.device("cpu")
    CLASSES, EPOCHS, BATCH = 10, 3, 128

    def define_model(trial):
        layers, features = [], 64
        for number in range(trial.suggest_int("n_layers", 1, 3)):
            units = trial.suggest_int(f"n_units_l{number}", 4, 128)
            dropout = trial.suggest_float(f"dropout_l{number}", 0.2, 0.5)
            layers += [nn.Linear(features, units), nn.ReLU(), nn.Dropout(dropout)]
            features = units
        return nn.Sequential(*layers, nn.Linear(features, CLASSES), nn.LogSoftmax(dim=1))

    def objective(trial):
        pixels, digits = (torch.tensor(its) for its in load_digits(return_X_y=True))
        rows = TensorDataset(pixels.float(), digits)
        model = define_model(trial).to(DEVICE)
        kind = trial.suggest_categorical("optimizer", ["Adam", "RMSprop", "SGD"])
        optimizer = getattr(optim, kind)(model.parameters(), lr=trial.suggest_float("lr", 1e-5, 1e-1, log=True))
        for epoch in range(EPOCHS):
            model.train()
            for data, target in DataLoader(rows, batch_size=BATCH, shuffle=True):
                optimizer.zero_grad()
                nn.functional.nll_loss(model(data.to(DEVICE)), target.to(DEVICE)).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                accuracy = (model(pixels.float()).argmax(1) == digits).float().mean().item()
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise optuna.exceptions.TrialPruned()
        return accuracy
"""

# As `pytorch_checkpoint`: files of its own, found again by the number of the trial that is tried again.
CHECKPOINT = """
    import copy
    from pathlib import Path

    import optuna
    import torch
    from optuna.storages import RetryFailedTrialCallback
    from torch import nn

    PLACE = Path(__file__).with_name("checkpoints")

    def objective(trial):
        model = nn.Linear(4, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True))
        number = RetryFailedTrialCallback.retried_trial_number(trial.study.trials[trial.number])
        number = trial.number if number is None else number
        path, first, best = PLACE / str(number) / "model.pt", 0, 0.0
        if path.exists():
            state = torch.load(path, weights_only=True)
            model.load_state_dict(state["model_state_dict"])
            optimizer.load_state_dict(state["optimizer_state_dict"])
            first, best = state["epoch"] + 1, state["accuracy"]
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.set_user_attr("checkpoint_path", str(path))
        for epoch in range(first, 3):
            rows = torch.randn(32, 4)
            loss = (model(rows) - rows.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            accuracy = 1 / (1 + loss.item())
            trial.report(accuracy, epoch)
            best = max(best, accuracy)
            states = {"model_state_dict": model.state_dict(), "optimizer_state_dict": copy.copy(optimizer.state_dict())}
            torch.save({"epoch": epoch, "accuracy": best, **states}, path)
            if trial.should_prune():
                raise optuna.exceptions.TrialPruned()
        return best
"""

# As `pytorch_lightning_simple`, whose callback of Optuna's is tuner's here.
LIGHTNING = """
    import lightning.pytorch as pl
    import torch
    from sklearn.datasets import load_digits
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    import tuner

    class Module(pl.LightningModule):
        def __init__(self, dropout, units):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(64, units), nn.Dropout(dropout), nn.ReLU(), nn.Linear(units, 10))

        def forward(self, data):
            return self.model(data)

        def training_step(self, batch, batch_idx):
            data, target = batch
            return nn.functional.cross_entropy(self(data), target)

        def validation_step(self, batch, batch_idx):
            data, target = batch
            accuracy = (self(data).argmax(dim=1) == target).float().mean()
            self.log("val_acc", accuracy)
            self.log("hp_metric", accuracy, on_step=False, on_epoch=True)

        def configure_optimizers(self):
            return torch.optim.Adam(self.model.parameters())

    class Digits(pl.LightningDataModule):
        def setup(self, stage=None):
            pixels, digits = (torch.tensor(its) for its in load_digits(return_X_y=True))
            self.rows = TensorDataset(pixels.float(), digits)

        def train_dataloader(self):
            return DataLoader(self.rows, batch_size=256, shuffle=True)

        def val_dataloader(self):
            return DataLoader(self.rows, batch_size=2000)

    def objective(trial):
        model = Module(trial.suggest_float("dropout", 0.2, 0.5), trial.suggest_int("n_units_l0", 4, 128, log=True))
        trainer = pl.Trainer(
            logger=False, limit_val_batches=1.0, enable_checkpointing=False, max_epochs=2, accelerator="cpu", devices=1,
            enable_progress_bar=False, callbacks=[tuner.callbacks.Lightning(trial, monitor="val_acc")],
        )
        trainer.fit(model, datamodule=Digits())
        return trainer.callback_metrics["val_acc"].item()
"""

EXAMPLES = {"pytorch_simple": SIMPLE, "pytorch_checkpoint": CHECKPOINT, "pytorch_lightning_simple": LIGHTNING}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore")  # Lightning's, and of what is experimental in Optuna
def test_an_example_of_optunas_runs_in_a_slot_and_under_optimize(name, tmp_path):
    if "lightning" in name:
        pytest.importorskip("lightning", reason="the extra lightning is not installed")
    file = tmp_path / f"{name}.py"
    file.write_text(textwrap.dedent(EXAMPLES[name]))
    objective = find_objective(f"{file}:objective").load()
    in_slot = optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner())
    outcome, trial = attempt(in_slot, objective, checkpoints=tmp_path / "state")
    assert (outcome.state, outcome.message) == (TrialState.COMPLETE, "")
    assert trial.value == outcome.value
    assert len(trial.intermediate_values) >= 2
    assert 0 < outcome.value <= 1
    by_hand = optuna.create_study(direction="maximize")
    by_hand.optimize(objective, n_trials=1)
    assert by_hand.trials[0].state == TrialState.COMPLETE
