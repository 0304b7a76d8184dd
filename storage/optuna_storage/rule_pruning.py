"""Pruners that ask rungs: one for any storage of Optuna's, and one that decides the same from an index of ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from optuna.pruners import BasePruner
from optuna.study import StudyDirection

from storage.optuna_storage.rule_index import RuleIndex
from storage.optuna_storage.rule_tables import PRUNED_AT, Tables, best_so_far, minimized
from storage.optuna_storage.rules import ETA, Reached, Rungs, standard_rungs

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from storage.optuna_storage.storage import PostgresStorage


class RulePruner(BasePruner):
    """Stops a trial if its rule does, by what the study's trials have reported by now: the same whoever asks.

    It is to be asked after each report. What a trial reported that was to be pruned, and ran on for an audit,
    counts up to there.
    """

    def __init__(self, rule: Rungs) -> None:
        self.rule = rule

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the rule stops the trial at its last report."""
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        bests = best_so_far(minimized(trial.intermediate_values, sign))
        if not bests:
            return False
        step = len(bests) - 1
        if step not in self.rule.steps:
            return False
        return self.rule.stops(step, bests[-1], self._history(study, trial, sign, bests))

    def _history(self, study: Study, trial: FrozenTrial, sign: float, bests: list[float]) -> Reached:
        others = study.get_trials(deepcopy=False)
        tables = _tables_of((other for other in others if other.number != trial.number), sign)
        for step, best in enumerate(bests):
            tables.report(step, best)
        return tables


def _tables_of(trials: Iterable[FrozenTrial], sign: float) -> Tables:
    """Return what Optuna's trials reported; `sign` is -1 where more is better."""
    tables = Tables()
    for trial in trials:
        values = minimized(trial.intermediate_values, sign, trial.user_attrs.get(PRUNED_AT))
        for step, best in enumerate(best_so_far(values)):
            tables.report(step, best)
    return tables


class RungsPruner(RulePruner):
    """Stops a trial that is not among the best 1/`eta` of all that came as far: at a tenth, and where that doubles.

    The first two trials are stopped at a tenth, unless the study is of fewer than six `trials`. `epochs` is how often a
    trial reports.
    """

    def __init__(self, epochs: int, eta: float = ETA, trials: int | None = None) -> None:
        super().__init__(standard_rungs(epochs, eta, trials))


class IndexedRulePruner(RulePruner):
    """Decides as `RulePruner` with this rule does, in large studies as fast as in small.

    A decision that needs other trials costs one query: for what finished since the last, and for what those reported
    that run. The first one reads the history. It serves the one study that it was made for, and any number of threads,
    one at a time. A decision that cannot reach the database raises what `storage` raises, and leaves it as it was.
    """

    def __init__(self, storage: PostgresStorage, study_id: int, rule: Rungs) -> None:
        super().__init__(rule)
        self._index = RuleIndex(storage.sessions, study_id, rule.steps)

    def _history(self, study: Study, trial: FrozenTrial, sign: float, bests: list[float]) -> Reached:
        del study
        return self._index.history(trial._trial_id, len(bests) - 1, bests[-1], sign)
