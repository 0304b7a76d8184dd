"""What a study's trials came to, as the fields that commands print and Python gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from storage.coordination.records import TrialRecord
    from tuner.study.joining import AnyStudy


def best_fields(engine: Engine, study: AnyStudy) -> dict[str, Any]:
    """Return the best trial as `tuner best --json` prints it. Raises TunerError if none is complete."""
    from tuner.study.joining import best_of

    return best_fields_of(study, best_of(engine, study))


@dataclass(frozen=True, kw_only=True)
class BestTrial:
    """A study's best trial. `value` is of its `epoch`, None for one that does not train by us, as are `parameters`.

    `parameters` are how many weights the model has, `trained_parameters` how many of them are trained.
    """

    study: str
    number: int
    value: float | None
    metric: str
    direction: str
    params: dict[str, Any]
    epoch: int | None
    state: str
    seed: int | None
    parameters: int | None
    trained_parameters: int | None


def best_fields_of(study: AnyStudy, best: TrialRecord) -> dict[str, Any]:
    """Return the study's best trial as `tuner best --json` prints it."""
    return {
        "study": study.name,
        "number": best.number,
        "value": best.value,
        "metric": study.metrics[0],
        "direction": study.directions[0],
        "params": best.params,
        "epoch": best.user_attrs.get("epoch"),
        "state": best.state,
        "seed": best.user_attrs.get("seed"),
        "parameters": best.user_attrs.get("parameters"),
        "trained_parameters": best.user_attrs.get("trained_parameters"),
    }


def trial_fields(trial: TrialRecord) -> dict[str, Any]:
    """Return a trial as `tuner trials --json` prints it, apart from who ran it."""
    return {
        "number": trial.number,
        "state": trial.state,
        "value": trial.value,
        "params": trial.params,
        "parameters": trial.user_attrs.get("parameters"),
        "trained_parameters": trial.user_attrs.get("trained_parameters"),
        "last_step": trial.last_step,
        "last_value": trial.last_value,
        "started_at": None if trial.started_at is None else trial.started_at.isoformat(),
        "ended_at": None if trial.ended_at is None else trial.ended_at.isoformat(),
        "user_attrs": trial.user_attrs,
    }


def ran(of_trials: dict[int, tuple[int, str]], trial: TrialRecord) -> dict[str, Any]:
    """Return who ran the trial last, and how often it was begun."""
    attempts, worker = of_trials.get(trial.number, (0, None))
    return {"attempts": attempts, "worker": worker, "machine": worker and worker.rpartition(":")[0]}
