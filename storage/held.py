"""A trial under our lease: nobody else writes to it, so that reading it again takes no query."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from storage.frozen import copied, external_of


class HeldTrial:
    """The lease's token, and the trial as far as it was read, kept up with what its holder writes.

    What another client writes to a trial that is not its own, such as a note, is not seen by the holder.
    """

    def __init__(self, token: uuid.UUID) -> None:
        self.token = token
        self._trial: FrozenTrial | None = None

    def read(self) -> FrozenTrial | None:
        """Return a copy of the trial, None before it was read."""
        return None if self._trial is None else copied(self._trial)

    def keep(self, trial: FrozenTrial) -> None:
        """Keep the trial as it was read just now."""
        self._trial = copied(trial)

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
