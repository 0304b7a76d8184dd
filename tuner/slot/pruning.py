"""The pruner of a slot, which decides from what its storage has read already."""

from __future__ import annotations

from typing import Any

from optuna.pruners import BasePruner, PercentilePruner

from storage.optuna_storage.pruning import IndexedPercentilePruner
from storage.optuna_storage.rule_pruning import IndexedRulePruner, RulePruner
from storage.optuna_storage.storage import PostgresStorage
from tuner.spec import PrunerSpec
from tuner.study.sampling import build_pruner


def pruner_on(storage: PostgresStorage, study_id: int, spec: PrunerSpec, trials: int | None = None) -> BasePruner:
    """Return the pruner of a study of so many trials; for those that have an index one that decides the same by it."""
    pruner = build_pruner(spec, trials)  # refuses settings that it does not have
    if isinstance(pruner, RulePruner):
        return IndexedRulePruner(storage, study_id, pruner.rule)
    if not isinstance(pruner, PercentilePruner):
        return pruner
    settings: dict[str, Any] = {"percentile": 50.0, **spec.settings}
    return IndexedPercentilePruner(storage, study_id, **settings)
