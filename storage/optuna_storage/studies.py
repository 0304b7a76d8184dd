"""The part of Optuna's storage contract that is about studies."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.storages._base import DEFAULT_STUDY_NAME_PREFIX
from optuna.study._frozen import FrozenStudy
from optuna.study._study_direction import StudyDirection
from sqlalchemy import Column, Connection, Select, Table, insert, literal, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError

from storage.coordination.control import delete_rows
from storage.database.foreign import BadRowError, json_text, json_value, known_json, skipped
from storage.database.sessions import Sessions
from storage.database.tables import (
    studies,
    study_directions,
    study_system_attributes,
    study_user_attributes,
)
from storage.database.values import checked_name


class StudyStorage(BaseStorage):
    """Studies in PostgreSQL; `sessions` is the subclass's to set."""

    sessions: Sessions

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        name = f"{DEFAULT_STUDY_NAME_PREFIX}{uuid.uuid4()}" if study_name is None else study_name
        checked_name(name, "a study's name")

        def work(conn: Connection) -> int:
            try:
                study_id: int = conn.execute(
                    insert(studies).values(study_name=name).returning(studies.c.study_id)
                ).scalar_one()
            except IntegrityError:
                raise DuplicatedStudyError(f"there is a study named {name!r} already; choose another name") from None
            rows = [
                {"study_id": study_id, "direction": direction.name, "objective": objective}
                for objective, direction in enumerate(directions)
            ]
            conn.execute(insert(study_directions).values(rows))
            return study_id

        return self.sessions.transaction(work)

    def delete_study(self, study_id: int) -> None:
        def work(conn: Connection) -> None:
            lock_study(conn, study_id)
            delete_rows(conn, study_id)

        self.sessions.transaction(work)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._set_study_attr(study_user_attributes, study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._set_study_attr(study_system_attributes, study_id, key, value)

    def _set_study_attr(self, table: Table, study_id: int, key: str, value: Any) -> None:
        checked_name(key, "an attribute's key")
        the_study = select(studies.c.study_id, literal(key), literal(json_text(value))).where(
            studies.c.study_id == study_id
        )
        insertion = upsert(table).from_select(
            ["study_id", "key", "value_json"], the_study.with_for_update(read=True, key_share=True)
        )
        statement = insertion.on_conflict_do_update(
            index_elements=["study_id", "key"], set_={"value_json": insertion.excluded.value_json}
        ).execution_options(preserve_rowcount=True)
        if self.sessions.statement(lambda conn: conn.execute(statement).rowcount) == 0:
            raise no_study(study_id)

    def get_study_id_from_name(self, study_name: str) -> int:
        query = select(studies.c.study_id).where(studies.c.study_name == study_name)
        study_id: int | None = self.sessions.statement(lambda conn: conn.execute(query).scalar())
        if study_id is None:
            raise KeyError(f"no study is named {study_name!r}")
        return study_id

    def get_study_name_from_id(self, study_id: int) -> str:
        query = select(studies.c.study_name).where(studies.c.study_id == study_id)
        name: str | None = self.sessions.statement(lambda conn: conn.execute(query).scalar())
        if name is None:
            raise no_study(study_id)
        return name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        directions = self.sessions.statement(lambda conn: directions_of(conn, study_id))
        if not directions:
            raise no_study(study_id)
        return directions

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._attrs(study_user_attributes, studies.c.study_id, study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._attrs(study_system_attributes, studies.c.study_id, study_id)

    def get_all_studies(self) -> list[FrozenStudy]:
        return self.sessions.snapshot(all_studies)

    def _attrs(self, table: Table, owner: Column[int], owner_id: int) -> dict[str, Any]:
        """Return the attributes of a study or a trial. Raises KeyError if there is none of that id."""
        query = (
            select(table.c.key, known_json(table.c.value_json).label("value_json"))
            .select_from(owner.table.outerjoin(table, table.c[owner.name] == owner))
            .where(owner == owner_id)
            .order_by(table.primary_key.columns[0])
        )
        rows = self.sessions.statement(lambda conn: conn.execute(query).all())
        if not rows:
            raise KeyError(f"no row of {owner.table.name} has the id {owner_id}")
        owner_text = f"{owner.table.name} of id {owner_id}"
        return dict(_readable((row.key, row.value_json, owner_text) for row in rows if row.key is not None))


def lock_study(conn: Connection, study_id: int) -> None:
    """Lock the study's row until the transaction ends, as stock Optuna does to create a trial. Raises KeyError."""
    query: Select[tuple[int]] = select(studies.c.study_id).where(studies.c.study_id == study_id)
    if conn.execute(query.with_for_update()).one_or_none() is None:
        raise no_study(study_id)


def directions_of(conn: Connection, study_id: int) -> list[StudyDirection]:
    """Return the study's directions by objective, none if it does not exist."""
    query = (
        select(study_directions.c.direction)
        .where(study_directions.c.study_id == study_id)
        .order_by(study_directions.c.objective)
    )
    return [StudyDirection[name] for name in conn.execute(query).scalars()]


def no_study(study_id: int) -> KeyError:
    """Return what Optuna's contract raises for an unknown study."""
    return KeyError(f"no study has the id {study_id}")


def all_studies(conn: Connection) -> list[FrozenStudy]:
    """Return the studies of a database, of any that SQLAlchemy speaks to, oldest first."""
    rows = conn.execute(select(studies.c.study_id, studies.c.study_name).order_by(studies.c.study_id)).all()
    directions: dict[int, list[StudyDirection]] = defaultdict(list)
    for study_id, name in conn.execute(
        select(study_directions.c.study_id, study_directions.c.direction).order_by(study_directions.c.objective)
    ):
        directions[study_id].append(StudyDirection[name])
    user_attrs, system_attrs = (
        _attrs_of_all(conn, table) for table in (study_user_attributes, study_system_attributes)
    )
    return [
        FrozenStudy(
            study_name=row.study_name,
            direction=None,
            directions=directions[row.study_id],
            user_attrs=user_attrs[row.study_id],
            system_attrs=system_attrs[row.study_id],
            study_id=row.study_id,
        )
        for row in rows
        if _has_directions(row.study_id, row.study_name, directions)
    ]


def _has_directions(study_id: int, name: str, directions: Container[int]) -> bool:
    if study_id not in directions:
        skipped(f"the study {name!r} of id {study_id}", "it has no direction")
    return study_id in directions


def _attrs_of_all(conn: Connection, table: Table) -> dict[int, dict[str, Any]]:
    attrs: dict[int, dict[str, Any]] = defaultdict(dict)
    query = select(table.c.study_id, table.c.key, table.c.value_json).order_by(table.primary_key.columns[0])
    for study_id, key, text in conn.execute(query):
        attrs[study_id].update(_readable([(key, text, f"studies of id {study_id}")]))
    return attrs


def _readable(rows: Iterable[tuple[str, str | None, str]]) -> Iterator[tuple[str, Any]]:
    """Yield key and value of each attribute that can be read."""
    for key, text, owner in rows:
        try:
            yield key, json_value(text)
        except BadRowError as error:
            skipped(f"the attribute {key!r} of {owner}", error)
