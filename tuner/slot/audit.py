"""A trial that would have been pruned, and runs on to see whether that would have been right."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from optuna.trial import TrialState

from storage.optuna_storage.rule_tables import PRUNED_AT
from tuner.slot.attempt import Outcome, TrialObjective, run_attempt
from tuner.slot.checked_trial import CheckedTrial
from tuner.study.audits import SECONDS, VALUE


def run_audited(what: TrialObjective, trial: CheckedTrial) -> Outcome:
    """Run the trial as `run_attempt` does; one that the study's draw audits does not end where it would be pruned.

    It ends PRUNED nonetheless, once it has run to its end, and what it came to is in its attributes: samplers, pruners
    and whoever looks for the best trial take it for a pruned one without being told. One that diverged since came to
    nothing; of other failures people should know.
    """
    trial.is_audited = what.spec.is_audited(trial.number)
    outcome = run_attempt(what, trial)
    if trial.pruned_at is None or (outcome.state == TrialState.FAIL and outcome.failure != "nan"):
        return outcome
    attrs = {name: its for name, its in outcome.attrs.items() if name not in ("failure", "failure_message")}
    seconds = round(time.monotonic() - trial.audited_since, 3)
    told: dict[str, Any] = {PRUNED_AT: trial.pruned_at, VALUE: outcome.value, SECONDS: seconds}
    return replace(outcome, state=TrialState.PRUNED, value=None, attrs={**attrs, **told}, kept=None)
