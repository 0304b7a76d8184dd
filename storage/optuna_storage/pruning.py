"""Optuna's percentile and median pruners, deciding from an index of what finished trials reported."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from optuna.pruners import PercentilePruner
from optuna.study import StudyDirection

from storage.trials.finished import FinishedTrials

if TYPE_CHECKING:
    from collections.abc import Iterable

    from optuna import Study
    from optuna.trial import FrozenTrial

    from storage.optuna_storage.storage import PostgresStorage


class IndexedPercentilePruner(PercentilePruner):
    """Decides as `optuna.pruners.PercentilePruner` of the same settings does, in large studies as fast as in small.

    With a percentile of 50 it decides as `MedianPruner`. Where Optuna's goes through all finished trials for
    each decision, this one reads a finished trial once: a decision costs one query for what has finished since
    the last, and a look at two values of the step, which are kept sorted. A report of a trial that is held brings
    the query's answer along; a decision within a second after it goes by that. The query looks up each trial that
    is running or waiting: 1,000 of them take it 0.8 ms longer. The first decision reads the history, by two queries.
    Other processes, stock Optuna's too, may change the study meanwhile.

    It serves the one study that it was made for, and any number of threads, one at a time. A decision that cannot
    reach the database raises what `storage` raises, and leaves the pruner as it was.
    """

    def __init__(
        self,
        storage: PostgresStorage,
        study_id: int,
        percentile: float,
        n_startup_trials: int = 5,
        n_warmup_steps: int = 0,
        interval_steps: int = 1,
        *,
        n_min_trials: int = 1,
    ) -> None:
        super().__init__(percentile, n_startup_trials, n_warmup_steps, interval_steps, n_min_trials=n_min_trials)
        self._finished = FinishedTrials(storage.sessions, study_id)
        storage.follow(self._finished)

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial's best value is worse than the percentile of the finished trials at its last step.

        Reads nothing from `study` but its direction.
        """
        step = trial.last_step
        if step is None or not self._is_due(step, trial.intermediate_values):
            return False
        maximize = study.direction == StudyDirection.MAXIMIZE
        with self._finished.up_to_date(trial._trial_id, step):
            if self._finished.count < max(self._n_startup_trials, 1):
                return False
            values = [value for value in trial.intermediate_values.values() if not math.isnan(value)]
            if not values:
                return True
            reports = self._finished.at(step)
            if reports.count < self._n_min_trials:
                return False
            # NaN, which infinities make as well, is neither above nor below anything.
            if maximize:
                return max(values) < reports.percentile(100 - self._percentile)
            return min(values) > reports.percentile(self._percentile)

    def _is_due(self, step: int, reported: Iterable[int]) -> bool:
        """Whether a check was due at the trial's last step or since the one before it."""
        if step < self._n_warmup_steps:
            return False
        interval, warmup = self._interval_steps, self._n_warmup_steps
        latest_check = (step - warmup) // interval * interval + warmup
        return max((other for other in reported if other != step), default=-1) < latest_check
