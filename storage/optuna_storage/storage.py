"""Optuna's storage contract on PostgreSQL: a statement a write, set-based reads, finished trials read once."""

from __future__ import annotations

import json
import math
import threading
import uuid
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from optuna.distributions import BaseDistribution, check_distribution_compatibility, distribution_to_json
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.study._study_direction import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL, Connection, Engine, Row, Table, func, literal, select, text
from sqlalchemy.dialects.postgresql import insert as upsert

from storage.coordination.records import best_first
from storage.database.engine import open_engine
from storage.database.errors import InvalidWriteError, StorageError, StudyHaltedError
from storage.database.sessions import Backoff, Retry, Sessions, is_away
from storage.database.tables import (
    studies,
    trial_heartbeats,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    trials,
    tuner_leases,
)
from storage.database.url import parse_url
from storage.database.values import checked_name, json_texts
from storage.optuna_storage.held_trial import HeldTrial
from storage.optuna_storage.studies import StudyStorage, directions_of, lock_study, no_study
from storage.optuna_storage.study_cache import StudyCache
from storage.trials import guarded_writes
from storage.trials.creation import create_trial, known_distribution
from storage.trials.curves import CurvePoint
from storage.trials.finished import FinishedTrials
from storage.trials.frozen import copied, load_trial

if TYPE_CHECKING:
    import optuna

    from storage.coordination.claims import Claim

HEARTBEAT_INTERVAL_S: Final = 10
GRACE_PERIOD_S: Final = 60


class PostgresStorage(StudyStorage, BaseHeartbeat):
    """Optuna's studies and trials in Optuna's own tables; stock clients may work on the same studies meanwhile.

    Thread safe, on at most two connections. A write is committed when its call returns. Finished trials are read
    once and kept, and handed out uncopied unless a copy is asked for; with `cache` off every call reads anew.
    While the database is away, calls wait and try again, for ten minutes unless `retry` decides otherwise.
    Raises what Optuna's contract names, InvalidWriteError for what the tables cannot hold, LeaseLostError,
    UnreachableError and other StorageErrors for what the database did not do.
    """

    def __init__(
        self,
        url: str | URL,
        *,
        read_only: bool = False,
        application_name: str = "tuner",
        cache: bool = True,
        retry: Retry | None = None,
    ) -> None:
        self._url = parse_url(url)
        self._read_only = read_only
        self._application_name = application_name
        self._is_cached = cache
        self._held: dict[int, HeldTrial] = {}
        self._connect(retry)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_url", "_read_only", "_application_name", "_is_cached", "_held")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect(None)

    def _connect(self, retry: Retry | None) -> None:
        self.engine: Engine = open_engine(self._url, read_only=self._read_only, application_name=self._application_name)
        self.sessions = Sessions(self.engine, retry or Backoff(is_away=is_away))
        self._lock = threading.Lock()
        self._caches: dict[int, StudyCache] = {}
        self._follower: FinishedTrials | None = None
        self._study_of: dict[int, int] = {}  # by trial id, of trials written to
        self._n_objectives: dict[int, int] = {}  # by study id
        self._distributions: dict[tuple[int, str], BaseDistribution] = {}  # by study id and param

    def hold(self, claim: Claim) -> None:
        """From now on write to the claimed trial only while its lease is ours, else raise LeaseLostError.

        It is read once, and from then on is what we have written to it.
        """
        self._held[claim.trial_id] = HeldTrial(claim)
        self._study_of[claim.trial_id] = claim.study_id

    def let_go(self, claim: Claim) -> None:
        """From now on write to the trial as any Optuna client does."""
        self._held.pop(claim.trial_id, None)
        self._study_of.pop(claim.trial_id, None)

    def follow(self, finished: FinishedTrials) -> None:
        """From now on let reports of held trials tell it what has finished since it was told last."""
        self._follower = finished

    def _lease(self, trial_id: int) -> tuple[HeldTrial | None, uuid.UUID | None]:
        held = self._held.get(trial_id)
        return held, None if held is None else held.token

    def delete_study(self, study_id: int) -> None:
        super().delete_study(study_id)
        with self._lock:
            self._caches.pop(study_id, None)

    # Writing

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        def work(conn: Connection) -> int:
            lock_study(conn, study_id)
            return create_trial(conn, study_id, template_trial)

        trial_id = self.sessions.transaction(work)
        self._study_of[trial_id] = study_id
        return trial_id

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        checked_name(param_name, "a param's name")
        held, token = self._lease(trial_id)
        write = guarded_writes.param(
            trial_id, token, param_name, float(param_value_internal), distribution_to_json(distribution)
        )

        def work(conn: Connection) -> bool:
            self._check_distribution(conn, trial_id, token, param_name, distribution)
            if write.run(conn) > 0:
                return True
            # Ours to write to means that the param was there already.
            guarded_writes.check_writable(trial_id, guarded_writes.standing(conn, trial_id), token)
            return False

        is_new = self.sessions.statement(work)
        if held is not None and is_new:
            held.add_param(param_name, param_value_internal, distribution)
        elif held is not None:
            held.forget()

    def _check_distribution(
        self, conn: Connection, trial_id: int, token: uuid.UUID | None, name: str, distribution: BaseDistribution
    ) -> None:
        """Raise ValueError if the study has had the param with another kind of distribution.

        Without a query, unless the param is new to this storage object or differs from before.
        """
        study_id = self._study_of.get(trial_id)
        known = None if study_id is None else self._distributions.get((study_id, name))
        if known == distribution:
            return
        now = guarded_writes.standing(conn, trial_id)
        guarded_writes.check_writable(trial_id, now, token)
        if known is None:
            known = known_distribution(conn, now.study_id, name) or distribution
        check_distribution_compatibility(known, distribution)
        self._study_of[trial_id] = now.study_id
        self._distributions[now.study_id, name] = known

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        held, token = self._lease(trial_id)
        starts = state == TrialState.RUNNING
        write = (
            guarded_writes.start(trial_id, token)
            if starts
            else guarded_writes.set_state(trial_id, token, state, values)
        )

        def work(conn: Connection) -> bool:
            if values is not None:
                self._check_n_values(conn, trial_id, token, len(values))
            written = write.run_returning(conn)
            if written is not None and held is not None:
                held.end(state, values, written.at)
            if written is not None:
                return True
            now = guarded_writes.standing(conn, trial_id)
            if held is not None and now.token == token and now.state == state:
                held.forget()
                return True  # by an earlier call of the holder, whose answer was lost
            guarded_writes.check_writable(trial_id, now, token)
            return False

        if held is None:
            # Nothing tells a write done twice from two.
            return self.sessions.transaction(work)
        return self.sessions.statement(work)

    def _check_n_values(self, conn: Connection, trial_id: int, token: uuid.UUID | None, n_values: int) -> None:
        study_id = self._study_of.get(trial_id)
        wanted = None if study_id is None else self._n_objectives.get(study_id)
        if study_id is None or wanted is None:
            study_id = self._study_of[trial_id] = guarded_writes.standing(conn, trial_id).study_id
            wanted = self._n_objectives[study_id] = len(directions_of(conn, study_id))
        if n_values != wanted:
            guarded_writes.check_writable(trial_id, guarded_writes.standing(conn, trial_id), token)
            raise InvalidWriteError(f"a trial of study id {study_id} has {wanted} values, got {n_values}")

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Report a value. Raises StudyHaltedError, once it is written, to the holder of a lease in a halted study."""
        self.report(trial_id, CurvePoint(step=step, value=intermediate_value))

    def report(self, trial_id: int, point: CurvePoint) -> None:
        """Report the value of a step, as `set_trial_intermediate_value` does, with what else is known of it."""
        held, token = self._lease(trial_id)
        follower = None if held is None else self._follower
        seen = None if follower is None else follower.seen()
        write = guarded_writes.report(trial_id, token, point, seen)

        def work(conn: Connection) -> Row[Any]:
            written = write.run_returning(conn)
            if written is None:
                raise _refusal(conn, trial_id, token)
            return written

        written = self.sessions.statement(work)
        if held is not None:
            held.add_report(point.step, math.nan if point.value is None else float(point.value))
        if follower is not None:
            follower.learn(written.changed or (), trial_id, point.step)
        if held is not None and written.state in ("paused", "stopped"):
            raise StudyHaltedError(f"the study was {written.state}: trial id {trial_id} is to be given back")

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._set_trial_attrs(trial_user_attributes, trial_id, {key: value})

    def set_trial_user_attrs(self, trial_id: int, attrs: Mapping[str, Any]) -> None:
        """Set several attributes in one statement."""
        if attrs:
            self._set_trial_attrs(trial_user_attributes, trial_id, attrs)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._set_trial_attrs(trial_system_attributes, trial_id, {key: value})

    def _set_trial_attrs(self, table: Table, trial_id: int, attrs: Mapping[str, Any]) -> None:
        held, token = self._lease(trial_id)
        values_json = json_texts(attrs)
        write = guarded_writes.attributes(table, trial_id, token, values_json)

        def work(conn: Connection) -> None:
            if write.run(conn) == 0:
                raise _refusal(conn, trial_id, token)

        self.sessions.statement(work)
        if held is not None:
            read_back = {key: json.loads(text) for key, text in values_json.items()}
            held.add_attrs(read_back, system=table is trial_system_attributes)

    # Reading

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        query = select(trials.c.trial_id).where(trials.c.study_id == study_id, trials.c.number == trial_number)
        trial_id: int | None = self.sessions.statement(lambda conn: conn.execute(query).scalar())
        if trial_id is None:
            raise KeyError(f"study id {study_id} has no trial of number {trial_number}")
        return trial_id

    def get_trial_number_from_id(self, trial_id: int) -> int:
        query = select(trials.c.number).where(trials.c.trial_id == trial_id)
        number: int | None = self.sessions.statement(lambda conn: conn.execute(query).scalar())
        if number is None:
            raise _no_trial(trial_id)
        return number

    def get_trial_param(self, trial_id: int, param_name: str) -> float:
        query = select(trial_params.c.param_value).where(
            trial_params.c.trial_id == trial_id, trial_params.c.param_name == param_name
        )
        internal: float | None = self.sessions.statement(lambda conn: conn.execute(query).scalar())
        if internal is None:
            raise KeyError(f"no trial of id {trial_id} has a param {param_name!r}")
        return internal

    def get_trial_user_attrs(self, trial_id: int) -> dict[str, Any]:
        return self._attrs(trial_user_attributes, trials.c.trial_id, trial_id)

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        return self._attrs(trial_system_attributes, trials.c.trial_id, trial_id)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        held, _ = self._lease(trial_id)
        kept = None if held is None else held.read()
        if kept is not None:
            return kept
        found = self.sessions.snapshot(lambda conn: load_trial(conn, trial_id))
        if found is None:
            raise _no_trial(trial_id)
        if held is not None and not found.state.is_finished():
            held.keep(found)
        return found

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        found = self._cache_of(study_id).trials(states)
        return [copied(trial) for trial in found] if deepcopy else found

    def get_n_trials(self, study_id: int, state: tuple[TrialState, ...] | TrialState | None = None) -> int:
        query = (
            select(studies.c.study_id, trials.c.state, func.count(trials.c.trial_id).label("n"))
            .outerjoin(trials, trials.c.study_id == studies.c.study_id)
            .where(studies.c.study_id == study_id)
            .group_by(studies.c.study_id, trials.c.state)
        )
        rows = self.sessions.statement(lambda conn: conn.execute(query).all())
        if not rows:
            raise no_study(study_id)
        states = (state,) if isinstance(state, TrialState) else state
        return sum(
            row.n for row in rows if row.state is not None and (states is None or TrialState[row.state] in states)
        )

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        def work(conn: Connection) -> FrozenTrial:
            directions = directions_of(conn, study_id)
            if not directions:
                raise no_study(study_id)
            if len(directions) > 1:
                raise RuntimeError(f"study id {study_id} has {len(directions)} objectives, and so no best trial")
            first_value = (trial_values.c.trial_id == trials.c.trial_id) & (trial_values.c.objective == 0)
            query = select(trials.c.trial_id).join(trial_values, first_value)
            direction = "maximize" if directions[0] == StudyDirection.MAXIMIZE else "minimize"
            unreadable: set[int] = set()
            while True:
                left = query.where(trials.c.trial_id.not_in(unreadable)) if unreadable else query
                best = conn.execute(best_first(left, study_id, direction).limit(1)).scalar()
                if best is None:
                    raise ValueError(f"study id {study_id} has no complete trial")
                found = load_trial(conn, best)
                if found is not None:
                    return found
                unreadable.add(best)

        return self.sessions.snapshot(work)

    def _cache_of(self, study_id: int) -> StudyCache:
        if not self._is_cached:
            return StudyCache(self.sessions, study_id)
        with self._lock:
            return self._caches.setdefault(study_id, StudyCache(self.sessions, study_id))

    # Heartbeats, for those who run trials by study.optimize; trials of ours have leases instead

    def record_heartbeat(self, trial_id: int) -> None:
        alive = upsert(trial_heartbeats).from_select(
            ["trial_id", "heartbeat"],
            select(trials.c.trial_id, guarded_writes.utc_now()).where(trials.c.trial_id == trial_id),
        )
        statement = alive.on_conflict_do_update(
            index_elements=["trial_id"], set_={"heartbeat": alive.excluded.heartbeat}
        )
        self.sessions.statement(lambda conn: conn.execute(statement))

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        age = guarded_writes.utc_now() - trial_heartbeats.c.heartbeat
        query = (
            select(trials.c.trial_id)
            .join(trial_heartbeats, trial_heartbeats.c.trial_id == trials.c.trial_id)
            .where(
                trials.c.study_id == study_id,
                trials.c.state == "RUNNING",
                age > text(f"interval '{GRACE_PERIOD_S} seconds'"),
                ~select(literal(1))
                .where(tuner_leases.c.trial_id == trials.c.trial_id, tuner_leases.c.token.is_not(None))
                .exists(),
            )
            .order_by(trials.c.trial_id)
        )
        return self.sessions.statement(lambda conn: list(conn.execute(query).scalars()))

    def get_heartbeat_interval(self) -> int:
        return HEARTBEAT_INTERVAL_S

    def get_heartbeat_stale_trial_callback(self) -> Callable[[optuna.Study, FrozenTrial], None] | None:
        return None


def _refusal(conn: Connection, trial_id: int, token: uuid.UUID | None) -> StorageError:
    """Return the error for a write that found nothing; raise what the trial as it stands explains it by."""
    guarded_writes.check_writable(trial_id, guarded_writes.standing(conn, trial_id), token)
    return StorageError(f"trial id {trial_id} could not be written to for no known reason; try again")


def _no_trial(trial_id: int) -> KeyError:
    return KeyError(f"no trial has the id {trial_id}")
