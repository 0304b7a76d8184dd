"""Claims: who may run which trial, decided by PostgreSQL in one short transaction, on its own clock."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, delete, func, insert, literal, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert

from storage.errors import StudyNotFoundError
from storage.studies import StateCounts, states_of
from storage.tables import (
    studies,
    trial_intermediate_values,
    trial_user_attributes,
    trials,
    tuner_leases,
    tuner_studies,
)

# A trial whose worker went silent runs again after this long; renewed every third of it.
LEASE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many trials a study may run; see `tuner.spec.Budget` for what counts."""

    trials: int
    timeout_s: float | None
    max_failures: int
    max_attempts: int


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The right to run one trial, until the lease runs out. `attempt` counts from 1."""

    trial_id: int
    number: int
    attempt: int
    token: uuid.UUID


@dataclass(frozen=True, kw_only=True)
class NothingToClaim:
    """No trial was handed out. `final` if none ever will be; else trials of other workers hold the budget."""

    final: bool
    reason: str


def claim(engine: Engine, study_id: int, budget: Budget, worker: str) -> Claim | NothingToClaim:
    """Hand out the oldest waiting trial, or create the next one, with a lease on it, within the budget.

    One transaction under the study row's lock, which stock Optuna takes as well to create a trial: at most one
    worker holds a trial, numbers are dense, and the budget is exact whatever the number of workers. Trials
    whose lease ran out are released first. Raises StudyNotFoundError if the study was deleted.
    """
    with engine.begin() as conn:
        _lock(conn, study_id)
        _give_back(conn, _expired(conn, study_id), budget.max_attempts)
        counts = states_of(conn, study_id)
        closed = _closed(conn, study_id, budget, counts)
        if closed is not None:
            return closed
        return _hand_out(conn, study_id, worker)


def end_of_budget(engine: Engine, study_id: int, budget: Budget) -> str | None:
    """Return why no trial will be handed out any more, None while some may be."""
    with engine.connect() as conn:
        closed = _closed(conn, study_id, budget, states_of(conn, study_id))
    return closed.reason if closed is not None and closed.final else None


def count_expired(engine: Engine, study_id: int) -> int:
    """Return how many running trials have lost their worker: the next claim of anybody puts them back."""
    with engine.connect() as conn:
        return len(_expired(conn, study_id))


def renew(engine: Engine, held: Claim) -> bool:
    """Extend the lease by LEASE_S from now. False if it is no longer held: the trial is somebody else's."""
    with engine.begin() as conn:
        renewed = conn.execute(
            update(tuner_leases).where(_holds(held.trial_id, held.token)).values(expires_at=_in_lease_time())
        )
        return renewed.rowcount == 1


def release(engine: Engine, study_id: int, held: Claim, *, counts: bool, max_attempts: int) -> bool:
    """Put a running trial back to waiting, with its params; False if it is no longer held.

    With `counts` the attempt counts towards `max_attempts`, after which the trial fails instead; a worker that
    was asked to stop gives a trial back without it.
    """
    with engine.begin() as conn:
        _lock(conn, study_id)
        holds = _holds(held.trial_id, held.token)
        if conn.execute(select(tuner_leases.c.trial_id).where(holds)).one_or_none() is None:
            return False
        if not counts:
            conn.execute(update(tuner_leases).where(holds).values(attempts=tuner_leases.c.attempts - 1))
        _give_back(conn, [held.trial_id], max_attempts)
        return True


def end(engine: Engine, held: Claim) -> None:
    """Give up the lease on a trial that has ended."""
    with engine.begin() as conn:
        conn.execute(delete(tuner_leases).where(_holds(held.trial_id, held.token)))


def _lock(conn: Connection, study_id: int) -> None:
    row = conn.execute(select(studies.c.study_id).where(studies.c.study_id == study_id).with_for_update())
    if row.one_or_none() is None:
        raise StudyNotFoundError(f"study {study_id} was deleted while it ran; nothing is left to do")


def _expired(conn: Connection, study_id: int) -> list[int]:
    rows = conn.execute(
        select(trials.c.trial_id)
        .join(tuner_leases, tuner_leases.c.trial_id == trials.c.trial_id)
        .where(
            trials.c.study_id == study_id,
            trials.c.state == "RUNNING",
            tuner_leases.c.expires_at < func.now(),
        )
    )
    return list(rows.scalars())


def _give_back(conn: Connection, trial_ids: list[int], max_attempts: int) -> None:
    """Set running trials to waiting, or to failed where all their attempts are used up.

    What a waiting trial had reported goes: the next attempt starts from its first step, and a pruner would take the
    old values for its own.
    """
    if not trial_ids:
        return
    lost = conn.execute(
        select(tuner_leases.c.trial_id, tuner_leases.c.attempts).where(
            tuner_leases.c.trial_id.in_(trial_ids), tuner_leases.c.attempts >= max_attempts
        )
    ).all()
    for row in lost:
        message = f"its worker was lost in each of {row.attempts} attempts"
        _set_user_attrs(conn, row.trial_id, {"failure": "lost", "failure_message": message})
    failed = [row.trial_id for row in lost]
    conn.execute(update(trials).where(trials.c.trial_id.in_(failed)).values(state="FAIL", datetime_complete=_utc_now()))
    waiting = [trial_id for trial_id in trial_ids if trial_id not in failed]
    conn.execute(update(trials).where(trials.c.trial_id.in_(waiting)).values(state="WAITING"))
    conn.execute(delete(trial_intermediate_values).where(trial_intermediate_values.c.trial_id.in_(waiting)))
    conn.execute(
        update(tuner_leases)
        .where(tuner_leases.c.trial_id.in_(trial_ids))
        .values(token=None, worker=None, expires_at=None)
    )


def _closed(conn: Connection, study_id: int, budget: Budget, counts: StateCounts) -> NothingToClaim | None:
    if counts.done >= budget.trials:
        return NothingToClaim(final=True, reason=f"the budget of {budget.trials} trials is used up")
    if counts.failed > budget.max_failures:
        return NothingToClaim(
            final=True, reason=f"{counts.failed} trials failed, more than the {budget.max_failures} allowed"
        )
    if budget.timeout_s is not None and _is_older(conn, study_id, budget.timeout_s):
        return NothingToClaim(final=True, reason=f"the study's time of {budget.timeout_s:g} s is over")
    if counts.done + counts.running >= budget.trials:
        return NothingToClaim(final=False, reason=f"{counts.running} running trials hold the rest of the budget")
    return None


def _is_older(conn: Connection, study_id: int, seconds: float) -> bool:
    age = func.extract("epoch", func.now() - tuner_studies.c.created_at)
    return bool(conn.execute(select(age > literal(seconds)).where(tuner_studies.c.study_id == study_id)).scalar_one())


def _hand_out(conn: Connection, study_id: int, worker: str) -> Claim:
    of_study = trials.c.study_id == study_id
    waiting = conn.execute(
        select(trials.c.trial_id, trials.c.number)
        .where(of_study, trials.c.state == "WAITING")
        .order_by(trials.c.number)
        .limit(1)
        .with_for_update(skip_locked=True)  # stock Optuna takes waiting trials without the study's lock
    ).one_or_none()
    if waiting is None:
        number = conn.execute(select(func.coalesce(func.max(trials.c.number) + 1, 0)).where(of_study)).scalar_one()
        trial_id = conn.execute(
            insert(trials)
            .values(study_id=study_id, number=number, state="RUNNING", datetime_start=_utc_now())
            .returning(trials.c.trial_id)
        ).scalar_one()
    else:
        trial_id, number = waiting
        conn.execute(
            update(trials).where(trials.c.trial_id == trial_id).values(state="RUNNING", datetime_start=_utc_now())
        )
    token = uuid.uuid4()
    lease = {"token": token, "worker": worker, "expires_at": _in_lease_time()}
    attempt = conn.execute(
        upsert(tuner_leases)
        .values(trial_id=trial_id, attempts=1, **lease)
        .on_conflict_do_update(
            index_elements=[tuner_leases.c.trial_id], set_={"attempts": tuner_leases.c.attempts + 1, **lease}
        )
        .returning(tuner_leases.c.attempts)
    ).scalar_one()
    return Claim(trial_id=trial_id, number=number, attempt=attempt, token=token)


def _set_user_attrs(conn: Connection, trial_id: int, attrs: dict[str, Any]) -> None:
    statement = upsert(trial_user_attributes)
    conn.execute(
        statement.on_conflict_do_update(
            index_elements=["trial_id", "key"], set_={"value_json": statement.excluded.value_json}
        ),
        [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in attrs.items()],
    )


def _holds(trial_id: int, token: uuid.UUID) -> ColumnElement[bool]:
    return (tuner_leases.c.trial_id == trial_id) & (tuner_leases.c.token == token)


def _in_lease_time() -> ColumnElement[Any]:
    return func.clock_timestamp() + text(f"interval '{LEASE_S} seconds'")


def _utc_now() -> ColumnElement[Any]:
    # Optuna's columns hold naive UTC.
    return func.timezone("UTC", func.clock_timestamp())
