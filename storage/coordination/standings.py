"""How a study stands against its budget: the one look by which all that is done to it is decided."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import Connection, Double, Select, and_, bindparam, cast, false, func, or_, select, text, true

from storage.coordination.alike import N_ALIKE, failed_alike
from storage.database.errors import StudyNotFoundError
from storage.database.foreign import skipped
from storage.database.sessions import OUTAGE_S, Sessions
from storage.database.tables import studies, trial_user_attributes, trials, tuner_leases, tuner_studies

_NOT_DONE: Final = ("RUNNING", "WAITING", "FAIL")  # the states that ix_tuner_trials_not_done has

StudyState: TypeAlias = Literal["open", "paused", "stopped"]
"""Workers of a paused study wait, those of a stopped one end; of both, they give running trials back."""

Limit: TypeAlias = Literal["trials", "max_failures", "timeout"]
"""What of a budget can be used up."""

CANCELLED: Final = "cancelled"
"""The failure of a waiting trial that was taken back: nobody ran it, and it ends no study."""

RETURN_S = 20.0
"""How long holders have to renew their leases once a database that was away is back, before anybody takes their trials.

It is three times as long as they take to notice. A lease that ran out OUTAGE_S ago has no holder any more.
"""


_NOW: Final = func.clock_timestamp()
# Whether a running trial's lease ran out. A server that has just come back was away for all holders.
IS_EXPIRED: Final = and_(
    tuner_leases.c.expires_at < _NOW,
    or_(
        func.pg_postmaster_start_time() < _NOW - text(f"interval '{RETURN_S} seconds'"),
        tuner_leases.c.expires_at < _NOW - text(f"interval '{OUTAGE_S} seconds'"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many trials a study may run; see `tuner.spec.Budget` for what counts."""

    trials: int
    timeout_s: float | None
    max_failures: int
    max_attempts: int


@dataclass(frozen=True, kw_only=True)
class NothingToClaim:
    """No trial was handed out. `final` if none will be, unless somebody resumes the study.

    Else the study is paused, which is `paused`, or trials of other workers hold the rest of the budget. `limit` is what
    of the budget is used up, if something is.
    """

    final: bool
    reason: str
    paused: bool = False
    limit: Limit | None = None

    @property
    def advice(self) -> str:
        """The reason, and what lets a study go on whose budget is used up."""
        return self.reason if self.limit is None else f"{self.reason}; 'tuner extend' adds to it"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a claim is decided by. `age_s` is the study's, None for one that tuner did not create.

    `budget` is what its spec says now, if it does. `cancelled` of the `failed` trials were taken back before they ran.
    `expired` of the `running` trials have lost their worker: the next claim of anybody puts them back. `alike` is what
    trials failed by, one like the other, while none is done. `only_enqueued` if it is the confirmation of another
    study: it runs the trials that were enqueued, and no claim creates one.
    """

    state: StudyState
    age_s: float | None
    budget: dict[str, Any] | None
    n_trials: int
    running: int
    waiting: int
    failed: int
    cancelled: int
    oldest_waiting: int | None
    expired: int
    only_enqueued: bool = False
    alike: str | None = None

    @property
    def done(self) -> int:
        """The trials that are complete or pruned."""
        return self.n_trials - self.running - self.waiting - self.failed

    @property
    def failures(self) -> int:
        """The failed trials that count as such."""
        return self.failed - self.cancelled

    def now_of(self, known: Budget) -> Budget:
        """Return a budget of the study that somebody has known for a while as it is now: it may have been raised.

        What is known stays where the database holds no budget that could be one.
        """
        if self.budget is None:
            return known
        if not _is_budget(self.budget):
            skipped("the budget in the study's spec", f"it is none: {str(self.budget)[:100]}")
            return known
        return replace(known, **self.budget)


def _is_budget(found: object) -> bool:
    if not isinstance(found, dict) or not found.keys() <= {one.name for one in fields(Budget)}:
        return False
    numbers = {name: number for name, number in found.items() if name != "timeout_s" or number is not None}
    return all(type(one) in (int, float) if name == "timeout_s" else type(one) is int for name, one in numbers.items())


def look(sessions: Sessions, study_id: int) -> Standing:
    """Return how the study stands. Raises StudyNotFoundError."""
    return sessions.statement(lambda conn: standing_of(conn, study_id))


def closed(standing: Standing, budget: Budget) -> NothingToClaim | None:
    """Return why no trial would be handed out now, None if one would; `budget` as for `claim`."""
    budget = standing.now_of(budget)
    if standing.state == "stopped":
        return NothingToClaim(final=True, reason="the study was stopped; 'tuner resume' lets it go on")
    if standing.only_enqueued and not standing.waiting:
        if standing.running:
            return NothingToClaim(final=False, reason=f"{standing.running} running trials are the last enqueued ones")
        return NothingToClaim(final=True, reason="all trials that were enqueued have run")
    if standing.done >= budget.trials:
        return _used_up("trials", f"the budget of {budget.trials} trials is used up")
    if standing.failures > budget.max_failures:
        return _used_up(
            "max_failures", f"{standing.failures} trials failed, more than the {budget.max_failures} allowed"
        )
    if standing.alike is not None:
        return NothingToClaim(
            final=True, reason=f"{N_ALIKE} trials failed alike, and none is complete: {standing.alike}"
        )
    if budget.timeout_s is not None and standing.age_s is not None and standing.age_s > budget.timeout_s:
        return _used_up("timeout", f"the study's time of {budget.timeout_s:g} s is over")
    if standing.state == "paused":
        return NothingToClaim(final=False, paused=True, reason="the study is paused; 'tuner resume' lets it go on")
    if standing.done + standing.running >= budget.trials:
        return NothingToClaim(final=False, reason=f"{standing.running} running trials hold the rest of the budget")
    return None


def _used_up(limit: Limit, reason: str) -> NothingToClaim:
    return NothingToClaim(final=True, reason=reason, limit=limit)


@cache
def _select_standing(*, of_all: bool = False) -> Select[Any]:
    """Select what a claim is decided by, in one row and without reading the history.

    Numbers are dense, and so the trials that are done are all but the failed and the unfinished ones. Those are few,
    and have an index of their own.
    """
    study_id: Any = studies.c.study_id if of_all else bindparam("study_id")
    of_study = trials.c.study_id == study_id
    by_state = (
        select(
            *(
                func.count().filter(trials.c.state == state).label(name)
                for name, state in (("running", "RUNNING"), ("waiting", "WAITING"), ("failed", "FAIL"))
            )
        )
        .where(of_study, trials.c.state.in_(_NOT_DONE))
        .lateral("by_state")
    )
    n_trials = select(func.coalesce(func.max(trials.c.number) + 1, 0)).where(of_study)
    waiting = select(trials.c.trial_id).where(of_study, trials.c.state == "WAITING").order_by(trials.c.number).limit(1)
    expired = (
        select(func.count())
        .select_from(trials.join(tuner_leases, tuner_leases.c.trial_id == trials.c.trial_id))
        .where(of_study, trials.c.state == "RUNNING", IS_EXPIRED)
    )
    cancelled = (
        select(func.count())
        .select_from(trials.join(trial_user_attributes, trial_user_attributes.c.trial_id == trials.c.trial_id))
        .where(
            of_study,
            trials.c.state == "FAIL",
            trial_user_attributes.c.key == "failure",
            trial_user_attributes.c.value_json == json.dumps(CANCELLED),
        )
    )
    age = func.clock_timestamp() - tuner_studies.c.created_at
    is_confirmation = func.jsonb_typeof(tuner_studies.c.spec["confirms"]) == "object"
    query = (
        select(
            func.coalesce(tuner_studies.c.state, "open").label("state"),
            cast(func.extract("epoch", age), Double).label("age_s"),
            tuner_studies.c.spec["budget"].label("budget"),
            n_trials.scalar_subquery().label("n_trials"),
            by_state,
            cancelled.scalar_subquery().label("cancelled"),
            waiting.scalar_subquery().label("oldest_waiting"),
            expired.scalar_subquery().label("expired"),
            func.coalesce(is_confirmation, false()).label("only_enqueued"),
        )
        .select_from(studies.outerjoin(tuner_studies, tuner_studies.c.study_id == studies.c.study_id))
        .join(by_state, true())
    )
    return query.add_columns(studies.c.study_id) if of_all else query.where(studies.c.study_id == study_id)


def standing_of(conn: Connection, study_id: int) -> Standing:
    """Return how the study stands, as `conn`'s transaction sees it. Raises StudyNotFoundError."""
    row = conn.execute(_select_standing(), {"study_id": study_id}).one_or_none()
    if row is None:
        raise deleted(study_id)
    return _standing(conn, study_id, dict(row._mapping))


def all_standings(conn: Connection) -> dict[int, Standing]:
    """Return how each study of the database stands."""
    found = [dict(row._mapping) for row in conn.execute(_select_standing(of_all=True)).all()]
    return {each["study_id"]: _standing(conn, each.pop("study_id"), each) for each in found}


def _standing(conn: Connection, study_id: int, found: dict[str, Any]) -> Standing:
    standing = Standing(**found)
    if standing.done == 0 and standing.failed >= N_ALIKE:
        return replace(standing, alike=failed_alike(conn, study_id))
    return standing


def deleted(study_id: int) -> StudyNotFoundError:
    return StudyNotFoundError(
        f"study id {study_id} was deleted: nothing is left to do; 'tuner studies' lists the others"
    )
