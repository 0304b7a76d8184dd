"""What one storage object knows of a study's trials: the finished ones are read once and kept."""

from __future__ import annotations

import threading
from collections.abc import Container

from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Select, and_, or_, select

from storage.frozen import Which, fill_in, is_bare, load_reports, load_trials
from storage.sessions import Sessions
from storage.tables import studies, trials

# Up to so many, ids travel with the query; above, the query tells them by itself.
_MANY = 1000


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

    def load_reports(self) -> None:
        """Read the intermediate values of all trials that lack them; called by the trials themselves."""
        with self._lock:
            bare = [trial for trial in self._trials if is_bare(trial)]
            if not bare:
                return
            if len(bare) <= _MANY:
                which: Which = [trial._trial_id for trial in bare]
            else:
                # Of those that have some already, they are read again: they are few in a study so large.
                which = select(trials.c.trial_id).where(
                    trials.c.study_id == self._study_id,
                    trials.c.number.between(bare[0].number, bare[-1].number),
                    trials.c.state.not_in(["RUNNING", "WAITING"]),
                )
            fill_in(bare, self._sessions.statement(lambda conn: load_reports(conn, which)))

    def _changed(self, conn: Connection) -> list[FrozenTrial]:
        unfinished = list(self._unfinished)
        rows = conn.execute(trials_above(self._study_id, self._greatest)).all()
        if not rows:
            raise KeyError(f"no study has the id {self._study_id}")
        wanted = unfinished + [row.trial_id for row in rows if row.trial_id is not None]
        if len(wanted) <= _MANY:
            return load_trials(conn, wanted, self.load_reports)
        which = select(trials.c.trial_id).where(trials.c.study_id == self._study_id)
        if self._trials:
            which = which.where(or_(trials.c.number > self._greatest, trials.c.trial_id.in_(unfinished)))
        return load_trials(conn, which, self.load_reports)

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


def trials_above(study_id: int, number: int) -> Select[tuple[int, int | None]]:
    """Select (study id, id of a trial above the number), a NULL if there is none, and no row without a study."""
    return (
        select(studies.c.study_id, trials.c.trial_id)
        .outerjoin(trials, and_(trials.c.study_id == studies.c.study_id, trials.c.number > number))
        .where(studies.c.study_id == study_id)
    )
