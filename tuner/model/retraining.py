"""Training the winning trial again on train + valid, as it was trained when it won."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from storage.coordination.records import TrialRecord
from storage.trials.curves import CurvePoint
from tuner import training
from tuner.data import Data, join
from tuner.errors import TunerError
from tuner.log import Log
from tuner.model.manifest import Retraining
from tuner.objective import Objective
from tuner.seeds import seed_everything
from tuner.slot.attempt import epochs_of
from tuner.slot.where import with_line
from tuner.study.joining import Study
from tuner.training.batches import place_rows
from tuner.training.compiled import uncompiled
from tuner.training.record import count_weights


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """A model in eval mode, the epochs that it was trained for, and how; `counts` is of its weights."""

    model: nn.Module
    epochs: int
    how: Retraining
    counts: dict[str, int]


class _EnoughError(Exception):
    """The epoch has come after which the training was to end, and the objective's own loop goes on."""


def retrain(
    objective: Objective,
    study: Study,
    best: TrialRecord,
    curve: Sequence[CurvePoint],
    data: Data,
    *,
    full_schedule: bool,
    epochs: int | None,
    seed: int,
    device: torch.device,
    log: Log,
) -> Retrained:
    """Train the trial's model anew, by the schedule of the study's epochs, until the epoch of its best value.

    With `full_schedule` it is trained for all of them, or for so many `epochs`: more than there are make the schedule
    longer. A schedule that follows a metric gives the rates that it gave in the trial, whose `curve` tells them. Raises
    TunerError that says what went wrong.
    """
    planned = epochs_of(best.params, study.spec)
    until = epochs or (planned if full_schedule else best_epoch(best, planned))
    planned = max(planned, until)
    shown = f"{until} epochs" if until == planned else f"{until} of {planned} epochs"
    log.event("retraining", f"retraining trial {best.number} on train + valid for {shown}", trial=best.number)
    notes: list[str] = []

    def tell(line: str) -> None:
        log.event("note", line)

    def note(line: str) -> None:
        notes.append(line)
        tell(line)

    run = training.Run(
        options=training.Options(**study.spec.training.model_dump()), until=until, rates=_rates_of(curve), log=note
    )
    seed_everything(seed)
    try:
        model = objective.build_model(best.params).to(device)
        (train,) = place_rows([join(data.train, data.valid)], device, study.spec.training.data, tell)
        metrics = {name: metric.to(device) for name, metric in objective.build_metrics(data).items()}
        last = _Last(model, until)
        try:
            history = objective.fit(
                model,
                train,
                None,
                best.params,
                metrics=metrics,
                epochs=planned,
                seed=seed,
                on_epoch=None if type(objective).fit is Objective.fit else last,
                run=run,
            )
        except _EnoughError:
            history = last.restore()
    except Exception as error:
        raise TunerError(f"retraining trial {best.number} failed: {with_line(error, objective)}") from error
    follows_metric = any(epoch.follow_metric for epoch in history)
    how = Retraining(
        schedule="planned" if not follows_metric else "replayed" if run.rates else "unrecorded",
        schedule_epochs=planned,
        notes=notes,
    )
    return Retrained(model=uncompiled(model).eval(), epochs=len(history), how=how, counts=count_weights(model))


def best_epoch(best: TrialRecord, planned: int) -> int:
    """Return the epoch of the trial's best value; the last one planned where it does not say, as a notebook's."""
    found = best.user_attrs.get("epoch")
    return found if isinstance(found, int) and 0 < found <= planned else planned


class _Last:
    """Ends a loop of the objective's own after an epoch, as `training.fit` ends by itself.

    Such a loop, which may not know of `Run.until`, has trained another epoch once it can be told: the model as it was
    is kept, and restored.
    """

    def __init__(self, model: nn.Module, until: int) -> None:
        self._model = model
        self._until = until
        self._history: list[training.Epoch] = []
        self._state: dict[str, Any] = {}

    def __call__(self, epoch: training.Epoch) -> None:
        if len(self._history) == self._until:
            raise _EnoughError
        self._history.append(epoch)
        if len(self._history) == self._until:
            self._state = copy.deepcopy(self._model.state_dict())

    def restore(self) -> list[training.Epoch]:
        """Return the epochs that the model, restored, was trained for."""
        self._model.load_state_dict(self._state)
        return self._history


def _rates_of(curve: Sequence[CurvePoint]) -> list[list[float]]:
    """Return the rates of each epoch; none where they are not known of all, as of a loop of the objective's own."""
    rows = [[rate for rate in point.rates if rate is not None] for point in curve]
    return rows if all(row and len(row) == len(point.rates) for row, point in zip(rows, curve, strict=True)) else []
