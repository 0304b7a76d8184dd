"""What one storage object knows of a study's trials: the finished ones are read once and kept."""

from __future__ import annotations

import threading
from collections.abc import Container
from typing import Final

from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, and_, bindparam, select

from storage.database.columns import int_array, is_among
from storage.database.sessions import Sessions
from storage.database.tables import studies, trials
from storage.optuna_storage.studies import no_study
from storage.trials.frozen import fill_in, is_bare, load_reports, load_trials, trials_where

_NEW_OR_UNFINISHED: Final = trials_where(
    and_(trials.c.study_id == bindparam("study_id"), trials.c.number > bindparam("greatest")),
    is_among(trials.c.trial_id, "unfinished"),
)
_STUDY: Final = select(studies.c.study_id).where(studies.c.study_id == bindparam("study_id"))


class StudyCache:
    """The trials of one study, as of the last refresh.

    Trial numbers are given out under the study row's lock, so that a trial never appears below the greatest
    number seen: a refresh reads what is above it, and what was unfinished. Any number of threads may use it.
    """

    def __init__(self, sessions: Sessions, study_id: int) -> None:
        self._sessions = sessions
        self._study_id = study_id
        self._lock = threading.RLock()
        self._trials: list[FrozenTrial] = []  # by number
        self._unfinished: dict[int, int] = {}  # trial id -> its place in the list
        self._greatest = -1  # number

    def trials(self, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """Return the trials by number, as they are now; finished ones are shared with everyone who asks.

        Raises KeyError if the study does not exist.
        """
        with self._lock:
            fresh = self._sessions.snapshot(self._changed)
            for trial in fresh:
                self._put(trial)
            if states is None:
                return list(self._trials)
            return [trial for trial in self._trials if trial.state in states]

    def _load_reports(self, state: TrialState) -> None:
        """Read the intermediate values of all trials of a state that lack them; called by the trials themselves.

        By state, as TPE reads those of the pruned trials, which have the fewest.
        """
        with self._lock:
            bare = [trial for trial in self._trials if trial.state == state and is_bare(trial)]
            ids = [trial._trial_id for trial in bare]
            fill_in(bare, self._sessions.statement(lambda conn: load_reports(conn, ids)))

    def _changed(self, conn: Connection) -> list[FrozenTrial]:
        seen = {"study_id": self._study_id, "greatest": self._greatest, "unfinished": int_array(self._unfinished)}
        found = load_trials(conn, _NEW_OR_UNFINISHED, seen, self._load_reports)
        if not found and conn.execute(_STUDY, {"study_id": self._study_id}).first() is None:
            raise no_study(self._study_id)
        return found

    def _put(self, trial: FrozenTrial) -> None:
        place = self._unfinished.get(trial._trial_id)
        if place is None:
            place = len(self._trials)
            self._trials.append(trial)
            self._greatest = trial.number
        else:
            self._trials[place] = trial
        if trial.state.is_finished():
            self._unfinished.pop(trial._trial_id, None)
        else:
            self._unfinished[trial._trial_id] = place
