"""A trial under our lease: nobody else writes to it, so that reading it again takes no query."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from storage.coordination.claims import Claim
from storage.database.values import local_time
from storage.trials.frozen import copied
from storage.trials.params import external_of


class HeldTrial:
    """The lease's token, and the trial as far as it was read, kept up with what its holder writes.

    What another client writes to a trial that is not its own, such as a note, is not seen by the holder.
    """

    def __init__(self, claim: Claim) -> None:
        self.token = claim.token
        self._trial = None if claim.started is None else _new_trial(claim, claim.started)

    def read(self) -> FrozenTrial | None:
        """Return a copy of the trial, None before it was read."""
        return None if self._trial is None else copied(self._trial)

    def keep(self, trial: FrozenTrial) -> None:
        """Keep the trial as it was read just now."""
        self._trial = copied(trial)

    def end(self, state: TrialState, values: Sequence[float] | None, at: dt.datetime | None) -> None:
        """Set how the trial ended, and when: naive UTC."""
        if self._trial is not None:
            self._trial.state = state
            self._trial.values = None if values is None else [float(value) for value in values]
            self._trial.datetime_complete = local_time(at)

    def forget(self) -> None:
        """Have the trial read anew next time."""
        self._trial = None

    def add_param(self, name: str, internal: float, distribution: BaseDistribution) -> None:
        """Add what was written."""
        if self._trial is not None:
            self._trial.params[name] = external_of(distribution)(internal)
            self._trial.distributions[name] = distribution

    def add_report(self, step: int, value: float) -> None:
        """Add what was written."""
        if self._trial is not None:
            self._trial.intermediate_values[step] = value

    def add_attrs(self, attrs: Mapping[str, Any], *, system: bool) -> None:
        """Add what was written."""
        if self._trial is not None:
            (self._trial.system_attrs if system else self._trial.user_attrs).update(attrs)


def _new_trial(claim: Claim, started: dt.datetime) -> FrozenTrial:
    """Return a trial that the claim has just created."""
    return FrozenTrial(
        number=claim.number,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=local_time(started),
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=claim.trial_id,
    )
