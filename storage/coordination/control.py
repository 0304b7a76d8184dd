"""What people do to a study from outside while workers run it: halt it, let it go on, queue a trial, delete it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Connection, delete, func, insert, select, text, update

from storage.coordination import claims, workers
from storage.coordination.claims import StudyState
from storage.database.errors import LiveTrialsError
from storage.database.sessions import Sessions
from storage.database.tables import (
    studies,
    study_directions,
    study_system_attributes,
    study_user_attributes,
    trial_heartbeats,
    trial_intermediate_values,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    trials,
    tuner_studies,
)
from storage.database.values import checked_name
from storage.trials.queued import FIXED_PARAMS, queued_params

_OF_TRIAL: Final = (
    trial_params,
    trial_values,
    trial_intermediate_values,
    trial_user_attributes,
    trial_system_attributes,
    trial_heartbeats,
)
_OF_STUDY: Final = (study_directions, study_user_attributes, study_system_attributes)


def set_state(sessions: Sessions, study_id: int, state: StudyState) -> int:
    """Set the state of a study that tuner created; how many trials of it workers run now.

    Once this has returned, no claim goes against it; a worker sees it at its trial's next report.
    Raises StudyNotFoundError.
    """

    def work(conn: Connection) -> int:
        claims.lock(conn, study_id)
        conn.execute(update(tuner_studies).where(tuner_studies.c.study_id == study_id).values(state=state))
        return len(conn.execute(claims.live_leases(study_id)).all())

    return sessions.transaction(work)


def enqueue(sessions: Sessions, study_id: int, params: Mapping[str, Any]) -> int:
    """Add a waiting trial with these params, which the next claim hands out before any new one; its number.

    It is what `optuna.Study.enqueue_trial` adds. Raises InvalidWriteError for a name that the database cannot hold,
    StudyNotFoundError.
    """
    fixed = json.dumps({checked_name(name, "a param's name"): value for name, value in params.items()})

    def work(conn: Connection) -> int:
        claims.lock(conn, study_id)
        next_number = select(func.coalesce(func.max(trials.c.number) + 1, 0)).where(trials.c.study_id == study_id)
        values = {"study_id": study_id, "number": next_number.scalar_subquery(), "state": "WAITING"}
        trial = conn.execute(insert(trials).values(values).returning(trials.c.trial_id, trials.c.number)).one()
        attribute = {"trial_id": trial.trial_id, "key": FIXED_PARAMS, "value_json": fixed}
        conn.execute(insert(trial_system_attributes).values(attribute))
        number: int = trial.number
        return number

    return sessions.transaction(work)


def delete_study(sessions: Sessions, study_id: int, *, force: bool = False) -> None:
    """Delete the study with all its trials, in one transaction.

    Raises StudyNotFoundError, and unless `force`, LiveTrialsError while workers run trials of it; with `force` these
    workers drop them and end.
    """

    def work(conn: Connection) -> None:
        claims.lock(conn, study_id)
        live = conn.execute(claims.live_leases(study_id)).all()
        if live and not force:
            numbers = ", ".join(str(row.number) for row in live[:5]) + (", ..." if len(live) > 5 else "")
            raise LiveTrialsError(
                f"workers run {len(live)} of its trials now (number {numbers}, {live[0].worker} for one);"
                " stop the study first, and delete it when they have given them back"
            )
        delete_rows(conn, study_id)

    sessions.transaction(work)


def delete_if_nothing_done(sessions: Sessions, study_id: int) -> list[dict[str, Any]] | None:
    """Delete the study if none of its trials is complete or pruned and no worker is there; what had been enqueued.

    None if it stays. Raises StudyNotFoundError.
    """

    def work(conn: Connection) -> list[dict[str, Any]] | None:
        claims.lock(conn, study_id)
        standing = claims.standing_of(conn, study_id)
        is_lost = [worker.is_lost for worker in workers.present(conn, study_id)]
        if standing.done or standing.running > standing.expired or not all(is_lost):
            return None
        kept = list(queued_params(conn, study_id).values())
        delete_rows(conn, study_id)
        return kept

    return sessions.transaction(work)


def delete_rows(conn: Connection, study_id: int) -> None:
    """Delete the study and all that belongs to it; the caller holds its lock."""
    conn.execute(text("SET LOCAL statement_timeout = '10min'"))  # a million rows take seconds, or more
    of_study = select(trials.c.trial_id).where(trials.c.study_id == study_id)
    # Nobody can add to a trial that is locked while we delete what it has.
    conn.execute(select(func.count()).select_from(of_study.with_for_update().subquery()))
    for table in _OF_TRIAL:
        conn.execute(delete(table).where(table.c.trial_id.in_(of_study)))
    for table in (trials, *_OF_STUDY, studies):
        conn.execute(delete(table).where(table.c.study_id == study_id))
