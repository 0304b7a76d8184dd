"""One worker of the search that everybody writes; `search_speed.py` starts it beside `tuner run`.

    STORAGE=postgresql+psycopg2://... python benchmarks/search_plain.py DATA_DIR STUDY TRIALS EPOCHS SEED

Nothing of tuner is in here: Optuna's RDBStorage, torchvision's data set with a transform for each image, a DataLoader,
and the loop over its batches.
"""

from __future__ import annotations

import os
import sys

import optuna
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import FashionMNIST
from torchvision.transforms import v2

BATCH_SIZE = 32


def main() -> None:
    data_dir, name, trials, epochs, seed = sys.argv[1:]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    images = FashionMNIST(data_dir, train=True, transform=transform)
    train, valid = random_split(images, [0.8, 0.2], generator=torch.Generator().manual_seed(0))

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 1e-3, 0.3, log=True)
        width = trial.suggest_int("width", 32, 512, log=True)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10)).to(device)
        optimizer = SGD(model.parameters(), lr=lr)
        loss_fn = nn.CrossEntropyLoss()
        train_loader = DataLoader(train, batch_size=BATCH_SIZE, shuffle=True)
        valid_loader = DataLoader(valid, batch_size=BATCH_SIZE)
        accuracy = 0.0
        for epoch in range(1, int(epochs) + 1):
            model.train()
            total = 0.0
            for inputs, targets in train_loader:
                inputs, targets = inputs.to(device), targets.to(device)
                optimizer.zero_grad()
                loss = loss_fn(model(inputs), targets)
                loss.backward()
                optimizer.step()
                total += loss.item()
            model.eval()
            correct = 0
            with torch.no_grad():
                for inputs, targets in valid_loader:
                    inputs, targets = inputs.to(device), targets.to(device)
                    correct += (model(inputs).argmax(dim=1) == targets).sum().item()
            accuracy = correct / len(valid)
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return accuracy

    study = optuna.create_study(
        storage=os.environ["STORAGE"],
        study_name=name,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=int(seed)),
        pruner=optuna.pruners.MedianPruner(),
        load_if_exists=True,
    )
    study.optimize(objective, n_trials=int(trials))


if __name__ == "__main__":
    main()
