"""Trying an objective without a study: params of its space, and a short training."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import optuna
import torch
from hypothesis import strategies as st
from optuna.samplers import RandomSampler

from tuner.data import Data, Split, tensors
from tuner.objective import Objective
from tuner.seeds import seed_everything

if TYPE_CHECKING:
    from torch import nn

    from tuner.objective import Params
    from tuner.training import Epoch


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
"""What a choice of a categorical param may be."""


class Untrained(Objective):
    """The base of objectives that are searched by nobody, and only suggest."""

    def load_data(self, root: Any) -> Data:
        raise NotImplementedError

    def build_model(self, params: Params) -> nn.Module:
        raise NotImplementedError


def some_params(objective: Objective, *fixed: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """Return params that the objective suggests, drawn at random but for those of each of `fixed`."""
    study = optuna.create_study(sampler=RandomSampler(seed))
    found = []
    for values in fixed:
        study.enqueue_trial(values)
        trial = study.ask()
        objective.suggest(trial)
        found.append(trial.params)
    return found


def a_slice(data: Data, n: int = 200) -> Data:
    """Return the first rows of each split."""
    train, valid, test = (split.rows(slice(0, n)) for _, split in data.splits())
    return Data(train, valid, test, data.class_names)


def train(objective: Objective, data: Data, params: Params, epochs: int = 1) -> tuple[nn.Module, list[Epoch]]:
    """Return a model trained on the data, and the epochs."""
    seed_everything(0)
    model = objective.build_model(params)
    metrics = objective.build_metrics(data)
    return model, objective.fit(model, data.train, data.valid, params, metrics=metrics, epochs=epochs, seed=0)


def counted(*splits: Split) -> Counter[bytes]:
    """Return how often each row is in the splits, inputs and target taken together."""
    rows: Counter[bytes] = Counter()
    for split in splits:
        parts = [part.reshape(len(split), -1).double() for part in (*tensors(split.inputs), split.targets)]
        rows.update(row.tobytes() for row in torch.cat(parts, dim=1).numpy())
    return rows
