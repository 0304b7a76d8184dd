"""Claims: who may run which trial, decided by PostgreSQL in one short transaction, on its own clock."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Final, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    Insert,
    Text,
    Update,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import UUID
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.sql.dml import ReturningInsert

from storage.coordination import standings
from storage.coordination.standings import IS_EXPIRED, Budget, NothingToClaim, Standing, deleted
from storage.database.errors import TrialNotRunningError
from storage.database.sessions import Sessions
from storage.database.tables import (
    studies,
    trial_intermediate_values,
    trial_user_attributes,
    trials,
    tuner_attempts,
    tuner_checkpoints,
    tuner_curves,
    tuner_leases,
)

# A trial whose worker went silent runs again after this long; renewed every third of it.
LEASE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who runs a trial: a slot of a worker on a device, of which it has the part `share`."""

    worker: str
    slot: int = 0
    device: str = "cpu"
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The right to run one trial, until the lease runs out. `attempt` counts from 1.

    `started` is when, in naive UTC, for a trial that the claim created; None for one that had waited.
    """

    study_id: int
    trial_id: int
    number: int
    attempt: int
    token: uuid.UUID
    started: dt.datetime | None = None


def claim(
    sessions: Sessions, study_id: int, budget: Budget, holder: Holder, *, sweep: bool = True
) -> Claim | NothingToClaim:
    """Hand out the oldest waiting trial, or create the next one, with a lease on it, within the budget.

    One transaction under the study row's lock, which stock Optuna takes as well to create a trial: at most one
    worker holds a trial, numbers are dense, and the budget is exact whatever the number of workers. Trials
    whose lease ran out are released first, unless `sweep` is off: somebody who could not reach the database a moment
    ago has to assume that the holders could not either. It reads the unfinished and the failed trials, never the
    history. `budget` is the study's as the caller knows it: where it was raised since, the study's own counts.
    Raises StudyNotFoundError if the study was deleted.
    """

    def work(conn: Connection) -> Claim | NothingToClaim:
        lock(conn, study_id)
        standing = standings.standing_of(conn, study_id)
        if standing.expired and sweep:
            _give_back(conn, and_(trials.c.study_id == study_id, IS_EXPIRED), LOST, budget.max_attempts)
            standing = standings.standing_of(conn, study_id)
        return standings.closed(standing, budget) or _hand_out(conn, study_id, standing, holder)

    return sessions.transaction(work)


def renew(sessions: Sessions, held: Claim) -> bool:
    """Extend the lease by LEASE_S from now. False if it is no longer held: the trial is somebody else's."""
    statement = update(tuner_leases).where(_holds(held)).values(expires_at=_in_lease_time())
    return sessions.statement(lambda conn: conn.execute(statement).rowcount) == 1


@dataclass(frozen=True, kw_only=True)
class GivenBack:
    """Why a trial goes back to waiting, and whether its attempt counts towards `max_attempts`.

    Once they are used up it fails instead, of class `failure`; at once if that `is_final`.
    """

    outcome: Literal["released", "lost", "hung"]
    reason: str
    counts: bool
    failure: str = "lost"
    is_final: bool = False


LOST: Final = GivenBack(outcome="lost", reason="its worker was lost", counts=True)


def release(sessions: Sessions, held: Claim, why: GivenBack, max_attempts: int) -> bool:
    """Put a running trial back to waiting, with its params; False if it is no longer held."""
    return sessions.transaction(lambda conn: bool(_give_back(conn, _holds(held), why, max_attempts)))


def release_by_number(sessions: Sessions, study_id: int, number: int) -> str | None:
    """Put a running trial back to waiting, whoever runs it; the worker that did, None if it was not one of tuner's.

    Its holder finds at the next report that the trial is his no longer. Raises TrialNotRunningError.
    """

    def work(conn: Connection) -> str | None:
        lock(conn, study_id)
        row = conn.execute(
            select(trials.c.trial_id, trials.c.state, tuner_leases.c.token, tuner_leases.c.worker)
            .outerjoin(tuner_leases, tuner_leases.c.trial_id == trials.c.trial_id)
            .where(trials.c.study_id == study_id, trials.c.number == number)
            .with_for_update(of=trials)
        ).one_or_none()
        if row is None:
            raise TrialNotRunningError(f"there is no trial {number}")
        if row.state != "RUNNING":
            raise TrialNotRunningError(f"trial {number} is {row.state.lower()}, and not running")
        if row.token is not None:
            why = GivenBack(outcome="released", reason="by hand", counts=False)
            _give_back(conn, tuner_leases.c.trial_id == row.trial_id, why, max_attempts=1)
        else:
            _set_waiting(conn, [row.trial_id])
        worker: str | None = row.worker
        return worker

    return sessions.transaction(work)


def restart(sessions: Sessions, held: Claim) -> bool:
    """Drop the reports of a trial that is held, whose holder runs it anew; False if it is no longer held."""

    def work(conn: Connection) -> bool:
        query = select(tuner_leases.c.trial_id).where(_holds(held)).with_for_update()
        if conn.execute(query).one_or_none() is None:
            return False
        _drop_reports(conn, [held.trial_id])
        return True

    return sessions.transaction(work)


def lock(conn: Connection, study_id: int) -> None:
    """Lock the study's row until the transaction ends, as stock Optuna does to create a trial.

    Raises StudyNotFoundError if the study was deleted.
    """
    row = conn.execute(select(studies.c.study_id).where(studies.c.study_id == study_id).with_for_update())
    if row.one_or_none() is None:
        raise deleted(study_id)


def _hand_out(conn: Connection, study_id: int, standing: Standing, holder: Holder) -> Claim | NothingToClaim:
    token = uuid.uuid4()
    lease = {"token": token, **asdict(holder)}
    row, started = None, None
    if standing.oldest_waiting is not None:
        # Stock Optuna takes waiting trials without the study's lock; then ours is a new one.
        row = conn.execute(_start(), {"the_trial": standing.oldest_waiting, **lease}).one_or_none()
    if row is None and standing.only_enqueued:
        return NothingToClaim(final=False, reason="another program has taken the trial that waited")
    if row is None:
        row = conn.execute(_create(), {"the_study": study_id, "next_number": standing.n_trials, **lease}).one()
        started = row.datetime_start
    return Claim(
        study_id=study_id,
        trial_id=row.trial_id,
        number=row.number,
        attempt=row.attempt,
        token=token,
        started=started,
    )


@cache
def _start() -> ReturningInsert[Any]:
    return _leased(
        update(trials)
        .where(trials.c.trial_id == bindparam("the_trial"), trials.c.state == "WAITING")
        .values(state="RUNNING", datetime_start=_utc_now())
    )


@cache
def _create() -> ReturningInsert[Any]:
    values = {"study_id": bindparam("the_study"), "number": bindparam("next_number"), "state": "RUNNING"}
    return _leased(insert(trials).values(**values, datetime_start=_utc_now()))


def _leased(handing_out: Insert | Update) -> ReturningInsert[Any]:
    """Write lease and attempt in the statement that makes the trial run; returns the trial and its `attempt`."""
    trial = handing_out.returning(trials.c.trial_id, trials.c.number, trials.c.datetime_start).cte("trial")
    token, worker = bindparam("token", type_=UUID), bindparam("worker", type_=Text)
    values = {"token": token, "worker": worker, "expires_at": _in_lease_time()}
    lease = (
        upsert(tuner_leases)
        .from_select(["trial_id", "attempts", *values], select(trial.c.trial_id, literal(1), *values.values()))
        .on_conflict_do_update(
            index_elements=[tuner_leases.c.trial_id], set_={"attempts": tuner_leases.c.attempts + 1, **values}
        )
        .returning(tuner_leases.c.trial_id, tuner_leases.c.attempts)
        .cte("lease")
    )
    where = [bindparam(name, type_=tuner_attempts.c[name].type) for name in ("slot", "device", "share")]
    return (
        insert(tuner_attempts)
        .from_select(
            ["trial_id", "attempt", "token", "worker", "slot", "device", "share", "started_at"],
            select(lease.c.trial_id, lease.c.attempts, token, worker, *where, func.clock_timestamp()),
        )
        .returning(
            tuner_attempts.c.trial_id,
            tuner_attempts.c.attempt,
            *(
                select(column).scalar_subquery().label(column.name)
                for column in (trial.c.number, trial.c.datetime_start)
            ),
        )
    )


def _give_back(conn: Connection, whose: ColumnElement[bool], why: GivenBack, max_attempts: int) -> int:
    """Set running trials, by their leases, to waiting, or to failed where all their attempts are used up.

    Returns how many there were. What a waiting trial had reported goes: the next attempt reports from its first step,
    and a pruner would take the old values for its own.
    """
    # Locked, so that a holder who ends a trial now either has ended it before or finds that it is not his any more.
    rows = conn.execute(
        select(trials.c.trial_id, tuner_leases.c.attempts, tuner_leases.c.token, tuner_leases.c.expires_at)
        .join(tuner_leases, tuner_leases.c.trial_id == trials.c.trial_id)
        .where(trials.c.state == "RUNNING", whose)
        .with_for_update()
    ).all()
    if not rows:
        return 0
    last = 0 if why.is_final else max_attempts
    failed = {row.trial_id: row.attempts for row in rows if why.counts and row.attempts >= last}
    for trial_id, attempts in failed.items():
        message = why.reason if why.is_final else f"{why.reason} in the last of {attempts} attempts"
        fail(conn, trial_id, why.failure, message)
    _set_waiting(conn, [row.trial_id for row in rows if row.trial_id not in failed])
    conn.execute(
        update(tuner_attempts)
        .where(tuner_attempts.c.token == tuner_leases.c.token, tuner_leases.c.trial_id.in_([r.trial_id for r in rows]))
        .values(
            ended_at=func.least(tuner_leases.c.expires_at, func.clock_timestamp()),
            outcome=why.outcome,
            message=why.reason,
        )
    )
    conn.execute(
        update(tuner_leases)
        .where(tuner_leases.c.trial_id.in_([row.trial_id for row in rows]))
        .values(attempts=tuner_leases.c.attempts - int(not why.counts), token=None, worker=None, expires_at=None)
    )
    return len(rows)


def fail(conn: Connection, trial_id: int, failure: str, message: str) -> None:
    """End a trial that nobody runs, and whose row is locked, as failed of this class."""
    _set_user_attrs(conn, trial_id, {"failure": failure, "failure_message": message})
    conn.execute(update(trials).where(trials.c.trial_id == trial_id).values(state="FAIL", datetime_complete=_utc_now()))
    conn.execute(delete(tuner_checkpoints).where(tuner_checkpoints.c.trial_id == trial_id))


def _set_waiting(conn: Connection, trial_ids: list[int]) -> None:
    conn.execute(update(trials).where(trials.c.trial_id.in_(trial_ids)).values(state="WAITING"))
    _drop_reports(conn, trial_ids)


def _drop_reports(conn: Connection, trial_ids: list[int]) -> None:
    for table in (trial_intermediate_values, tuner_curves):
        conn.execute(delete(table).where(table.c.trial_id.in_(trial_ids)))


def _set_user_attrs(conn: Connection, trial_id: int, attrs: dict[str, Any]) -> None:
    statement = upsert(trial_user_attributes)
    conn.execute(
        statement.on_conflict_do_update(
            index_elements=["trial_id", "key"], set_={"value_json": statement.excluded.value_json}
        ),
        [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in attrs.items()],
    )


def _holds(held: Claim) -> ColumnElement[bool]:
    return and_(tuner_leases.c.trial_id == held.trial_id, tuner_leases.c.token == held.token)


def _in_lease_time() -> ColumnElement[Any]:
    return func.clock_timestamp() + text(f"interval '{LEASE_S} seconds'")


def _utc_now() -> ColumnElement[Any]:
    # Optuna's columns hold naive UTC.
    return func.timezone("UTC", func.clock_timestamp())
