"""A worker's connection to a study, as stock Optuna and as tuner have it, for trials that train nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage, get_storage

from storage import PostgresStorage, parse_url
from storage.coordination import claims, standings
from storage.optuna_storage.pruning import IndexedPercentilePruner
from storage.trials.curves import CurvePoint

BUDGET = standings.Budget(trials=10**9, timeout_s=None, max_failures=0, max_attempts=1)


class Side(Protocol):
    """A worker that prunes by the median."""

    study: optuna.Study

    def claim(self) -> optuna.Trial:
        """Start a trial."""

    def report(self, trial: optuna.Trial, value: float, step: int) -> None:
        """Report a value; ours with what else a slot keeps of an epoch."""

    def tell(self, trial: optuna.Trial, value: float) -> None:
        """End a trial."""

    def close(self) -> None:
        """Close the connections."""


class Stock:
    """A worker as Optuna's documentation has it."""

    def __init__(self, url: str, name: str, sampler: BaseSampler) -> None:
        self._storage = RDBStorage(parse_url(url).render_as_string(hide_password=False))
        self.study = optuna.load_study(
            study_name=name,
            storage=get_storage(self._storage),
            sampler=sampler,
            pruner=optuna.pruners.MedianPruner(),
        )

    def claim(self) -> optuna.Trial:
        return self.study.ask()

    def report(self, trial: optuna.Trial, value: float, step: int) -> None:
        trial.report(value, step)

    def tell(self, trial: optuna.Trial, value: float) -> None:
        self.study.tell(trial, value)

    def close(self) -> None:
        self._storage.remove_session()
        self._storage.engine.dispose()


class Ours:
    """A worker that calls what a slot of tuner's does."""

    def __init__(self, url: str, name: str, sampler: BaseSampler) -> None:
        self._storage = PostgresStorage(url)
        study_id = self._storage.get_study_id_from_name(name)
        self.study = optuna.load_study(
            study_name=name,
            storage=self._storage,
            sampler=sampler,
            pruner=IndexedPercentilePruner(self._storage, study_id, 50.0),
        )
        self._held: claims.Claim | None = None

    def claim(self) -> optuna.Trial:
        held = claims.claim(
            self._storage.sessions, self.study._study_id, BUDGET, claims.Holder(worker=f"worker {os.getpid()}")
        )
        assert isinstance(held, claims.Claim)
        self._held = held
        self._storage.hold(held)
        return optuna.Trial(self.study, held.trial_id)

    def report(self, trial: optuna.Trial, value: float, step: int) -> None:
        details = {
            "train_loss": 0.25,
            "seconds": 1.5,
            "rates": (0.01,),
            "metrics": {"accuracy": value, "recall": value},
        }
        self._storage.report(trial._trial_id, CurvePoint(step=step, value=value, **details))

    def tell(self, trial: optuna.Trial, value: float) -> None:
        self._storage.set_trial_user_attrs(trial._trial_id, {"seconds": 0.0, "seed": trial.number})
        self.study.tell(trial, value)
        assert self._held is not None
        self._storage.let_go(self._held)

    def close(self) -> None:
        self._storage.engine.dispose()


class WithoutCurves(Ours):
    """A worker of ours that keeps of an epoch what it reports alone, as one of another program does."""

    def report(self, trial: optuna.Trial, value: float, step: int) -> None:
        self._storage.report(trial._trial_id, CurvePoint(step=step, value=value))


SIDES: dict[str, Callable[[str, str, BaseSampler], Side]] = {"stock": Stock, "ours": Ours}
