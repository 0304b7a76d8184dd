import optuna
import pytest
from optuna.storages import RDBStorage
from sqlalchemy import text

from storage import StorageError, UnreachableError, open_engine, open_storage, parse_url


@pytest.fixture
def close():
    """Close the storages that a test opened."""
    opened = []
    yield lambda storage: opened.append(storage) or storage
    for storage in opened:
        storage.engine.dispose()


@pytest.mark.slow
def test_a_study_runs_without_a_warning_and_with_heartbeats(empty_database, close):
    storage = close(open_storage(empty_database))
    study = optuna.create_study(storage=storage, study_name="ours")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    engine = open_engine(empty_database)
    with engine.connect() as conn:
        assert conn.scalar(text("SELECT count(*) FROM trial_heartbeats")) == 2
    engine.dispose()


def test_a_trial_whose_heart_stopped_is_failed_after_the_grace_period(database, close):
    storage = close(open_storage(database))
    study = optuna.create_study(storage=storage)
    for _ in range(2):
        storage.record_heartbeat(storage.create_new_trial(study._study_id))
    engine = open_engine(database)
    with engine.begin() as conn:
        late = text("UPDATE trial_heartbeats SET heartbeat = heartbeat - make_interval(secs => 61) WHERE trial_id = 1")
        assert conn.execute(late).rowcount == 1
        less = text("UPDATE trial_heartbeats SET heartbeat = heartbeat - make_interval(secs => 50) WHERE trial_id = 2")
        assert conn.execute(less).rowcount == 1
    engine.dispose()
    study.optimize(lambda _: 0.0, n_trials=1)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "RUNNING", "COMPLETE"]


def test_sessions_of_the_storage_have_our_settings(database, close):
    storage = close(open_storage(database))
    with storage.engine.connect() as conn:
        shown = [conn.scalar(text(f"SHOW {name}")) for name in ("TimeZone", "statement_timeout", "application_name")]
    assert shown == ["UTC", "1min", "tuner"]


def test_stock_optuna_works_on_the_same_study(database, close):
    study = optuna.create_study(storage=close(open_storage(database)), study_name="shared")
    stock = RDBStorage(database)
    optuna.load_study(study_name="shared", storage=stock).enqueue_trial({"x": 0.5})
    stock.remove_session()
    stock.engine.dispose()
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert [trial.value for trial in study.trials] == [0.5]


def test_a_read_only_storage_reads_and_does_not_write(database, close):
    optuna.create_study(storage=close(open_storage(database)), study_name="seen")
    reader = close(open_storage(database, read_only=True))
    study = optuna.load_study(study_name="seen", storage=reader)
    assert study.trials == []
    with pytest.raises(StorageError, match="read-only transaction"):
        study.set_user_attr("key", "value")


def test_a_server_that_is_away_is_our_error_when_opening_and_later(database, maintenance_url, close):
    with pytest.raises(UnreachableError):
        open_storage("postgresql://ann@127.0.0.1:1/tuner")
    storage = close(open_storage(database))
    name = parse_url(database).database
    maintenance = open_engine(maintenance_url)
    with maintenance.begin() as conn:
        _end_sessions(conn, name)
        conn.execute(text(f'ALTER DATABASE "{name}" RENAME TO "{name}_away"'))
    try:
        with pytest.raises(UnreachableError, match=r"does not exist"):
            storage.get_all_studies()
    finally:
        with maintenance.begin() as conn:
            conn.execute(text(f'ALTER DATABASE "{name}_away" RENAME TO "{name}"'))
        maintenance.dispose()
    assert storage.get_all_studies() == []


def _end_sessions(conn, name):
    """End the sessions of a database, and wait until they are gone."""
    kill = text("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = :name")
    assert all(conn.scalars(kill, {"name": name}))
