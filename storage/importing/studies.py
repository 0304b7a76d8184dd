"""Copying studies of other Optuna storages into ours, again and again if need be.

A study becomes the same study here: directions, attributes and trials with their numbers, in batches under the study
row's lock, so that everybody sees its trials appear by number. What a killed import has committed stays, and the next
one goes on from there. Artifact files are not copied, only what a study says of them.

A trial that is running in its source becomes a waiting one, as a trial of ours does that lost its worker: with its
params, and without what it had reported. Importing again brings it up to date once it has finished there, unless
somebody has run it here meanwhile. Finished trials are never changed.

Optuna 5 keeps UTC in its tables, Optuna 3 and 4 kept the local time of whoever wrote; times of those come in as
Optuna 5 itself reads them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, TypeVar

from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial
from sqlalchemy import Connection, Engine, Row, Select, Table, func, insert, literal, null, select
from sqlalchemy.dialects.postgresql import ARRAY, INTEGER
from sqlalchemy.dialects.postgresql import insert as upsert

from storage.database.errors import InvalidWriteError, StorageError, StudyExistsError, StudyNotFoundError
from storage.database.foreign import BadRowError, json_value, skipped
from storage.database.sessions import Sessions
from storage.database.tables import (
    studies,
    study_directions,
    study_system_attributes,
    study_user_attributes,
    trials,
    tuner_curves,
    tuner_studies,
)
from storage.database.url import mask_url
from storage.database.values import checked_name
from storage.importing.sources import Source, SqlSource, Stamp, stamp_of
from storage.importing.trials import Change, fitted, insert_trials, is_same, replace_trials
from storage.optuna_storage.studies import directions_of, lock_study
from storage.trials.frozen import UNFINISHED, load_trials, trials_where

IMPORTED_FROM: Final = "tuner:imported_from"
"""The study's system attribute that says where it came from, and which of its trials were unfinished there."""

_BATCH: Final = 1000
_SHOWN_NAMES: Final = 20

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Told a study's name, how many of its trials are done, and how many there are to do."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import did to one study.

    `unfinished` trials run or wait in the source; `changes` is what could not be taken as it was.
    """

    study: str
    source_study: str
    copied: int
    updated: int
    already_there: int
    unfinished: int
    changes: tuple[Change, ...]


def import_studies(
    source: Source,
    engine: Engine,
    *,
    names: Sequence[str] = (),
    new_name: str | None = None,
    progress: Progress = lambda *_: None,
) -> list[Imported]:
    """Copy studies, all of them unless `names` says which; `new_name` is what a single one will be called.

    Studies imported before get what is new. Nothing is written if any study's name is taken by another study, and
    any number of processes may import the same studies at once. Raises StudyNotFoundError, StudyExistsError and
    other StorageErrors.
    """
    target = _Target(sessions=Sessions(engine), shown=mask_url(engine.url))
    _refuse_itself(source, engine)
    plans = [
        _plan(source, target, study, study.study_name if new_name is None else new_name)
        for study in _chosen(source, names, new_name)
    ]
    return [_Copy(source, target, plan, progress).run() for plan in plans]


@dataclass(frozen=True, kw_only=True)
class _Target:
    sessions: Sessions
    shown: str


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What to do for one study. A trial's place in `stamps` is its number here."""

    study: FrozenStudy
    name: str
    study_id: int | None
    stamps: list[Stamp]
    todo: list[int]
    run_here: list[Change]


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """Where a study was imported from, and the trials that were unfinished there when they were copied."""

    url: str
    study: str
    unfinished: frozenset[int] = frozenset()


def _refuse_itself(source: Source, engine: Engine) -> None:
    if not isinstance(source, SqlSource) or source.engine.dialect.name != "postgresql":
        return
    # A database has many names; a lock is held in one, whatever it was reached by.
    key = secrets.randbits(62)
    with engine.begin() as ours, source.connect() as theirs:
        ours.execute(select(func.pg_advisory_xact_lock(key)))
        if not theirs.scalar(select(func.pg_try_advisory_xact_lock(key))):
            raise StorageError(
                f"{source.shown} is the database to import into; --storage names another one, or without it the"
                " embedded one is taken"
            )


def _chosen(source: Source, names: Sequence[str], new_name: str | None) -> list[FrozenStudy]:
    found = {study.study_name: study for study in source.studies()}
    if not found:
        raise StudyNotFoundError(f"{source.shown} holds no studies; check that it is the right one")
    missing = [name for name in names if name not in found]
    if missing:
        there = ", ".join(map(repr, list(found)[:_SHOWN_NAMES])) + (", ..." if len(found) > _SHOWN_NAMES else "")
        raise StudyNotFoundError(f"no study named {missing[0]!r} in {source.shown}; there are: {there}")
    chosen = [found[name] for name in dict.fromkeys(names)] or list(found.values())
    if new_name is not None and len(chosen) > 1:
        raise StorageError(f"{len(chosen)} studies cannot all be called {new_name!r}; choose one: --study NAME")
    return chosen


def _plan(source: Source, target: _Target, study: FrozenStudy, name: str) -> _Plan:
    try:
        checked_name(name, "a study's name")
    except InvalidWriteError as error:
        raise StorageError(f"{error}; --as NAME imports the study under another one") from error
    stamps = _by_number(source.stamps(study._study_id))

    def look(conn: Connection) -> tuple[int | None, list[int], list[Change]]:
        study_id = conn.execute(select(studies.c.study_id).where(studies.c.study_name == name)).scalar()
        if study_id is None:
            return None, list(range(len(stamps))), []
        origin = _origin(conn, study_id)
        if origin is None or directions_of(conn, study_id) != list(study.directions):
            raise _name_is_taken(target, name, "was not imported from there")
        there = {row.number: row for row in conn.execute(_stamps_of(study_id))}
        common = [(there[number], stamp) for number, stamp in enumerate(stamps) if number in there]
        for row, stamp in common:
            if _is_another(row, stamp, origin):
                raise _name_is_taken(target, name, f"has another trial {row.number} than {source.shown}")
        is_known = any(row.datetime_complete is not None and _agrees(row, stamp) for row, stamp in common)
        if not is_known and (origin.url, origin.study) != (source.shown, study.study_name):
            raise _name_is_taken(target, name, f"was imported from study {origin.study!r} of {origin.url}")
        waiting = {row.number for row, _ in common if row.number in origin.unfinished and row.state == "WAITING"}
        todo = [number for number in range(len(stamps)) if number not in there or number in waiting]
        run_here = [
            Change(trial=row.number, what="it was run here since, and stays as it is")
            for row, stamp in common
            if row.number in origin.unfinished and row.state != "WAITING" and stamp.is_finished
        ]
        return study_id, todo, run_here

    study_id, todo, run_here = target.sessions.snapshot(look)
    return _Plan(study=study, name=name, study_id=study_id, stamps=stamps, todo=todo, run_here=run_here)


def _by_number(stamps: Sequence[Stamp]) -> list[Stamp]:
    """Order trials by the numbers they will have: their own, or those of their creation if these are not dense.

    Stock storages may have left numbers twice, or none of some; creation keeps its order as trials are added.
    """
    ordered = sorted(stamps, key=lambda stamp: (-1 if stamp.number is None else stamp.number, stamp.trial_id))
    if [stamp.number for stamp in ordered] == list(range(len(ordered))):
        return ordered
    return sorted(stamps, key=lambda stamp: stamp.trial_id)


def _is_another(row: Row[Any], stamp: Stamp, origin: _Origin) -> bool:
    """Whether the trial here cannot be the one of the stamp. One that was unfinished there may have been run here."""
    return row.number not in origin.unfinished and not _agrees(row, stamp)


def _agrees(row: Row[Any], stamp: Stamp) -> bool:
    is_finished = row.state not in UNFINISHED
    times = (row.datetime_start, row.datetime_complete)
    return is_finished == stamp.is_finished and times == (stamp.started, stamp.ended)


def _stamps_of(study_id: int) -> Select[Any]:
    return select(
        trials.c.trial_id, trials.c.number, trials.c.state, trials.c.datetime_start, trials.c.datetime_complete
    ).where(trials.c.study_id == study_id)


def _origin(conn: Connection, study_id: int) -> _Origin | None:
    """Return where a study was imported from, None if it was not."""
    table = study_system_attributes
    query = select(table.c.value_json).where(table.c.study_id == study_id, table.c.key == IMPORTED_FROM)
    text: str | None = conn.execute(query).scalar()
    if text is None:
        return None
    try:
        found = json_value(text)
        return _Origin(url=found["url"], study=found["study"], unfinished=frozenset(found["unfinished"]))
    except (BadRowError, LookupError, TypeError) as error:
        skipped(f"where the study of id {study_id} was imported from", repr(error))
        return None


def _write_curves(conn: Connection, study_id: int, curves: Sequence[Mapping[str, Any]]) -> None:
    if not curves:
        return
    numbers = {row["number"] for row in curves}
    query = select(trials.c.number, trials.c.trial_id).where(
        trials.c.study_id == study_id, trials.c.number.in_(numbers)
    )
    id_of = {row.number: row.trial_id for row in conn.execute(query)}
    rows = [{"trial_id": id_of[row["number"]], "step": row["step"], "epoch": row["epoch"]} for row in curves]
    conn.execute(upsert(tuner_curves).on_conflict_do_nothing(), rows)


def _set_origin(conn: Connection, study_id: int, origin: _Origin) -> None:
    fields = {"url": origin.url, "study": origin.study, "unfinished": sorted(origin.unfinished)}
    statement = upsert(study_system_attributes).values(
        study_id=study_id, key=IMPORTED_FROM, value_json=json.dumps(fields)
    )
    conn.execute(
        statement.on_conflict_do_update(
            index_elements=["study_id", "key"], set_={"value_json": statement.excluded.value_json}
        )
    )


def _name_is_taken(target: _Target, name: str, why: str) -> StudyExistsError:
    return StudyExistsError(
        f"the study named {name!r} in {target.shown} {why}; --study NAME --as NEWNAME imports it under another name"
    )


class _Copy:
    """One study on its way."""

    def __init__(self, source: Source, target: _Target, plan: _Plan, progress: Progress) -> None:
        self._source = source
        self._target = target
        self._plan = plan
        self._progress = progress
        self._changes = list(plan.run_here)

    def run(self) -> Imported:
        """Create the study if it is not there, then bring its trials, a batch a transaction."""
        plan = self._plan
        attributes = [
            (study_user_attributes, self._fitting(plan.study.user_attrs)),
            (study_system_attributes, self._fitting(plan.study.system_attrs)),
        ]
        study_id = self._create() if plan.study_id is None else plan.study_id
        self._locked(study_id, lambda conn: self._write_attributes(conn, study_id, attributes))
        copied = updated = 0
        for start in range(0, len(plan.todo), _BATCH):
            self._progress(plan.name, start, len(plan.todo))
            numbers = plan.todo[start : start + _BATCH]
            batch = self._read(numbers)
            curves = self._read_curves(numbers)
            new, changed = self._locked(study_id, partial(self._write, study_id=study_id, batch=batch, curves=curves))
            copied, updated = copied + new, updated + changed
        # Last, as workers may join a study that has one, and add trials.
        self._locked(study_id, lambda conn: self._write_spec(conn, study_id))
        self._progress(plan.name, len(plan.todo), len(plan.todo))
        return Imported(
            study=plan.name,
            source_study=plan.study.study_name,
            copied=copied,
            updated=updated,
            already_there=len(plan.stamps) - copied - updated,
            unfinished=sum(not stamp.is_finished for stamp in plan.stamps),
            changes=tuple(self._changes),
        )

    @property
    def _here(self) -> _Origin:
        return _Origin(url=self._source.shown, study=self._plan.study.study_name)

    def _locked(self, study_id: int, work: Callable[[Connection], T]) -> T:
        def locked(conn: Connection) -> T:
            try:
                lock_study(conn, study_id)
            except KeyError:
                raise StudyNotFoundError(
                    f"study {self._plan.name!r} in {self._target.shown} was deleted while it was imported; import"
                    " it again"
                ) from None
            return work(conn)

        return self._target.sessions.transaction(locked)

    def _create(self) -> int:
        plan = self._plan

        def work(conn: Connection) -> int | None:
            creation = upsert(studies).values(study_name=plan.name).on_conflict_do_nothing()
            study_id: int | None = conn.execute(creation.returning(studies.c.study_id)).scalar()
            if study_id is not None:
                rows = [
                    {"study_id": study_id, "direction": direction.name, "objective": objective}
                    for objective, direction in enumerate(plan.study.directions)
                ]
                conn.execute(insert(study_directions).values(rows))
                _set_origin(conn, study_id, self._here)
            return study_id

        study_id = self._target.sessions.transaction(work)
        if study_id is None:
            raise StudyExistsError(
                f"another process has just created {plan.name!r} in {self._target.shown}; once it is done, import again"
            )
        return study_id

    def _fitting(self, attrs: Mapping[str, Any]) -> dict[str, Any]:
        fitting = {}
        for key, value in attrs.items():
            try:
                fitting[checked_name(key, "an attribute's key")] = value
            except InvalidWriteError as error:
                self._changes.append(Change(trial=None, what=f"left out: {error}"))
        return fitting

    def _write_attributes(
        self, conn: Connection, study_id: int, attributes: Sequence[tuple[Table, Mapping[str, Any]]]
    ) -> None:
        """Add the attributes that the study lacks; what was changed here, such as a note, stays.

        So does where it came from, of which a source that was imported itself has an attribute too.
        """
        for table, attrs in attributes:
            if attrs:
                rows = [
                    {"study_id": study_id, "key": key, "value_json": json.dumps(value)} for key, value in attrs.items()
                ]
                conn.execute(upsert(table).values(rows).on_conflict_do_nothing())
        origin = _origin(conn, study_id) or self._here
        _set_origin(conn, study_id, replace(self._here, unfinished=origin.unfinished))

    def _read(self, numbers: Sequence[int]) -> list[FrozenTrial]:
        """Return the trials as they will be here, by number."""
        number_of = {self._plan.stamps[number].trial_id: number for number in numbers}
        found = self._source.trials(list(number_of))
        if len(found) < len(numbers):
            raise StorageError(f"trials were deleted from {self._source.shown} while it was imported; import again")
        batch = []
        for trial in found:
            fit, changes = fitted(trial, number_of[trial._trial_id], len(self._plan.study.directions))
            batch.append(fit)
            self._changes.extend(changes)
        return sorted(batch, key=lambda trial: trial.number)

    def _read_curves(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows that tuner keeps of finished trials' epochs, with the trial's `number` in place of its id."""
        stamps = [self._plan.stamps[number] for number in numbers]
        number_of = {stamp.trial_id: number for stamp, number in zip(stamps, numbers, strict=True) if stamp.is_finished}
        return [{"number": number_of[row.pop("trial_id")], **row} for row in self._source.curves(list(number_of))]

    def _write(
        self, conn: Connection, study_id: int, batch: Sequence[FrozenTrial], curves: Sequence[Mapping[str, Any]]
    ) -> tuple[int, int]:
        """Write a batch as far as it is not there; how many trials were copied, and how many updated."""
        origin = _origin(conn, study_id) or self._here
        among = trials.c.number == literal([trial.number for trial in batch], ARRAY(INTEGER)).any_()
        there = {row.number: row for row in conn.execute(_stamps_of(study_id).where(among).with_for_update())}
        new = [trial for trial in batch if trial.number not in there]
        waiting: dict[int, FrozenTrial] = {}  # by id here
        for trial in batch:
            row = there.get(trial.number)
            if row is not None and _is_another(row, stamp_of(trial), origin):
                raise self._disturbed(trial.number)
            if row is not None and row.state == "WAITING" and trial.number in origin.unfinished:
                waiting[row.trial_id] = trial
        ours = load_trials(conn, trials_where(trials.c.trial_id.in_(list(waiting))), {})
        changed = [
            (trial._trial_id, waiting[trial._trial_id])
            for trial in ours
            if not is_same(trial, waiting[trial._trial_id])
        ]
        insert_trials(conn, study_id, new)
        replace_trials(conn, changed)
        written = [*new, *(trial for _, trial in changed)]
        finished = {trial.number for trial in written if trial.state.is_finished()}
        _write_curves(conn, study_id, [row for row in curves if row["number"] in finished])
        unfinished = origin.unfinished - finished | {trial.number for trial in written} - finished
        if unfinished != origin.unfinished:
            _set_origin(conn, study_id, replace(origin, unfinished=unfinished))
        return len(new), len(changed)

    def _disturbed(self, number: int) -> StudyExistsError:
        return StudyExistsError(
            f"somebody else writes to study {self._plan.name!r} in {self._target.shown}: its trial {number} is not the"
            " one to import; import again once that has ended, or under another name: --study NAME --as NEWNAME"
        )

    def _write_spec(self, conn: Connection, study_id: int) -> None:
        """Give a study of another tuner database its spec and what it learns from: workers can go on with it here."""
        found = self._source.spec(self._plan.study._study_id)
        if found is not None:
            history = found.get("history") or null()  # None would be JSON's null
            row = {"study_id": study_id, **found, "history": history}
            conn.execute(upsert(tuner_studies).values(row).on_conflict_do_nothing())
