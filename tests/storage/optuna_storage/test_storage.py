"""PostgresStorage where it is more than the contract: leases, races, stock clients beside it, statements a call."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import event, func, select, text

from storage import InvalidWriteError, LeaseLostError, PostgresStorage, StorageError, UnreachableError
from storage.coordination import claims
from storage.coordination.claims import Claim
from storage.coordination.standings import Budget
from storage.database import tables
from storage.database.sessions import Sessions
from storage.trials.curves import CurvePoint
from storage.trials.frozen import LazyTrial, is_bare

BUDGET = Budget(trials=100, timeout_s=None, max_failures=100, max_attempts=9)
X = FloatDistribution(0, 1)
NUL, LONG = "a\0b", "k" * 513

Open = Callable[..., PostgresStorage]


@pytest.fixture
def open_one(database: str) -> Iterator[Open]:
    """Open storage objects on the test's database."""
    opened: list[PostgresStorage] = []

    def open_(**settings: object) -> PostgresStorage:
        opened.append(PostgresStorage(database, **settings))
        return opened[-1]

    yield open_
    for storage in opened:
        storage.engine.dispose()


@pytest.fixture
def storage(open_one: Open) -> PostgresStorage:
    return open_one()


@pytest.fixture
def study_id(storage: PostgresStorage) -> int:
    return storage.create_new_study([StudyDirection.MINIMIZE], "s")


@pytest.fixture
def stock(database: str) -> Iterator[RDBStorage]:
    storage = RDBStorage(database)
    yield storage
    storage.remove_session()
    storage.engine.dispose()


def claimed(storage: PostgresStorage, study_id: int) -> Claim:
    held = claims.claim(storage.sessions, study_id, BUDGET, claims.Holder(worker="test"))
    assert isinstance(held, Claim)
    return held


def expired(storage: PostgresStorage, held: Claim) -> None:
    """Let the lease run out now."""
    with storage.engine.begin() as conn:
        conn.execute(
            text("update tuner_leases set expires_at = now() - interval '1 hour' where trial_id = :id"),
            {"id": held.trial_id},
        )


def a_finished_trial(value: float = 0.0, steps: int = 2) -> FrozenTrial:
    return create_trial(value=value, intermediate_values={step: step + value for step in range(steps)})


@contextmanager
def statements(storage: PostgresStorage) -> Iterator[list[str]]:
    """Collect the statements that a block sends."""
    sent: list[str] = []

    def remember(conn, cursor, statement, parameters, context, executemany):
        sent.append(statement)

    event.listen(storage.engine, "before_cursor_execute", remember)
    try:
        yield sent
    finally:
        event.remove(storage.engine, "before_cursor_execute", remember)


EPOCH = CurvePoint(step=1, value=0.5, train_loss=0.25, seconds=1.0, rates=(0.1,), metrics={"accuracy": 0.5})
WRITES = {
    "report": lambda storage, trial: storage.set_trial_intermediate_value(trial, 1, 0.5),
    "epoch": lambda storage, trial: storage.report(trial, EPOCH),
    "param": lambda storage, trial: storage.set_trial_param(trial, "x", 0.5, X),
    "user attribute": lambda storage, trial: storage.set_trial_user_attr(trial, "key", 1),
    "system attribute": lambda storage, trial: storage.set_trial_system_attr(trial, "key", 1),
    "complete": lambda storage, trial: storage.set_trial_state_values(trial, TrialState.COMPLETE, [1.0]),
    "fail": lambda storage, trial: storage.set_trial_state_values(trial, TrialState.FAIL),
    "requeue": lambda storage, trial: storage.set_trial_state_values(trial, TrialState.WAITING),
}


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_who_lost_the_lease_cannot_write(storage, open_one, study_id, write):
    former = claimed(storage, study_id)
    storage.hold(former)
    storage.set_trial_param(former.trial_id, "other", 0.5, X)
    expired(storage, former)
    now = claimed(storage, study_id)
    assert now.trial_id == former.trial_id
    before = open_one().get_trial(now.trial_id)
    with pytest.raises(LeaseLostError):
        write(storage, former.trial_id)
    assert open_one().get_trial(now.trial_id) == before
    holder = open_one()
    holder.hold(now)
    write(holder, now.trial_id)
    assert open_one().get_trial(now.trial_id) != before
    storage.let_go(former)  # from here on a client like any other


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_a_write_that_waited_for_the_trial_to_be_handed_on_does_nothing(storage, open_one, study_id, write):
    """The write starts while the claim of another worker is not committed yet, and sees the lease as it was."""
    former = claimed(storage, study_id)
    storage.hold(former)
    storage.set_trial_param(former.trial_id, "other", 0.5, X)  # so that the study is known
    raised: list[BaseException] = []

    def late() -> None:
        try:
            write(storage, former.trial_id)
        except LeaseLostError as error:
            raised.append(error)

    writer = threading.Thread(target=late)
    other = open_one()
    with other.engine.begin() as conn:
        conn.execute(text("update trials set state = 'RUNNING' where trial_id = :id"), {"id": former.trial_id})
        conn.execute(text("update tuner_leases set token = :token"), {"token": uuid.uuid4()})
        writer.start()
        waiting = text(
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        )
        deadline = threading.Event()
        for _ in range(2000):
            with open_one().engine.connect() as watch:
                if watch.scalar(waiting):
                    break
            deadline.wait(0.005)
        else:
            pytest.fail("the write did not wait")
    writer.join(10)
    assert len(raised) == 1
    trial = open_one().get_trial(former.trial_id)
    assert (trial.state, list(trial.params)) == (TrialState.RUNNING, ["other"])
    assert (trial.intermediate_values, trial.user_attrs, trial.system_attrs, trial.values) == ({}, {}, {}, None)


_RACER = """
import sys
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from storage import PostgresStorage
storage = PostgresStorage(sys.argv[1])
mine = float(sys.argv[2])
storage.get_all_studies()
print("ready", flush=True)
sys.stdin.readline()
won = []
for trial_id in map(int, sys.argv[3:]):
    try:
        if storage.set_trial_state_values(trial_id, TrialState.RUNNING):
            storage.set_trial_intermediate_value(trial_id, 0, mine)
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [mine])
            won.append(trial_id)
    except UpdateFinishedTrialError:
        pass
print(*won)
"""


@pytest.mark.slow
def test_two_processes_never_start_the_same_waiting_trial(storage, study_id, database, start_python):
    waiting = create_trial(state=TrialState.WAITING)
    ids = [storage.create_new_trial(study_id, waiting) for _ in range(40)]
    racers = [start_python(_RACER, database, str(number), *map(str, ids)) for number in (1, 2)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    won = []
    for number, racer in enumerate(racers, 1):
        out, err = racer.communicate(timeout=60)
        assert err == ""
        won.append({int(trial_id) for trial_id in out.split()})
        for trial_id in won[-1]:
            trial = storage.get_trial(trial_id)
            assert (trial.value, trial.intermediate_values) == (number, {0: number})
    assert sorted(won[0] | won[1]) == ids
    assert not won[0] & won[1]


def test_a_finish_whose_answer_was_lost_may_be_repeated_by_the_holder_alone(storage, open_one, study_id):
    held = claimed(storage, study_id)
    storage.hold(held)
    for _ in range(2):
        assert storage.set_trial_state_values(held.trial_id, TrialState.COMPLETE, [1.0])
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(held.trial_id, TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError):
        open_one().set_trial_state_values(held.trial_id, TrialState.COMPLETE, [1.0])
    assert storage.get_trial(held.trial_id).value == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "write",
    [
        lambda storage, trial: storage.set_trial_intermediate_value(trial, 2**31, 0.0),
        lambda storage, trial: storage.set_trial_intermediate_value(trial, -(2**31) - 1, 0.0),
        lambda storage, trial: storage.set_trial_state_values(trial, TrialState.COMPLETE, [math.nan]),
        lambda storage, trial: storage.set_trial_state_values(trial, TrialState.COMPLETE, [1.0, 2.0]),
        lambda storage, trial: storage.set_trial_param(trial, NUL, 0.0, X),
        lambda storage, trial: storage.set_trial_param(trial, LONG, 0.0, X),
        lambda storage, trial: storage.set_trial_user_attr(trial, NUL, 0),
        lambda storage, trial: storage.set_trial_user_attr(trial, "\ud800", 0),
        lambda storage, trial: storage.set_trial_system_attr(trial, LONG, 0),
        lambda storage, trial: storage.set_study_user_attr(1, NUL, 0),
        lambda storage, trial: storage.set_study_system_attr(1, LONG, 0),
        lambda storage, trial: storage.create_new_study([StudyDirection.MINIMIZE], NUL),
        lambda storage, trial: storage.create_new_study([StudyDirection.MINIMIZE], LONG),
        lambda storage, trial: storage.create_new_trial(1, create_trial(value=0.0, user_attrs={NUL: 1})),
        lambda storage, trial: storage.create_new_trial(1, create_trial(value=0.0, intermediate_values={2**31: 1.0})),
    ],
)
def test_what_the_tables_cannot_hold_is_refused(storage, study_id, write):
    trial_id = storage.create_new_trial(study_id)
    with pytest.raises(InvalidWriteError):
        write(storage, trial_id)
    (trial,) = storage.get_all_trials(study_id)
    assert (trial.state, trial.params, trial.user_attrs, trial.intermediate_values) == (TrialState.RUNNING, {}, {}, {})
    assert len(storage.get_all_studies()) == 1


def test_a_param_set_again_stays_as_in_stock_optuna(storage, study_id, stock):
    for each in (storage, stock):
        trial_id = each.create_new_trial(study_id)
        for value in (0.25, 0.75):
            each.set_trial_param(trial_id, "x", value, X)
        assert each.get_trial_param(trial_id, "x") == 0.25


def test_nan_that_another_client_left_is_never_best(storage, study_id, stock):
    for value in (1.0, math.nan, 2.0):
        stock.set_trial_state_values(stock.create_new_trial(study_id), TrialState.COMPLETE, [value])
    assert storage.get_best_trial(study_id).value == 1.0
    most = storage.create_new_study([StudyDirection.MAXIMIZE])
    for value in (1.0, math.nan):
        stock.set_trial_state_values(stock.create_new_trial(most), TrialState.COMPLETE, [value])
    assert storage.get_best_trial(most).value == 1.0


@pytest.mark.slow
def test_stock_optuna_and_ours_number_the_trials_of_one_study_together(storage, study_id, stock, open_one):
    def run(each):
        study = optuna.load_study(study_name="s", storage=each)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=15)

    others = [storage, stock, open_one(cache=False)]
    threads = [threading.Thread(target=run, args=(each,)) for each in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ours = storage.get_all_trials(study_id)
    assert [trial.number for trial in ours] == list(range(45))
    assert all(trial.state == TrialState.COMPLETE for trial in ours)
    assert sorted(stock.get_all_trials(study_id), key=lambda trial: trial.number) == ours


def test_a_reader_sees_what_other_clients_do_meanwhile(storage, study_id, stock, open_one):
    reader = open_one()
    assert reader.get_all_trials(study_id) == []
    first, second = stock.create_new_trial(study_id), storage.create_new_trial(study_id)
    assert [trial.state.name for trial in reader.get_all_trials(study_id, deepcopy=False)] == ["RUNNING", "RUNNING"]
    stock.set_trial_param(first, "x", 0.5, X)
    stock.set_trial_intermediate_value(first, 0, 0.25)
    stock.set_trial_state_values(first, TrialState.COMPLETE, [1.0])
    seen = reader.get_all_trials(study_id, deepcopy=False)
    assert (seen[0].value, seen[0].params, seen[0].intermediate_values) == (1.0, {"x": 0.5}, {0: 0.25})
    storage.set_trial_intermediate_value(second, 7, 0.5)
    assert reader.get_all_trials(study_id, deepcopy=False)[1].intermediate_values == {7: 0.5}
    storage.delete_study(study_id)
    for call in (reader.get_all_trials, reader.get_best_trial, reader.get_n_trials, reader.create_new_trial):
        with pytest.raises(KeyError):
            call(study_id)
    with pytest.raises(KeyError):
        reader.get_trial(first)


def test_deleting_a_study_leaves_nothing_of_it_and_all_of_the_others(storage, study_id, open_one):
    kept = storage.create_new_study([StudyDirection.MAXIMIZE], "kept")
    for study in (study_id, kept):
        storage.set_study_user_attr(study, "key", 1)
        storage.set_study_system_attr(study, "key", 1)
        storage.create_new_trial(study, a_finished_trial())
        held = claimed(storage, study)
        storage.set_trial_param(held.trial_id, "x", 0.5, X)
        storage.set_trial_user_attr(held.trial_id, "key", 1)
        storage.set_trial_system_attr(held.trial_id, "key", 1)
        storage.record_heartbeat(held.trial_id)
    before = storage.get_all_trials(kept)
    storage.delete_study(study_id)
    assert open_one().get_all_trials(kept) == before
    with storage.engine.connect() as conn:
        for table, left in (
            (tables.studies, 1),
            (tables.trials, 2),
            (tables.trial_params, 1),
            (tables.tuner_leases, 1),
            (tables.trial_values, 1),
        ):
            assert conn.scalar(select(func.count()).select_from(table)) == left, table.name


def test_a_report_is_one_statement_and_so_are_the_other_writes(storage, study_id):
    warm = storage.create_new_trial(study_id)
    storage.set_trial_param(warm, "x", 0.5, X)
    storage.set_trial_state_values(warm, TrialState.COMPLETE, [1.0])
    held = claimed(storage, study_id)
    storage.hold(held)
    several = {"attributes": lambda storage, trial: storage.set_trial_user_attrs(trial, {"a": 1, "b": 2})}
    for name, write in list({**several, **WRITES}.items())[:7]:
        with statements(storage) as sent:
            write(storage, held.trial_id)
        assert len(sent) == 1, (name, sent)
    with statements(storage) as sent:
        storage.create_new_trial(study_id)
    assert len(sent) == 4  # BEGIN with the transaction's id, the study's lock, the trial, COMMIT
    with statements(storage) as sent:
        claimed(storage, study_id)
    assert len(sent) == 5  # BEGIN with the transaction's id, the study's lock, how it stands, trial and lease, COMMIT


def test_reading_takes_as_many_statements_for_many_trials_as_for_one(storage, study_id, open_one):
    counts = []
    for _ in range(2):
        for _ in range(10):
            storage.create_new_trial(study_id, a_finished_trial())
        with statements(storage) as sent:
            storage.get_all_trials(study_id, deepcopy=False)
        counts.append(len(sent))
    assert counts == [2, 2]
    with statements(storage) as sent:
        storage.get_all_trials(study_id, deepcopy=False)
    assert len(sent) == 2  # nothing is new, and the study exists
    one = storage.create_new_trial(study_id)
    with statements(storage) as sent:
        storage.get_trial(one)
    assert len(sent) == 3


def test_intermediate_values_are_loaded_once_and_for_all_trials(storage, study_id, open_one):
    expected = {storage.create_new_trial(study_id, a_finished_trial(value)): value for value in (0.0, 1.0, 2.0)}
    reader = open_one()
    found = reader.get_all_trials(study_id, deepcopy=False)
    assert all(isinstance(trial, LazyTrial) and is_bare(trial) for trial in found)
    with statements(reader) as sent:
        for trial in found:
            assert trial.intermediate_values == {0: expected[trial._trial_id], 1: 1 + expected[trial._trial_id]}
            assert trial.last_step == 1
    assert len(sent) == 1
    assert reader.get_all_trials(study_id, deepcopy=False)[0] is found[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "use", [repr, hash, copy.deepcopy, lambda trial: trial == trial, lambda trial: trial.last_step]
)
def test_a_lazy_trial_is_as_good_as_a_loaded_one(storage, study_id, open_one, use):
    storage.create_new_trial(study_id, a_finished_trial())
    (lazy,) = open_one().get_all_trials(study_id, deepcopy=False)
    (whole,) = storage.get_all_trials(study_id)
    assert type(whole) is FrozenTrial
    if use is hash:
        with pytest.raises(TypeError):  # as Optuna's
            hash(whole)
        with pytest.raises(TypeError):
            hash(lazy)
    else:
        assert use(lazy) == use(whole)
    assert whole == lazy
    assert lazy == whole
    assert type(pickle.loads(pickle.dumps(lazy))) is FrozenTrial  # noqa: S301


def test_a_copy_is_the_receivers_to_change(storage, study_id):
    storage.create_new_trial(study_id, create_trial(value=1.0, user_attrs={"list": [1]}, intermediate_values={0: 1.0}))
    (mine,) = storage.get_all_trials(study_id)
    mine.user_attrs["list"].append(2)
    mine.intermediate_values[1] = 2.0
    mine.values[0] = 7.0
    (again,) = storage.get_all_trials(study_id)
    assert (again.user_attrs, again.intermediate_values, again.value) == ({"list": [1]}, {0: 1.0}, 1.0)


def test_threads_share_a_storage(storage, study_id):
    failed = []

    def run():
        try:
            study = optuna.load_study(study_name="s", storage=storage)
            study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=5)
        except Exception as error:  # noqa: BLE001 - the test tells it
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [trial.number for trial in storage.get_all_trials(study_id)] == list(range(20))


def test_every_call_goes_through_retry(open_one, study_id):
    calls = []

    def retry(call):
        calls.append(call)
        return call()

    storage = open_one(retry=retry)
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_intermediate_value(trial_id, 0, 1.0)
    storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    storage.get_all_trials(study_id)
    assert len(calls) == 5  # the intermediate values of the last are read by a call of their own


@pytest.mark.slow
def test_a_lost_connection_is_unreachable_and_a_deadlock_is_tried_again(storage, open_one, study_id):
    first, second = (storage.create_new_trial(study_id) for _ in range(2))
    impatient = Sessions(storage.engine)
    with pytest.raises(UnreachableError, match=r"postgresql://.*server closed|terminat") as caught:
        impatient.statement(lambda conn: conn.execute(text("select pg_terminate_backend(pg_backend_pid())")))
    assert isinstance(caught.value, StorageError)
    tries = []
    both_locked = threading.Barrier(2)

    def lock(trial_ids):
        def work(conn):
            tries.append(trial_ids)
            for trial_id in trial_ids:
                conn.execute(text("select 1 from trials where trial_id = :id for update"), {"id": trial_id})
                if len(tries) <= 2 and trial_id == trial_ids[0]:
                    both_locked.wait(10)

        return work

    threads = [
        threading.Thread(target=storage.sessions.transaction, args=(lock(ids),))
        for ids in ((first, second), (second, first))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(tries) == 3
