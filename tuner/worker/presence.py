"""What a worker has to do with the database itself, on a thread: an outage must not keep it from its slots."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from storage.coordination import claims, records, studies, workers
from storage.coordination.workers import WorkerSeen
from storage.database.engine import is_outage
from storage.database.errors import StorageError
from storage.database.outages import Told
from storage.database.sessions import Sessions
from storage.trials.curves import slowest_epoch_s
from tuner.log import Log
from tuner.study.joining import Study, budget_now
from tuner.worker.progress import Snapshot

if TYPE_CHECKING:
    from tuner.slot.spool import Spool

PROGRESS_S = 5.0
LIVE_PROGRESS_S = 1.0
"""How often the study is looked at: for a line now and then, or for a display."""
CLOSE_S = 3.0
"""How long the way out waits at most for what is left to be written."""
_PAUSE_S = 1.0


class Presence:
    """Tells that the worker is there, gives dead slots' trials back, delivers kept results, and looks at the study."""

    def __init__(
        self,
        engine: Engine,
        study: Study,
        seen: Callable[[], WorkerSeen],
        log: Log,
        data_dir: Path,
        *,
        progress_s: float = PROGRESS_S,
    ) -> None:
        """`seen` is called on the thread, for what is to be told now."""
        self.snapshot: Snapshot | None = None
        """How the study was when it was looked at last."""
        self.slowest_s = 0.0
        """The slowest epoch of the study when the first was found; 0 before."""
        self._sessions = Sessions(engine)
        self._engine = engine
        self._study = study
        self._seen = seen
        self._log = log
        self._data_dir = data_dir
        self._spool: Spool | None = None
        self._progress_s = progress_s
        self._started_at = time.monotonic()
        self._done_at_start: int | None = None
        self._dead: deque[tuple[claims.Claim, claims.GivenBack]] = deque()
        self._wake = threading.Event()
        self._has_news = threading.Event()
        self._closing = threading.Event()
        self._told = Told()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def release(self, held: claims.Claim, why: claims.GivenBack) -> None:
        """Have the trial of a dead slot given back, as soon as the database is there."""
        self._dead.append((held, why))
        self._wake.set()

    def tell(self) -> None:
        """Have it told soon how the worker is now."""
        self._has_news.set()
        self._wake.set()

    def close(self, within_s: float = CLOSE_S) -> None:
        """Tell that the worker ends, and end the thread; what cannot be written soon is left to the leases' end."""
        self._closing.set()
        self._wake.set()
        self._thread.join(min(within_s, CLOSE_S))

    def look(self) -> Snapshot | None:
        """Look at the study now; None if the database is away."""
        try:
            return self._look()
        except (StorageError, SQLAlchemyError) as error:
            if not is_outage(error):
                raise
            return None

    def _run(self) -> None:
        told_at = tell_at = look_at = 0.0
        while True:
            is_closing, now = self._closing.is_set(), time.monotonic()
            if self._has_news.is_set():
                self._has_news.clear()
                tell_at = min(tell_at, told_at + _PAUSE_S)
            self._wake.clear()
            try:
                self._release_dead()
                if now >= tell_at:
                    workers.seen(self._sessions, self._seen())
                    self._deliver()
                    told_at, tell_at = now, now + workers.SEEN_EVERY_S
                if is_closing:
                    workers.ended(self._sessions, self._seen().worker_id)
                    self._sessions.forget_operations()
                    return
                if now >= look_at:
                    self.snapshot = self._look()
                    look_at = now + self._progress_s
                self._told.over()
            except (StorageError, SQLAlchemyError) as error:
                if is_closing:
                    return
                if not is_outage(error):
                    self._log.event("unseen", f"nobody sees this worker any more: {error}")
                    return  # most likely the study was deleted, as the slots find as well
                self._note_outage(error)
            self._wake.wait(_PAUSE_S if self._told else max(0.0, min(tell_at, look_at) - time.monotonic()))

    def _release_dead(self) -> None:
        while self._dead:
            held, why = self._dead[0]
            claims.release(self._sessions, held, why, self._study.budget.max_attempts)
            self._dead.popleft()

    def _deliver(self) -> None:
        if next((self._data_dir / "spool").glob("*.json"), None) is None:
            return
        if self._spool is None:
            from tuner.slot.spool import Spool  # it imports Optuna

            self._spool = Spool(self._data_dir)

        def log(event: str, message: str, trial: int | None) -> None:
            self._log.event(event, message, trial=trial)

        self._spool.deliver(self._sessions, self._study.study_id, self._study.budget, log)

    def _note_outage(self, error: Exception) -> None:
        if self._told.is_news(error):
            reason = str(error).partition("\n")[0]
            self._log.event("database_away", f"{reason}; trying again")

    def _look(self) -> Snapshot:
        study = self._study
        if not self.slowest_s:
            with self._engine.connect() as conn:
                self.slowest_s = slowest_epoch_s(conn, study.study_id)
        counts = studies.count_states(self._engine, study.study_id)
        best = records.best_trial(self._engine, study.study_id, study.spec.direction)
        trials = budget_now(self._engine, study).trials
        if self._done_at_start is None:
            self._done_at_start = counts.done
        done_here, left_s = counts.done - self._done_at_start, None
        if done_here > 0 and counts.done < trials:
            per_trial_s = (time.monotonic() - self._started_at) / done_here
            left_s = per_trial_s * (trials - counts.done)
        return Snapshot(counts=counts, trials=trials, best=best, left_s=left_s)
