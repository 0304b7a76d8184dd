"""The trial that an objective is given: Optuna's, checked against what a study can hold."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution

from storage.database.errors import UnreachableError
from storage.database.sessions import Backoff
from storage.optuna_storage.rule_tables import PRUNED_AT
from storage.trials.curves import CurvePoint
from tuner import training
from tuner.slot.own_checkpoint import RESUMABLE
from tuner.slot.reports import Reports
from tuner.study.params import as_param, check_distribution

if TYPE_CHECKING:
    from tuner.slot.own_loop import OwnLoop

MAX_STEP = 2**31 - 1  # a PostgreSQL integer


class InvalidReportError(ValueError):
    """An objective reported or returned what a study cannot hold."""


class StoppableStudy(optuna.Study):
    """The study as an objective sees it by `trial.study`."""

    stop_asked = False

    def stop(self) -> None:
        """Stop the study, for all of its workers, once the trial at hand has ended."""
        self.stop_asked = True


class CheckedTrial(optuna.Trial):
    """A trial that refuses what the database cannot hold, and that `check` can interrupt at each report."""

    def __init__(
        self,
        study: optuna.Study,
        trial_id: int,
        check: Callable[[], None],
        reports: Reports | None = None,
        retry: Backoff | None = None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """`reports` writes the reports, which are written at once without; `retry` is the study's storage's."""
        super().__init__(study, trial_id)
        self.alive = alive
        """To be called with each batch, for who watches."""
        self.check = check
        """Raises Interrupted or LeaseLostError if the attempt has to end."""
        self.reported: dict[int, CurvePoint] = {}
        """What was reported, by step, also what is not written yet."""
        self.loop: OwnLoop | None = None
        """What a plain function may ask of its slot; None for an objective's trial."""
        self.saves_next = False
        """Whether the function has loaded or saved its state since its last report, and is about to save it again."""
        self.is_audited = False
        """Whether the trial, if it is to be pruned, runs on to its end instead."""
        self.pruned_at: int | None = self._cached_frozen_trial.user_attrs.get(PRUNED_AT)
        """At which step the trial was to be pruned that runs on, by this attempt or an earlier one."""
        self.audited_since = time.monotonic()
        self._reports = reports
        self._retry = retry

    def report(self, value: float, step: int) -> None:
        """Report as Optuna does; while the database is away, return before the report is written.

        Raises Interrupted, DivergedError for NaN or infinity, InvalidReportError for a bad step.
        """
        self.report_point(CurvePoint(step=step, value=value))

    def report_point(self, point: CurvePoint) -> None:
        """Report a value, as `report` does, with what else is known of its epoch.

        A trial that is to be given back is not while its function is about to save its state, which then ends it.
        """
        put_off, self.saves_next = RESUMABLE if self.saves_next else (), False
        with suppress(*put_off):
            self.check()
        step, value = point.step, float(math.nan if point.value is None else point.value)
        if not 0 <= step <= MAX_STEP or int(step) != step:
            raise InvalidReportError(f"a step needs to be a whole number in 0..{MAX_STEP}, got {step}")
        step = int(step)
        if not math.isfinite(value):
            raise training.DivergedError(f"the reported value is {value} at step {step}")
        known = self._cached_frozen_trial.intermediate_values
        if self._reports is None or step in known:
            super().report(value, step)
            return
        point = replace(point, step=step, value=value)
        with suppress(*put_off):
            self._reports.put(point)
        known[step], self.reported[step] = value, point

    @property
    def values_by_step(self) -> dict[int, float]:
        """What was reported."""
        return dict(self._cached_frozen_trial.intermediate_values)

    def should_prune(self) -> bool:
        """Decide as Optuna does; not to prune while the database is away, nor a trial that is audited."""
        if self._reports is None or self._retry is None:
            return self._is_to_end()
        if self._reports.is_behind:
            return False
        try:
            with self._retry.at_once():
                return self._is_to_end()
        except UnreachableError:
            return False

    def _is_to_end(self) -> bool:
        """Whether the trial is to end here as pruned. One that is audited is marked, and then asks no more."""
        if self.pruned_at is not None or not super().should_prune():
            return False
        if not self.is_audited:
            return True
        self.pruned_at = max(self._cached_frozen_trial.intermediate_values)
        self.audited_since = time.monotonic()
        self.set_user_attr(PRUNED_AT, self.pruned_at)  # for the decisions on others; its end writes it again
        return False

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        """Suggest as Optuna does, but a queued value as the param's own type. Raises ParamError if it cannot be one."""
        if name not in self._cached_frozen_trial.distributions:
            check_distribution(name, distribution)
            if name in self._fixed_params:
                value = as_param(name, distribution, self._fixed_params[name])
                self._fixed_params = {**self._fixed_params, name: value}
        return super()._suggest(name, distribution)
