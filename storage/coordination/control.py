"""What people do to a study from outside while workers run it: halt, extend, adopt or delete it, queue a trial."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ARRAY, Connection, Select, Text, cast, delete, func, insert, literal, select, text, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError

from storage.coordination import claims, standings, workers
from storage.coordination.standings import CANCELLED, IS_EXPIRED, Standing, StudyState
from storage.coordination.studies import METRIC_NAMES
from storage.database.errors import LiveTrialsError, StudyExistsError, TrialNotWaitingError
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
    tuner_leases,
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
        return len(conn.execute(_live_leases(study_id)).all())

    return sessions.transaction(work)


def extend(sessions: Sessions, study_id: int, decide: Callable[[Standing], Mapping[str, Any]]) -> Standing:
    """Give a study that tuner created the budget that `decide` makes of how it stands; how it stands then.

    One transaction: of two who extend a study at once, the second adds to what the first left, and the next claim of
    anybody goes by it. What `decide` raises is raised, and nothing is changed. Raises StudyNotFoundError.
    """

    def work(conn: Connection) -> Standing:
        claims.lock(conn, study_id)
        _set_budget(conn, study_id, decide(standings.standing_of(conn, study_id)))
        return standings.standing_of(conn, study_id)

    return sessions.transaction(work)


def adopt(
    sessions: Sessions,
    study_id: int,
    decide: Callable[[Standing], Mapping[str, Any]],
    user_attrs: Mapping[str, Any],
    metric: str,
) -> Standing:
    """Give a study that another program created the spec that `decide` makes of how it stands; how it stands then.

    One transaction. Attributes that the study has stay; its time begins now. What `decide` raises is raised, and
    nothing is changed. Raises StudyExistsError if it has a spec, StudyNotFoundError.
    """

    def work(conn: Connection) -> Standing:
        claims.lock(conn, study_id)
        spec = dict(decide(standings.standing_of(conn, study_id)))
        try:
            conn.execute(insert(tuner_studies).values(study_id=study_id, spec=spec))
        except IntegrityError as error:
            raise StudyExistsError(f"study id {study_id} has a spec already") from error
        metric_names = {"study_id": study_id, "key": METRIC_NAMES, "value_json": json.dumps([metric])}
        named = upsert(study_system_attributes).values(metric_names)
        keys = ["study_id", "key"]
        conn.execute(named.on_conflict_do_update(index_elements=keys, set_={"value_json": named.excluded.value_json}))
        attributes = [
            {"study_id": study_id, "key": key, "value_json": json.dumps(value)} for key, value in user_attrs.items()
        ]
        conn.execute(upsert(study_user_attributes).values(attributes).on_conflict_do_nothing(index_elements=keys))
        return standings.standing_of(conn, study_id)

    return sessions.transaction(work)


def cancel(sessions: Sessions, study_id: int, number: int) -> None:
    """Fail a waiting trial, of class CANCELLED: its number stays, and nobody runs it.

    Raises TrialNotWaitingError, StudyNotFoundError.
    """

    def work(conn: Connection) -> None:
        claims.lock(conn, study_id)
        row = conn.execute(
            select(trials.c.trial_id, trials.c.state)
            .where(trials.c.study_id == study_id, trials.c.number == number)
            .with_for_update()  # stock Optuna starts waiting trials without the study's lock
        ).one_or_none()
        if row is None:
            raise TrialNotWaitingError(f"there is no trial {number}")
        if row.state != "WAITING":
            back = "; 'tuner release' puts it back to waiting" if row.state == "RUNNING" else ""
            raise TrialNotWaitingError(f"trial {number} is {row.state.lower()}, and not waiting{back}")
        claims.fail(conn, row.trial_id, CANCELLED, "taken back before it ran")

    sessions.transaction(work)


def enqueue(sessions: Sessions, study_id: int, params: Mapping[str, Any]) -> int:
    """Add a waiting trial with these params, which the next claim hands out before any new one; its number.

    It is what `optuna.Study.enqueue_trial` adds. Raises InvalidWriteError for a name that the database cannot hold,
    StudyNotFoundError.
    """
    fixed = _fixed(params)

    def work(conn: Connection) -> int:
        claims.lock(conn, study_id)
        return _enqueue(conn, study_id, fixed)[1]

    return sessions.transaction(work)


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A trial to be enqueued: its params, and what it has as user attributes from then on."""

    params: Mapping[str, Any]
    user_attrs: Mapping[str, Any]


def enqueue_all(sessions: Sessions, study_id: int, decide: Callable[[Connection], Sequence[Queued]]) -> int:
    """Add the waiting trials that `decide` returns, and make the study's budget all that have not failed; how many.

    One transaction under the study's lock: of two who do so at once, the second decides by what the first added.
    No failure of one of these trials ends the study. Raises StudyNotFoundError.
    """

    def work(conn: Connection) -> int:
        claims.lock(conn, study_id)
        queued = decide(conn)
        for one in queued:
            trial_id, _ = _enqueue(conn, study_id, _fixed(one.params))
            attrs = [
                {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
                for key, value in one.user_attrs.items()
            ]
            conn.execute(insert(trial_user_attributes).values(attrs))
        if queued:
            now = standings.standing_of(conn, study_id)
            counts = {"trials": now.n_trials - now.failed, "max_failures": now.n_trials}
            _set_budget(conn, study_id, {**(now.budget or {}), **counts})
        return len(queued)

    return sessions.transaction(work)


def _fixed(params: Mapping[str, Any]) -> str:
    return json.dumps({checked_name(name, "a param's name"): value for name, value in params.items()})


def _enqueue(conn: Connection, study_id: int, fixed: str) -> tuple[int, int]:
    """Add a waiting trial; its id and its number. The caller holds the study's lock."""
    next_number = select(func.coalesce(func.max(trials.c.number) + 1, 0)).where(trials.c.study_id == study_id)
    values = {"study_id": study_id, "number": next_number.scalar_subquery(), "state": "WAITING"}
    trial = conn.execute(insert(trials).values(values).returning(trials.c.trial_id, trials.c.number)).one()
    attribute = {"trial_id": trial.trial_id, "key": FIXED_PARAMS, "value_json": fixed}
    conn.execute(insert(trial_system_attributes).values(attribute))
    return trial.trial_id, trial.number


def _set_budget(conn: Connection, study_id: int, budget: Mapping[str, Any]) -> None:
    path, value = cast(["budget"], ARRAY(Text)), literal(dict(budget), JSONB)
    spec = func.jsonb_set(tuner_studies.c.spec, path, value)
    conn.execute(update(tuner_studies).where(tuner_studies.c.study_id == study_id).values(spec=spec))


def delete_study(sessions: Sessions, study_id: int, *, force: bool = False) -> None:
    """Delete the study with all its trials, in one transaction.

    Raises StudyNotFoundError, and unless `force`, LiveTrialsError while workers run trials of it; with `force` these
    workers drop them and end.
    """

    def work(conn: Connection) -> None:
        claims.lock(conn, study_id)
        live = conn.execute(_live_leases(study_id)).all()
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
        if not is_nothing_done(conn, study_id):
            return None
        kept = list(queued_params(conn, study_id).values())
        delete_rows(conn, study_id)
        return kept

    return sessions.transaction(work)


def is_nothing_done(conn: Connection, study_id: int) -> bool:
    """Whether none of the study's trials is complete or pruned and no worker is there."""
    standing = standings.standing_of(conn, study_id)
    is_lost = [worker.is_lost for worker in workers.present(conn, study_id)]
    return not standing.done and standing.running <= standing.expired and all(is_lost)


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


def _live_leases(study_id: int) -> Select[int, str | None]:
    """Select (number, worker) of the trials that are running under a lease that has not run out."""
    return (
        select(trials.c.number, tuner_leases.c.worker)
        .join(tuner_leases, tuner_leases.c.trial_id == trials.c.trial_id)
        .where(trials.c.study_id == study_id, trials.c.state == "RUNNING", ~IS_EXPIRED)
        .order_by(trials.c.number)
    )
