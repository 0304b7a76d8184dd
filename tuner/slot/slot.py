"""A slot: one process that claims trials and runs them, for the worker that started it.

Started by `tuner.slot.start`. The worker writes lines to its standard input: first a `SlotConfig` as JSON, then
orders, a word each (`tuner.slot.orders.Order`). When it closes - also because the worker was killed - the slot gives
its trial back and exits. On its standard output the slot writes one line of JSON an event (`Event`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from storage.coordination import claims, control, standings
from storage.coordination import preflight as preflights
from storage.coordination.delivery import Result
from storage.database.engine import is_outage
from storage.database.errors import InvalidWriteError, LeaseLostError, StorageError, StudyHaltedError
from storage.database.sessions import OUTAGE_S, Backoff, Sessions
from storage.optuna_storage.storage import PostgresStorage
from storage.trials.curves import CurvePoint, finite
from tuner import cores
from tuner.errors import BrokenDeviceError, TunerError
from tuner.exits import exit_code
from tuner.objective import Objective
from tuner.seeds import set_deterministic
from tuner.slot import prints
from tuner.slot.attempt import (
    Outcome,
    TrialObjective,
    check_device,
    failed,
    warm_up,
)
from tuner.slot.audit import run_audited
from tuner.slot.checked_trial import CheckedTrial, StoppableStudy
from tuner.slot.ending import end_group, end_in_time, exit_again
from tuner.slot.kept_models import KeptModels
from tuner.slot.lease import Lease
from tuner.slot.loading import with_data
from tuner.slot.orders import Orders
from tuner.slot.preflight import preflight, refuse_leak
from tuner.slot.pruning import pruner_on
from tuner.slot.reports import Reports
from tuner.slot.shared_checkpoints import shared_checkpoint, sweep
from tuner.slot.spool import Spool
from tuner.slot.threads import Threads
from tuner.spec import Spec
from tuner.study.history import samplers
from tuner.study.joining import Study, check_code, checkpoint_directory, open_study
from tuner.study.registry import find_objective
from tuner.training import Interrupted, choose_device
from tuner.training.memory import free_memory

FIRST_POLL_S, POLL_S = 0.05, 1.0
"""How soon a slot asks again while other workers' trials hold the rest of the budget, or the study is paused: at first,
as the other's trial may be about to end, and at last, after twice as long each time."""
ALIVE_S = 5.0
"""How often at most a slot tells that its trial goes on."""


class SlotConfig(BaseModel):
    """What a worker tells its slot. `device` is what this process calls it; `shown_device` is the worker's name for it,
    of which the slot has the part `share`. `shares_cores_by` is how many slots the worker has; None where the number of
    threads was given, and is no share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    storage: str
    study: str
    worker: str
    objective: str
    data_dir: Path
    slot: int = 0
    device: str | None = None
    shown_device: str | None = None
    share: float = 1.0
    shares_cores_by: int | None = None
    allow_code_change: bool = False
    preflight: bool = True
    allow_leak: bool = False


class Event(BaseModel):
    """Something that happened in a slot; the worker logs it."""

    model_config = ConfigDict(frozen=True)

    event: Literal[
        "ready",
        "wants_trial",
        "nothing",
        "trial_started",
        "batch",
        "waiting",
        "report",
        "out_of_memory",
        "trial_ended",
        "trial_released",
        "result_kept",
        "database_away",
        "note",
        "broken",
        "refused",
        "done",
    ]
    trial: int | None = None
    attempt: int | None = None
    epoch: int | None = None
    token: str | None = None
    trial_id: int | None = None
    state: str | None = None
    value: float | None = None
    loss: float | None = None
    seconds: float | None = None
    device: str | None = None
    failure: str | None = None
    paused: bool | None = None
    message: str | None = None
    exit_code: int | None = None


class Slot:
    """Claims trials of one study and runs them, one after the other, each when it is told to."""

    def __init__(self, config: SlotConfig, emit: Callable[[Event], None], orders: Orders) -> None:
        self._config = config
        self._emit = emit
        self._orders = orders
        self._parent = os.getppid()
        self._away_at = -OUTAGE_S
        self._alive_at = -ALIVE_S
        self._code_hash = ""
        self._poisoned: Outcome | None = None  # by a device that failed: this process can use it no more
        self._retry = Backoff(stop=orders.stop, notice=self._tell_outage, is_away=self._note_outage)
        self._storage = PostgresStorage(config.storage, application_name=f"tuner {config.worker}", retry=self._retry)
        self._engine: Engine = self._storage.engine
        self._spool = Spool(config.data_dir)
        self._holder = claims.Holder(worker=config.worker, slot=config.slot, share=config.share)

    def run(self) -> None:
        """Run trials until none is left to run or the slot is asked to stop.

        Raises TunerError or StorageError if the study cannot be joined from here, BrokenDeviceError if the device
        fails.
        """
        study = self._retry(lambda: open_study(self._engine, self._config.study))
        what = self._load(study)
        shown = self._shown(what.device)
        self._holder = replace(self._holder, device=shown)
        sweep(study, self._config.data_dir, self._storage.sessions, what.log)
        self._models = KeptModels(study, self._config.data_dir, self._storage.sessions)
        searched = what.objective if isinstance(what.objective, Objective) else None
        self._sampler_of = samplers(self._storage.sessions, study, searched)
        optuna_study = StoppableStudy(
            study.name,
            self._storage,
            sampler=self._sampler_of(0),
            pruner=pruner_on(self._storage, study.study_id, study.spec.pruner, study.budget.trials),
        )
        if searched is not None:
            self._try_first(study, what, searched)
        self._emit(Event(event="ready", device=shown))
        poll_s = FIRST_POLL_S
        while True:
            self._emit(Event(event="wants_trial"))
            if not self._orders.wait_for("claim"):
                return
            others_may_be_lost = time.monotonic() - self._away_at > standings.RETURN_S
            claimed = claims.claim(
                self._storage.sessions, study.study_id, study.budget, self._holder, sweep=others_may_be_lost
            )
            if isinstance(claimed, claims.Claim):
                self._run_claimed(study, optuna_study, what, claimed)
                poll_s = FIRST_POLL_S
                continue
            if claimed.final:
                self._emit(Event(event="done", message=claimed.advice))
                return
            self._emit(Event(event="nothing", message=claimed.reason, paused=claimed.paused))
            self._orders.stop.wait(poll_s)
            poll_s = min(2 * poll_s, POLL_S)

    def _shown(self, device: torch.device) -> str:
        """Return the worker's name for the device, where it is the one that the worker had in mind."""
        wanted = self._config.shown_device
        if wanted is None or wanted.partition(":")[0] == device.type:
            return wanted or str(device)
        self._note(f"torch cannot use {wanted}, which this machine has, and takes {device} instead")
        return str(device)

    def _load(self, study: Study) -> TrialObjective:
        source = find_objective(self._config.objective)
        check_code(study, source, allow_code_change=self._config.allow_code_change)
        self._code_hash = source.code_hash()
        objective, data = with_data(study.spec, self._config.objective, self._config.data_dir)
        set_deterministic(study.spec.training.deterministic)  # before anything is computed
        device = choose_device(self._config.device)
        check_device(device)
        warm_up(device)
        self._threads = Threads(self._share_of_cores(study.spec), study.spec.training, device, self._note)
        return TrialObjective.load(
            study.spec,
            objective,
            self._config.data_dir,
            device,
            data=data,
            share=self._config.share,
            checkpoints=checkpoint_directory(self._config.data_dir, study),
            log=self._note,
        )

    def _share_of_cores(self, spec: Spec) -> Callable[[], int] | None:
        by, config = self._config.shares_cores_by, self._config
        share = partial(cores.share, config.worker, by or 1, config.data_dir, counts_idle=spec.training.deterministic)
        return None if by is None else share

    def _note(self, line: str) -> None:
        self._emit(Event(event="note", message=line))

    def _try_first(self, study: Study, what: TrialObjective, objective: Objective) -> None:
        """Take a model through all that is needed in the end, unless that was done; one slot of all does so.

        Raises TunerError if no trial can run.
        """
        assert what.data is not None
        done = (study.study_id, self._code_hash)
        is_due = partial(preflights.is_due, self._storage.sessions, *done, study.spec.objective.code_hash)
        if what.identical is not None and not self._config.allow_leak and is_due():
            refuse_leak(objective, what.identical)
        while self._config.preflight and not self._is_abandoned() and is_due():
            try:
                with preflights.turn(self._engine, study.study_id) as is_mine:
                    if is_mine and is_due():
                        lacks = preflight(objective, study.spec, what.data, what.device)
                        for line in lacks:
                            self._note(f"pre-flight: {line}")
                        preflights.record(self._storage.sessions, *done, lacks)
                        return
            except (StorageError, SQLAlchemyError) as error:  # of the turn: others may have taken it
                if not is_outage(error):
                    raise
            self._orders.stop.wait(FIRST_POLL_S)

    def _run_claimed(
        self, study: Study, optuna_study: StoppableStudy, what: TrialObjective, held: claims.Claim
    ) -> None:
        """Run one claimed trial to its end, or until it is given back or lost. Raises BrokenDeviceError."""
        self._storage.hold(held)
        told: dict[str, Any] = {"trial": held.number, "attempt": held.attempt}
        self._emit(Event(event="trial_started", token=str(held.token), trial_id=held.trial_id, **told))
        prints.mark(held.number)
        self._threads.start()
        try:
            with Lease(Sessions(self._engine), held) as lease:
                self._run_held(study, optuna_study, what, held, lease)
        except Interrupted:
            self._release(study, held)
        except StudyHaltedError as error:
            self._release(study, held, str(error))
        except (KeyError, LeaseLostError, UpdateFinishedTrialError) as error:  # KeyError: the study was deleted
            self._emit(Event(event="trial_released", message=_first_line(error), **told))
        except (StorageError, SQLAlchemyError) as error:
            if not is_outage(error):
                raise
            self._emit(Event(event="database_away", message=_first_line(error), **told))
            self._release(study, held, "the database was away for too long")
        finally:
            prints.mark(None)
            self._storage.let_go(held)
        if self._poisoned is not None:
            exit_again(self._parent)  # whatever became of the trial
        if what.device.type != "cpu":
            free_memory()  # of a trial that was given back, too

    def _run_held(
        self, study: Study, optuna_study: StoppableStudy, what: TrialObjective, held: claims.Claim, lease: Lease
    ) -> None:
        what = replace(what, shared=shared_checkpoint(study, self._storage, held), threads=self._threads)
        optuna_study.stop_asked = False
        optuna_study.sampler = self._sampler_of(held.number)
        trial, outcome, is_written = self._attempt(optuna_study, what, held, lease)
        if outcome.failure == "oom" and self._config.share < 1:
            told: dict[str, Any] = {"trial": held.number, "attempt": held.attempt}
            self._emit(Event(event="out_of_memory", message=outcome.message, **told))
            if not self._orders.wait_for("alone"):
                raise Interrupted
            if not claims.restart(self._storage.sessions, held):
                raise LeaseLostError(f"trial {held.number} was taken while it waited for the device")
            self._storage.hold(held)
            optuna_study.sampler = self._sampler_of(held.number)
            trial, outcome, is_written = self._attempt(optuna_study, what, held, lease)
        if outcome.failure == "infrastructure":
            self._give_up(study, held, outcome)
        if outcome.state == TrialState.FAIL and self._is_abandoned():
            raise Interrupted  # what it failed by may be the worker's end: a print into a closed pipe
        if is_written:
            self._end(optuna_study, what, held, trial, outcome)
        else:
            self._keep(optuna_study, held, trial, outcome)

    def _attempt(
        self, optuna_study: StoppableStudy, what: TrialObjective, held: claims.Claim, lease: Lease
    ) -> tuple[CheckedTrial, Outcome, bool]:
        """Run the trial from its start or its checkpoint; also returns whether all that it reported is written."""

        def write(point: CurvePoint) -> None:
            self._storage.report(held.trial_id, point)

        def written(point: CurvePoint) -> None:
            told: dict[str, Any] = {"trial": held.number, "attempt": held.attempt, "epoch": point.step}
            loss = finite(point.train_loss)
            self._emit(Event(event="report", value=point.value, loss=loss, seconds=point.seconds, **told))

        with Reports(write, written) as reports:

            def check() -> None:
                if lease.lost.is_set():  # whoever holds the trial now has its checkpoint too
                    raise LeaseLostError(f"the lease on trial id {held.trial_id} was lost: another worker may run it")
                reports.check()
                if self._is_abandoned():
                    raise Interrupted
                self._threads.look()

            trial = CheckedTrial(
                optuna_study, held.trial_id, check, reports, self._retry, partial(self._tell_alive, "batch")
            )
            outcome = run_audited(what, trial)
            if outcome.is_poisoned:
                self._poisoned = outcome  # for as long as this process lives: see `Outcome.error`
            if outcome.failure == "infrastructure":
                return trial, outcome, True  # it is run again, without them
            return trial, outcome, not reports.flush(OUTAGE_S, self._orders.stop)

    def _end(
        self,
        optuna_study: StoppableStudy,
        what: TrialObjective,
        held: claims.Claim,
        trial: CheckedTrial,
        outcome: Outcome,
    ) -> None:
        """Write the trial's result, or keep it on disk if the database does not take it."""
        try:
            if optuna_study.stop_asked:
                control.set_state(self._storage.sessions, held.study_id, "stopped")
                self._note(f"trial {held.number} stopped the study")
            attrs = {**outcome.attrs, **self._models.keep_if_best(held, outcome.value, outcome.kept, what.log)}
            self._storage.set_trial_user_attrs(held.trial_id, attrs)
            optuna_study.tell(trial, outcome.value, outcome.state, skip_if_finished=True)
        except (StorageError, SQLAlchemyError) as error:
            if not is_outage(error):
                raise
            self._keep(optuna_study, held, trial, outcome)
            return
        except InvalidWriteError as error:  # such as a metric's name that no database takes
            self._end(optuna_study, what, held, trial, failed("user_error", str(error)))
            return
        if (checkpoint := what.checkpoint(held.number, trial.params)) is not None:
            checkpoint.delete()
        if outcome.kept is not None:
            self._models.tidy(what.log)
        self._emit(
            Event(
                event="trial_ended",
                trial=held.number,
                attempt=held.attempt,
                state=outcome.state.name,
                value=outcome.value,
                seconds=outcome.attrs.get("seconds"),
                failure=outcome.failure,
                message=outcome.message or None,
            )
        )

    def _keep(self, optuna_study: StoppableStudy, held: claims.Claim, trial: CheckedTrial, outcome: Outcome) -> None:
        reports = [point for _, point in sorted(trial.reported.items())]
        value = reports[-1].value if outcome.state == TrialState.PRUNED and reports else outcome.value
        result = Result(token=held.token, state=outcome.state, value=value, attrs=outcome.attrs, reports=reports)
        told: dict[str, Any] = {"trial": held.number, "attempt": held.attempt}
        try:
            path = self._spool.add(optuna_study.study_name, held.number, result)
        except OSError as error:
            message = f"the database is away, and the result cannot be kept either: {error}"
            self._emit(Event(event="trial_released", message=message, **told))
            return
        message = f"the database is away: the result waits in {path} for the next worker on this machine"
        self._emit(Event(event="result_kept", state=outcome.state.name, value=value, message=message, **told))

    def _is_abandoned(self) -> bool:
        """Whether the slot was asked to stop, or its worker is gone and could not ask any more."""
        return self._orders.stop.is_set() or os.getppid() != self._parent

    def _release(self, study: Study, held: claims.Claim, why: str | None = None) -> None:
        """Put the trial back, at no cost of its attempts; if the database is away, its lease runs out instead."""
        given_back = claims.GivenBack(outcome="released", reason=why or "its worker was stopped", counts=False)
        try:
            claims.release(self._storage.sessions, held, given_back, study.budget.max_attempts)
        except (StorageError, SQLAlchemyError) as error:
            if not is_outage(error):
                raise
            why = f"the database is away, so that its lease has to run out: {_first_line(error)}"
        self._emit(Event(event="trial_released", trial=held.number, attempt=held.attempt, message=why))

    def _give_up(self, study: Study, held: claims.Claim, outcome: Outcome) -> None:
        """Put the trial back, at the cost of an attempt, and raise BrokenDeviceError."""
        why = claims.GivenBack(outcome="lost", reason=outcome.message, counts=True, failure="infrastructure")
        claims.release(self._storage.sessions, held, why, study.budget.max_attempts)
        self._emit(
            Event(
                event="trial_released",
                trial=held.number,
                attempt=held.attempt,
                failure=outcome.failure,
                message=outcome.message,
            )
        )
        raise BrokenDeviceError(outcome.message)

    def _tell_outage(self, error: Exception) -> None:
        self._emit(Event(event="database_away", message=_first_line(error)))

    def _note_outage(self, error: BaseException) -> bool:
        if is_outage(error):
            self._away_at = time.monotonic()
            self._tell_alive("waiting")
            return True
        return False

    def _tell_alive(self, how: Literal["batch", "waiting"]) -> None:
        now = time.monotonic()
        if now - self._alive_at >= ALIVE_S:
            self._alive_at = now
            self._emit(Event(event=how))


def _first_line(error: BaseException) -> str:
    """Return our own message where there is one: it says what to do."""
    shown = error if isinstance(error, StorageError) else error.__cause__ or error
    return str(shown).strip().partition("\n")[0]


def main() -> None:
    """Run a slot for the worker at the other end of the standard streams."""
    # What an objective prints goes to stderr: stdout carries the events.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # Orders come on a stream of their own: a process that is forked, as those that read samples are, closes
    # sys.stdin, and would wait for ever for the thread that was reading it.
    stream = os.fdopen(os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the worker's to handle
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    one_at_a_time = threading.Lock()

    def emit(event: Event) -> None:
        line = json.dumps(event.model_dump(exclude_none=True)) + "\n"  # in ASCII, whatever an error's message holds
        with one_at_a_time, suppress(BrokenPipeError):  # the worker is gone; the end of stdin says so
            events.write(line)

    line = stream.readline()
    if not line:
        return
    orders, worker = Orders(stream), os.getppid()
    threading.Thread(target=end_in_time, args=(orders.stop,), daemon=True).start()
    try:
        Slot(SlotConfig.model_validate_json(line), emit, orders).run()
    except BrokenDeviceError as error:
        emit(Event(event="broken", message=str(error)))
        exit_again(worker)
    except (TunerError, StorageError, ValidationError) as error:
        code = exit_code(error)
        emit(Event(event="refused", message=str(error), exit_code=code))
        sys.exit(code)
    finally:
        if os.getppid() != worker:
            end_group()
