import os

import optuna
import pytest
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from sqlalchemy import event, inspect, text
from sqlalchemy.exc import IntegrityError

from storage import SchemaVersionError, StorageError, ensure_schema, open_engine, parse_url
from storage.database import tables
from storage.database.schema import SCHEMA_VERSION

ENSURE = """
import sys
from storage import ensure_schema, open_engine
print("ready", flush=True)
sys.stdin.readline()
engine = open_engine(sys.argv[1])
ensure_schema(engine)
engine.dispose()
"""


@pytest.fixture
def engine(database):
    engine = open_engine(database)
    yield engine
    engine.dispose()


@pytest.fixture
def empty_engine(empty_database):
    engine = open_engine(empty_database)
    yield engine
    engine.dispose()


def _versions(engine):
    with engine.connect() as conn:
        return list(conn.scalars(text("SELECT version FROM tuner_schema ORDER BY version")))


def _shape(table):
    return {
        column.name: (
            column.type.compile(sqlalchemy.dialects.postgresql.dialect()),
            getattr(column.type, "enums", None),
            column.nullable,
            column.primary_key,
            sorted(key.target_fullname for key in column.foreign_keys),
        )
        for column in table.columns
    }


def test_our_view_of_optunas_tables_is_optunas():
    ours = tables.optuna_metadata.tables
    theirs = models.BaseModel.metadata.tables
    for name, table in ours.items():
        expected = _shape(theirs[name])
        for column, (type_, *rest) in _shape(table).items():
            # Optuna writes Float(53), which is PostgreSQL's double precision.
            assert (column, type_.replace("DOUBLE PRECISION", "FLOAT(53)"), *rest) == (column, *expected[column])
    assert _shape(ours["trials"]).keys() == _shape(theirs["trials"]).keys()


def test_the_migrations_make_the_tables_that_we_declare(engine):
    found = inspect(engine)
    ours = tables.tuner_metadata.tables
    assert {name for name in found.get_table_names() if name.startswith("tuner_")} == ours.keys()
    for name, table in ours.items():
        assert _columns_found(found, name) == _columns_declared(table, engine.dialect), name
        if table.primary_key.columns:
            assert found.get_pk_constraint(name)["constrained_columns"] == table.primary_key.columns.keys()
        indexed = {tuple(index["column_names"]) for index in found.get_indexes(name)}
        assert indexed == {tuple(index.columns.keys()) for index in table.indexes}, name


def _columns_found(found, table):
    return {
        column["name"]: (
            column["type"].compile(found.bind.dialect),
            column["nullable"],
            column["default"] is not None,
            "identity" in column,
        )
        for column in found.get_columns(table)
    }


def _columns_declared(table, dialect):
    return {
        column.name: (
            column.type.compile(dialect),
            column.nullable,
            column.server_default is not None,
            column is table.autoincrement_column,
        )
        for column in table.columns
    }


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_without_unicode_is_refused_with_the_command_that_makes_another(server, encoding):
    admin = sqlalchemy.create_engine(parse_url(server.admin_url()), isolation_level="AUTOCOMMIT")
    name = f"tuner_test_{encoding.lower()}"
    with admin.connect() as conn:
        conn.execute(text(f"CREATE DATABASE {name} OWNER tuner TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'"))
    engine = open_engine(parse_url(server.url()).set(database=name))
    try:
        with pytest.raises(StorageError, match=rf"has encoding {encoding}, .* make one: createdb .*--encoding=UTF8"):
            ensure_schema(engine)
        assert inspect(engine).get_table_names() == []
    finally:
        engine.dispose()
        with admin.connect() as conn:
            conn.execute(text(f"DROP DATABASE {name}"))
        admin.dispose()


def test_a_search_path_without_a_schema_is_told_and_so_is_the_variable(server, empty_database, tmp_path, monkeypatch):
    found = server.status()
    (tmp_path / f".s.PGSQL.{found.port}").symlink_to(found.socket_directory / f".s.PGSQL.{found.port}")
    monkeypatch.setenv("PGOPTIONS", "-c search_path=other")
    engine = open_engine(f"postgresql://tuner@/{parse_url(empty_database).database}?host={tmp_path}")
    with pytest.raises(StorageError, match=r"no schema of the search_path .*took part: PGOPTIONS$"):
        ensure_schema(engine)
    engine.dispose()


@pytest.mark.slow
def test_six_processes_at_once_on_an_empty_database_all_succeed(empty_database, empty_engine, start_python):
    processes = [start_python(ENSURE, empty_database) for _ in range(6)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outcomes = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    assert outcomes == [("", 0)] * 6
    assert _versions(empty_engine) == list(range(1, SCHEMA_VERSION + 1))


def test_a_database_that_is_current_costs_one_query_and_no_alembic(database, engine, start_python):
    with engine.connect():
        pass  # the first connection asks for the server's version and the like
    statements = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    ensure_schema(engine)
    assert len(statements) == 1
    code = ENSURE + "print(*{'alembic', 'optuna'} & sys.modules.keys())"
    assert start_python(code, database).communicate("\n", timeout=60) == ("ready\n\n", "")


def test_optuna_finds_its_tables_as_it_makes_them(database):
    storage = RDBStorage(database, skip_table_creation=True)
    assert storage.get_current_version() == storage.get_head_version()
    storage.remove_session()
    storage.engine.dispose()


def _a_stock_study(url, trials=3):
    storage = RDBStorage(url)
    study = optuna.create_study(storage=storage, study_name="stock")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=trials)
    best = study.best_value
    storage.remove_session()
    storage.engine.dispose()
    return best


@pytest.mark.slow
def test_a_database_of_stock_optuna_is_adopted_with_its_studies(empty_database, empty_engine):
    best = _a_stock_study(empty_database)
    ensure_schema(empty_engine)
    assert _versions(empty_engine) == list(range(1, SCHEMA_VERSION + 1))
    storage = RDBStorage(empty_database)
    study = optuna.load_study(study_name="stock", storage=storage)
    assert (study.best_value, len(study.trials)) == (best, 3)
    storage.remove_session()
    storage.engine.dispose()


def test_a_stock_database_with_a_number_twice_is_refused_and_left_alone(empty_database, empty_engine):
    _a_stock_study(empty_database)
    with empty_engine.begin() as conn:
        conn.execute(text("UPDATE trials SET number = 0"))
    with pytest.raises(StorageError, match=r"cannot adopt .*number\)=\(1, 0\).*delete the extra trials"):
        ensure_schema(empty_engine)
    assert not inspect(empty_engine).has_table("tuner_schema")


def test_tables_of_an_older_optuna_are_refused_with_its_advice(empty_database, empty_engine):
    _a_stock_study(empty_database)
    with empty_engine.begin() as conn:
        conn.execute(text("UPDATE alembic_version SET version_num = 'v3.0.0.d'"))
    with pytest.raises(SchemaVersionError, match=r"cannot adopt postgresql://.*optuna storage upgrade"):
        ensure_schema(empty_engine)


def test_a_newer_database_is_refused(engine):
    with engine.begin() as conn:
        conn.execute(text("INSERT INTO tuner_schema VALUES (:newer)"), {"newer": SCHEMA_VERSION + 1})
    with pytest.raises(SchemaVersionError, match=rf"have version {SCHEMA_VERSION + 1}, .* upgrade it: pip install"):
        ensure_schema(engine)


def test_a_failed_migration_leaves_nothing_and_can_be_run_again(empty_database, empty_engine):
    _a_stock_study(empty_database)
    with empty_engine.begin() as conn:
        conn.execute(text("CREATE TABLE tuner_exports ()"))
    with pytest.raises(sqlalchemy.exc.ProgrammingError, match=r"already exists"):
        ensure_schema(empty_engine)
    assert not inspect(empty_engine).has_table("tuner_studies")
    with empty_engine.begin() as conn:
        conn.execute(text("DROP TABLE tuner_exports"))
    ensure_schema(empty_engine)
    assert _versions(empty_engine) == list(range(1, SCHEMA_VERSION + 1))


def test_a_read_only_session_reads_a_current_database_and_refuses_an_empty_one(database, empty_database):
    reader = open_engine(database, read_only=True)
    ensure_schema(reader)
    reader.dispose()
    reader = open_engine(empty_database, read_only=True)
    with pytest.raises(StorageError, match=r"has no tuner tables .* read-only; open it once with a role"):
        ensure_schema(reader)
    reader.dispose()


@pytest.mark.skipif("TUNER_TEST_STORAGE" in os.environ, reason="uses the embedded server's roles")
def test_a_role_without_the_right_to_create_is_told_what_to_grant(server, empty_database):
    url = parse_url(server.reader_url()).set(database=parse_url(empty_database).database)
    engine = open_engine(url.update_query_dict({"options": "-c default_transaction_read_only=off"}))
    with pytest.raises(StorageError, match=r"permission denied .*GRANT CREATE ON SCHEMA public TO tuner_reader"):
        ensure_schema(engine)
    engine.dispose()


def test_a_number_is_given_to_one_trial_of_a_study_only(engine):
    with engine.begin() as conn:
        conn.execute(text("INSERT INTO studies (study_name) VALUES ('a'), ('b')"))
        conn.execute(text("INSERT INTO trials (number, study_id, state) SELECT 0, study_id, 'WAITING' FROM studies"))
    with pytest.raises(IntegrityError, match=r"ux_trials_study_id_number"), engine.begin() as conn:
        conn.execute(text("INSERT INTO trials (number, study_id, state) SELECT 0, study_id, 'WAITING' FROM studies"))


def test_our_rows_go_with_the_study_that_optuna_deletes(database, engine):
    storage = RDBStorage(database)
    study = optuna.create_study(storage=storage, study_name="short-lived")
    study.enqueue_trial({"x": 1})
    with engine.begin() as conn:
        conn.execute(text("INSERT INTO tuner_studies (study_id, spec) SELECT study_id, '{}' FROM studies"))
        conn.execute(text("INSERT INTO tuner_leases (trial_id, attempts) SELECT trial_id, 1 FROM trials"))
        conn.execute(
            text(
                "INSERT INTO tuner_exports (study_id, trial_number, weights_sha256, test_metrics) "
                "SELECT study_id, 0, '', '{}' FROM studies"
            )
        )
    optuna.delete_study(study_name="short-lived", storage=storage)
    storage.remove_session()
    storage.engine.dispose()
    with engine.connect() as conn:
        for table in ("tuner_studies", "tuner_leases", "tuner_exports"):
            assert conn.scalar(text(f"SELECT count(*) FROM {table}")) == 0  # noqa: S608
