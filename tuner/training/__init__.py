"""Training one model: the loop, its steps and batches, checkpoints, and what is recorded of it.

In come a model, rows, a loss, an optimizer, metrics, and a `Run` that says how and what to call meanwhile. Out goes one
`Epoch` for each that ended, or a checkpoint to go on from. Nothing here knows of Optuna or of a database.
"""

from tuner.training.devices import choose_device
from tuner.training.evaluation import EVALUATION_BYTES, EVALUATION_ROWS, Predictions, evaluate, predict
from tuner.training.fitting import (
    CHECKED_EVERY,
    DivergedError,
    Epoch,
    Interrupted,
    Options,
    Run,
    RunningLoss,
    best_epoch,
    fit,
)

__all__ = [
    "CHECKED_EVERY",
    "EVALUATION_BYTES",
    "EVALUATION_ROWS",
    "DivergedError",
    "Epoch",
    "Interrupted",
    "Options",
    "Predictions",
    "Run",
    "RunningLoss",
    "best_epoch",
    "choose_device",
    "evaluate",
    "fit",
    "predict",
]
