"""A slot: one process that claims trials and runs them, for the worker that started it.

Started as `python -m tuner.slot`. The worker writes one line of JSON, a `SlotConfig`, to its standard input and
keeps it open: when it closes - also because the worker was killed - the slot gives its trial back and exits.
On its standard output the slot writes one line of JSON an event (`Event`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, PercentilePruner
from optuna.trial import TrialState
from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from storage import claims
from storage.engine import is_outage
from storage.errors import LeaseLostError, StorageError, StudyHaltedError, UnreachableError
from storage.postgres import PostgresStorage
from storage.pruning import IndexedPercentilePruner
from storage.sessions import Backoff, Sessions
from tuner.attempt import CheckedTrial, TrialObjective, run_attempt
from tuner.errors import EXIT_UNREACHABLE, TunerError
from tuner.registry import build_objective, find_objective, is_objective_class
from tuner.sampling import build_pruner, build_sampler
from tuner.shared import shared_checkpoint, sweep
from tuner.spec import PrunerSpec
from tuner.study import Study, check_code, checkpoint_directory, open_study
from tuner.training import Interrupted, choose_device

T = TypeVar("T")

POLL_S = 1.0
"""How often a slot asks again while other workers' trials hold the rest of the budget, or the study is paused."""


class SlotConfig(BaseModel):
    """What a worker tells its slot. `trials` is how many trials it may run, None for as many as there are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    storage: str
    study: str
    worker: str
    objective: str
    data_dir: Path
    device: str | None = None
    trials: int | None = None
    allow_code_change: bool = False


class Event(BaseModel):
    """Something that happened in a slot; the worker logs it."""

    model_config = ConfigDict(frozen=True)

    event: Literal[
        "ready", "trial_started", "trial_ended", "trial_released", "database_away", "paused", "note", "refused", "done"
    ]
    trial: int | None = None
    attempt: int | None = None
    token: str | None = None
    trial_id: int | None = None
    state: str | None = None
    value: float | None = None
    seconds: float | None = None
    message: str | None = None
    exit_code: int | None = None


class Slot:
    """Claims trials of one study and runs them, one after the other."""

    def __init__(self, config: SlotConfig, emit: Callable[[Event], None], stop: threading.Event) -> None:
        self._config = config
        self._emit = emit
        self._stop = stop
        self._parent = os.getppid()
        self._is_paused = False
        self._retry = Backoff(stop=stop, notice=self._tell_outage)
        self._storage = PostgresStorage(config.storage, application_name=f"tuner {config.worker}", retry=self._retry)
        self._engine: Engine = self._storage.engine

    def run(self) -> None:
        """Run trials until the budget is used up, `config.trials` are done, or the slot is asked to stop.

        Raises TunerError or StorageError if the study cannot be joined from here.
        """
        study = self._retry(lambda: open_study(self._engine, self._config.study))
        what = self._load(study)
        sweep(study, self._config.data_dir, self._storage.sessions, what.log)
        optuna_study = optuna.load_study(
            study_name=study.name,
            storage=self._storage,
            sampler=build_sampler(study.spec.sampler, study.spec.seed, 0),
            pruner=pruner_on(self._storage, study.study_id, study.spec.pruner),
        )
        self._emit(Event(event="ready"))
        ran = 0
        reason = "the slot was asked to stop"
        while not self._stop.is_set():
            if ran == self._config.trials:
                reason = f"this slot ran its {ran} trials"
                break
            claimed = claims.claim(
                self._storage.sessions, study.study_id, study.budget, claims.Holder(worker=self._config.worker)
            )
            if isinstance(claimed, claims.NothingToClaim):
                if claimed.final:
                    reason = claimed.reason
                    break
                self._wait(claimed)
                continue
            self._is_paused = False
            ran += self._run_claimed(study, optuna_study, what, claimed)
        self._emit(Event(event="done", message=reason))

    def _wait(self, nothing: claims.NothingToClaim) -> None:
        if nothing.paused and not self._is_paused:
            self._emit(Event(event="paused", message=nothing.reason))
        self._is_paused = nothing.paused
        self._stop.wait(POLL_S)

    def _load(self, study: Study) -> TrialObjective:
        source = find_objective(self._config.objective)
        check_code(study, source, allow_code_change=self._config.allow_code_change)
        kind = source.load()
        objective = (
            build_objective(kind, study.spec.objective.options, study.spec.seed) if is_objective_class(kind) else kind
        )
        device = choose_device(self._config.device)
        return TrialObjective.load(
            study.spec,
            objective,
            self._config.data_dir,
            device,
            checkpoints=checkpoint_directory(self._config.data_dir, study),
            log=lambda line: self._emit(Event(event="note", message=line)),
        )

    def _run_claimed(self, study: Study, optuna_study: optuna.Study, what: TrialObjective, held: claims.Claim) -> bool:
        """Run one claimed trial; return whether it ended (and was not given back or lost)."""
        self._storage.hold(held)
        try:
            return self._run_held(study, optuna_study, what, held)
        except StudyHaltedError as error:
            self._release(study, held, str(error))
            return False
        except (KeyError, LeaseLostError, UpdateFinishedTrialError) as error:  # KeyError: the study was deleted
            message = _first_line(error)
            self._emit(Event(event="trial_released", trial=held.number, attempt=held.attempt, message=message))
            return False
        finally:
            self._storage.let_go(held)

    def _run_held(self, study: Study, optuna_study: optuna.Study, what: TrialObjective, held: claims.Claim) -> bool:
        what = replace(what, shared=shared_checkpoint(study, self._storage, held))
        told: dict[str, Any] = {"trial": held.number, "attempt": held.attempt}
        self._emit(Event(event="trial_started", token=str(held.token), trial_id=held.trial_id, **told))
        optuna_study.sampler = build_sampler(study.spec.sampler, study.spec.seed, held.number)
        with Lease(self._engine, held) as lease:

            def check() -> None:
                if lease.lost.is_set():  # whoever holds the trial now has its checkpoint too
                    raise LeaseLostError(f"the lease on trial id {held.trial_id} was lost: another worker may run it")
                if self._is_abandoned():
                    raise Interrupted

            try:
                trial = CheckedTrial(optuna_study, held.trial_id, check)
                outcome = run_attempt(what, trial)
            except Interrupted:
                self._release(study, held)
                return False
            except (StorageError, SQLAlchemyError) as error:
                if not is_outage(error):
                    raise
                self._emit(Event(event="database_away", message=_first_line(error), **told))
                self._release(study, held)
                return False
        if outcome.state == TrialState.FAIL and self._is_abandoned():
            self._release(study, held)  # what it failed by may be the worker's end: a print into a closed pipe
            return False
        self._storage.set_trial_user_attrs(held.trial_id, outcome.attrs)
        optuna_study.tell(trial, outcome.value, outcome.state, skip_if_finished=True)
        if (checkpoint := what.checkpoint(held.number, trial.params)) is not None:
            checkpoint.delete()
        seconds = outcome.attrs.get("seconds")
        message = outcome.attrs.get("failure_message")
        self._emit(
            Event(
                event="trial_ended",
                state=outcome.state.name,
                value=outcome.value,
                seconds=seconds,
                message=message,
                **told,
            )
        )
        return True

    def _is_abandoned(self) -> bool:
        """Whether the slot was asked to stop, or its worker is gone and could not ask any more."""
        return self._stop.is_set() or os.getppid() != self._parent

    def _release(self, study: Study, held: claims.Claim, why: str | None = None) -> None:
        """Put the trial back, at no cost of its attempts."""
        given_back = claims.GivenBack(outcome="released", reason=why or "its worker was stopped", counts=False)
        claims.release(self._storage.sessions, held, given_back, study.budget.max_attempts)
        self._emit(Event(event="trial_released", trial=held.number, attempt=held.attempt, message=why))

    def _tell_outage(self, error: Exception) -> None:
        self._emit(Event(event="database_away", message=_first_line(error)))


class Lease:
    """Renews a claim on a thread while its trial runs. `lost` is set once somebody else may hold the trial."""

    def __init__(self, engine: Engine, held: claims.Claim) -> None:
        self.lost = threading.Event()
        self._sessions = Sessions(engine)
        self._held = held
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease of trial {held.number}", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _renew(self) -> None:
        while not self._ended.wait(claims.LEASE_S / 3):
            try:
                if not claims.renew(self._sessions, self._held):
                    self.lost.set()
                    return
            except StorageError:
                continue  # the database is away: the lease may outlast it; the next renewal tells


def pruner_on(storage: PostgresStorage, study_id: int, spec: PrunerSpec) -> BasePruner:
    """Return the study's pruner; for `median` and `percentile` one that decides the same, and reads less."""
    pruner = build_pruner(spec)  # refuses settings that Optuna's does not have
    if not isinstance(pruner, PercentilePruner):
        return pruner
    settings: dict[str, Any] = {"percentile": 50.0, **spec.settings}
    return IndexedPercentilePruner(storage, study_id, **settings)


def _first_line(error: BaseException) -> str:
    return str(error.__cause__ or error).strip().partition("\n")[0]


def _stop_at_end_of(stream: IO[str], stop: threading.Event) -> None:
    for _ in stream:
        pass
    stop.set()
    # The worker may be gone, and with it the readers of what the objective prints.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())


def main() -> None:
    """Run a slot for the worker at the other end of the standard streams."""
    # What an objective prints goes to stderr: stdout carries the events.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the worker's to handle
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def emit(event: Event) -> None:
        with suppress(BrokenPipeError):  # the worker is gone; the end of stdin says so
            events.write(event.model_dump_json(exclude_none=True) + "\n")

    stop = threading.Event()
    line = sys.stdin.readline()
    if not line:
        return
    threading.Thread(target=_stop_at_end_of, args=(sys.stdin, stop), daemon=True).start()
    try:
        Slot(SlotConfig.model_validate_json(line), emit, stop).run()
    except (TunerError, StorageError, ValidationError) as error:
        code = EXIT_UNREACHABLE if isinstance(error, UnreachableError) else getattr(error, "exit_code", 1)
        emit(Event(event="refused", message=str(error), exit_code=code))
        sys.exit(code)


if __name__ == "__main__":
    main()
