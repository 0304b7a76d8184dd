"""Whether what a database holds belongs together: a dump that was restored in part leaves rows that do not."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, Engine, Integer, Select, Table, exists, func, inspect, select, text

from storage.database.tables import optuna_metadata, studies, trial_values, trials, tuner_metadata

_TABLES = [*optuna_metadata.sorted_tables, *tuner_metadata.sorted_tables]
_OWNERS = {"trial_id": trials, "study_id": studies}


def faults(engine: Engine) -> list[str]:
    """Return what is wrong with the rows of this database, a phrase each; none of it is what a program of ours does.

    Reads every table once, in one snapshot.
    """
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as conn:
        return [*_without_values(conn), *_without_owners(conn), *_doubles(conn), *_keys(conn), *_sequences(conn)]


def _without_values(conn: Connection) -> Iterator[str]:
    has_value = exists().where(trial_values.c.trial_id == trials.c.trial_id)
    lacking = select(trials).where(trials.c.state == "COMPLETE", ~has_value).subquery()
    n = conn.scalar(select(func.count()).select_from(lacking)) or 0
    if n:
        first = (
            select(lacking.c.number, studies.c.study_name)
            .outerjoin_from(lacking, studies, studies.c.study_id == lacking.c.study_id)
            .order_by(lacking.c.trial_id)
        )
        row = conn.execute(first.limit(1)).one()
        yield f"{n} complete trials have no value, the first is trial {row.number} of study {row.study_name!r}"


def _without_owners(conn: Connection) -> Iterator[str]:
    for table in _TABLES:
        for name, owner in _OWNERS.items():
            if table is not owner and name in table.c:
                has_owner = exists().where(owner.c[name] == table.c[name])
                n = _count(conn, select(table.c[name]).where(table.c[name].is_not(None), ~has_owner))
                if n:
                    yield f"{n} rows of {table.name} are of a {name.removesuffix('_id')} that is not there"


def _doubles(conn: Connection) -> Iterator[str]:
    by_number = select(trials.c.study_id, trials.c.number).group_by(trials.c.study_id, trials.c.number)
    n = _count(conn, by_number.having(func.count() > 1))
    if n:
        yield f"{n} trials have the number of another trial of their study"


def _keys(conn: Connection) -> Iterator[str]:
    found = inspect(conn)
    for table in _TABLES:
        if table.primary_key.columns and not found.get_pk_constraint(table.name)["constrained_columns"]:
            yield f"{table.name} has no primary key"


def _sequences(conn: Connection) -> Iterator[str]:
    for table in _TABLES:
        key = _numbered_by(table)
        if key is None:
            continue
        name = conn.scalar(select(func.pg_get_serial_sequence(table.name, key)))
        if name is None:
            yield f"{table.name}.{key} has no sequence to number new rows by"
            continue
        # None for a sequence that was not used yet, or that this role may not read.
        last = conn.scalar(
            text("SELECT last_value FROM pg_sequences WHERE format('%I.%I', schemaname, sequencename) = :name"),
            {"name": name},
        )
        greatest = conn.scalar(select(func.max(table.c[key])))
        is_readable = conn.scalar(select(func.has_sequence_privilege(name, "SELECT")))
        if is_readable and greatest is not None and (last or 0) < greatest:
            yield f"new rows of {table.name} would get numbers that are taken: {key} goes up to {greatest}"


def _numbered_by(table: Table) -> str | None:
    """Return the column whose values PostgreSQL draws from a sequence."""
    key = table.autoincrement_column
    return key.name if key is not None and isinstance(key.type, Integer) and not key.foreign_keys else None


def _count(conn: Connection, query: Select[*tuple[int, ...]]) -> int:
    return conn.scalar(select(func.count()).select_from(query.subquery())) or 0
