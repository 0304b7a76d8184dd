"""Results that the database could not take are kept on disk, and delivered once to the trial that they are of."""

import json
import uuid
from dataclasses import replace

import pytest
from optuna.trial import TrialState
from sqlalchemy import text

from storage import PostgresStorage, open_engine, open_storage
from storage.coordination import claims, standings, studies
from storage.coordination.delivery import Result
from storage.trials.curves import CurvePoint, curves
from tuner.slot.spool import Spool

BUDGET = standings.Budget(trials=3, timeout_s=None, max_failures=3, max_attempts=3)
LAST = CurvePoint(step=2, value=0.75, train_loss=0.4, seconds=1.0, rates=(0.1,), metrics={"value": 0.75, "f1": None})
HOLDER = claims.Holder(worker="gpu-1:7")


@pytest.fixture
def storage(database):
    storage = PostgresStorage(database)
    yield storage
    storage.engine.dispose()


@pytest.fixture
def study_id(storage):
    return studies.create_study(storage.engine, "s", "maximize", {"version": 1}, {}, "value").study_id


@pytest.fixture
def held(storage, study_id):
    return claims.claim(storage.sessions, study_id, BUDGET, HOLDER)


def a_result(held, **changes):
    result = Result(
        token=held.token,
        state=TrialState.COMPLETE,
        value=0.75,
        attrs={"seconds": 1.5},
        reports=[CurvePoint(step=1, value=0.5), LAST],
    )
    return replace(result, **changes)


def expire(storage):
    with storage.engine.begin() as conn:
        conn.execute(text("update tuner_leases set expires_at = now() - interval '1 hour'"))


def deliver(spool, storage, study_id):
    said = []
    spool.deliver(storage.sessions, study_id, BUDGET, lambda *line: said.append(line))
    return [event for event, _, _ in said]


def trials(database):
    return open_storage(database).get_all_trials(1)


def check_delivered(database, *, details=True):
    (trial,) = trials(database)
    assert (trial.state, trial.value, trial.intermediate_values, trial.user_attrs) == (
        TrialState.COMPLETE,
        0.75,
        {1: 0.5, 2: 0.75},
        {"seconds": 1.5},
    )
    engine = open_engine(database)
    with engine.connect() as conn:
        assert curves(conn, 1) == {
            0: [CurvePoint(step=1, value=0.5), LAST if details else CurvePoint(step=2, value=0.75)]
        }
    engine.dispose()


def test_a_result_is_delivered_with_its_reports_and_attributes(storage, study_id, held, database, tmp_path):
    spool = Spool(tmp_path)
    path = spool.add("s", held.number, a_result(held))
    storage.set_trial_intermediate_value(held.trial_id, 1, 0.5)  # one report had arrived
    assert deliver(spool, storage, study_id) == ["result_delivered"]
    check_delivered(database)
    assert not path.exists()
    with storage.engine.connect() as conn:
        assert conn.execute(text("select outcome from tuner_attempts")).scalars().all() == ["complete"]


def test_a_result_that_version_0_1_kept_is_delivered(storage, study_id, held, database, tmp_path):
    spool = Spool(tmp_path)
    path = spool.add("s", held.number, a_result(held))
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "reports": [[1, 0.5], [2, 0.75]]}))
    assert deliver(spool, storage, study_id) == ["result_delivered"]
    check_delivered(database, details=False)


def test_a_result_of_a_trial_that_waits_again_is_delivered(storage, study_id, held, database, tmp_path):
    spool = Spool(tmp_path)
    spool.add("s", held.number, a_result(held))
    storage.set_trial_intermediate_value(held.trial_id, 1, 0.5)
    claims.release(storage.sessions, held, claims.LOST, 3)
    assert trials(database)[0].intermediate_values == {}
    assert deliver(spool, storage, study_id) == ["result_delivered"]
    check_delivered(database)


def test_a_result_of_a_trial_that_another_attempt_runs_is_dropped(storage, study_id, held, database, tmp_path):
    spool = Spool(tmp_path)
    path = spool.add("s", held.number, a_result(held))
    expire(storage)
    again = claims.claim(storage.sessions, study_id, BUDGET, HOLDER)
    assert again.number == held.number
    assert deliver(spool, storage, study_id) == ["result_late"]
    assert not path.exists()
    assert [trial.state for trial in trials(database)] == [TrialState.RUNNING]


def test_no_late_result_exceeds_the_budget(storage, study_id, held, database, tmp_path):
    spool = Spool(tmp_path)
    spool.add("s", held.number, a_result(held))
    claims.release(storage.sessions, held, claims.LOST, 3)
    with storage.engine.begin() as conn:
        rows = [{"study_id": study_id, "number": number} for number in (1, 2, 3)]
        insert = "insert into trials (study_id, number, state) values (:study_id, :number, 'COMPLETE')"
        conn.execute(text(insert), rows)
    assert deliver(spool, storage, study_id) == ["result_late"]
    assert trials(database)[0].state == TrialState.WAITING


def test_a_result_that_was_delivered_already_is_not_written_again(storage, study_id, held, database, tmp_path):
    spool = Spool(tmp_path)
    path = spool.add("s", held.number, a_result(held))
    kept = path.read_bytes()
    deliver(spool, storage, study_id)
    path.write_bytes(kept)
    assert deliver(spool, storage, study_id) == ["result_delivered"]
    check_delivered(database)


def test_results_of_other_studies_and_databases_stay(storage, study_id, held, tmp_path):
    spool = Spool(tmp_path)
    foreign = spool.add("s", 0, a_result(replace(held, token=uuid.uuid4())))
    other = studies.create_study(storage.engine, "other", "maximize", {"version": 1}, {}, "value").study_id
    mine = spool.add("s", held.number, a_result(held))
    of_another_version = tmp_path / "spool" / "new.json"
    of_another_version.write_text('{"version": 2}')
    assert deliver(spool, storage, other) == []
    assert foreign.exists()
    assert of_another_version.exists()
    assert mine.exists()
    assert deliver(spool, storage, study_id) == ["result_delivered"]
    assert foreign.exists()


def test_a_failed_and_a_pruned_trial_are_delivered_as_such(storage, study_id, database, tmp_path):
    spool = Spool(tmp_path)
    failed, pruned = (claims.claim(storage.sessions, study_id, BUDGET, HOLDER) for _ in range(2))
    spool.add("s", 0, a_result(failed, state=TrialState.FAIL, value=None, reports=[], attrs={"failure": "nan"}))
    spool.add("s", 1, a_result(pruned, state=TrialState.PRUNED, value=0.75))
    assert deliver(spool, storage, study_id) == ["result_delivered"] * 2
    assert [(trial.state, trial.value) for trial in trials(database)] == [
        (TrialState.FAIL, None),
        (TrialState.PRUNED, 0.75),
    ]


def test_a_result_that_no_database_takes_is_put_aside(storage, study_id, held, tmp_path):
    spool = Spool(tmp_path)
    path = spool.add("s", held.number, a_result(held, attrs={"k" * 600: 1}))
    assert deliver(spool, storage, study_id) == ["result_refused"]
    assert [left.name for left in path.parent.iterdir()] == [path.with_suffix(".refused").name]
    assert deliver(spool, storage, study_id) == []


def test_a_damaged_result_is_told_once_and_keeps_no_other_back(storage, study_id, held, database, tmp_path):
    spool = Spool(tmp_path)
    path = spool.add("s", held.number, a_result(held))
    path.with_name("0.json").write_text('{"study": "s", "num')
    assert deliver(spool, storage, study_id) == ["result_refused", "result_delivered"]
    assert [left.name for left in path.parent.iterdir()] == ["0.refused"]
    check_delivered(database)
