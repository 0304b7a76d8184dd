"""A short training that draws from every generator, to be interrupted and resumed from its checkpoint."""

import random

import numpy as np
import torch
from torch import nn

from tuner.data import Split
from tuner.training import Interrupted, Run, fit


class Model(nn.Module):
    """Draws from every generator there is."""

    def __init__(self, width=8, *, lazy=False):
        super().__init__()
        first, norm, last = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2)
        if lazy:
            first, norm, last = nn.LazyLinear(width), nn.LazyBatchNorm1d(), nn.LazyLinear(2)
        self.layers = nn.Sequential(first, norm, nn.ReLU(), nn.Dropout(0.3), last)

    def forward(self, x):
        noise = random.random() + np.random.random() if self.training else 0.0
        return self.layers(x + noise)


def some_rows(n=40):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    return Split(x, (x[:, 0] > 0).long())


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def train(checkpoint=None, *, kind="sgd", seed=0, rows=None, check=lambda: None, on_epoch=None, width=8, lines=None):
    """Train six epochs of five batches; `seed` is the global generators', as a new process has others."""
    seed_all(seed)
    model = Model(width, lazy=kind == "lazy")
    optimizer = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "lazy": lambda: torch.optim.Adam(model.parameters(), lr=0.05),
        "lbfgs": lambda: torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=4),
        "adam": lambda: torch.optim.Adam(model.parameters(), lr=0.05),
        "fused": lambda: torch.optim.AdamW(model.parameters(), lr=0.05, fused=True),
    }[kind]()
    resumed = []
    history = fit(
        model,
        some_rows() if rows is None else rows,
        some_rows(),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
        loss=nn.CrossEntropyLoss(),
        metrics={},
        epochs=6,
        batch_size=8,
        seed=4,
        on_epoch=on_epoch,
        run=Run(
            checkpoint=checkpoint,
            check=check,
            on_resume=resumed.extend,
            log=print if lines is None else lines.append,
        ),
    )
    return model.state_dict(), optimizer.state_dict(), history, [epoch.number for epoch in resumed]


def interrupt_at(batch):
    """Return a check that interrupts before that batch, counted from 0 over all epochs."""
    left = iter([False] * batch + [True])

    def check():
        if next(left, False):
            raise Interrupted

    return check


def interrupt_after(number):
    def on_epoch(epoch):
        if epoch.number == number:
            raise Interrupted

    return on_epoch


def assert_same(ours, wanted):
    (model, optimizer, history, _), (its_model, its_optimizer, its_history, _) = ours, wanted
    assert {name for name in model if not torch.equal(model[name], its_model[name])} == set()
    assert history == its_history
    assert optimizer["param_groups"] == its_optimizer["param_groups"]
