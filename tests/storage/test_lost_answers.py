"""Writes whose request or whose answer is lost on the way: each is there once, and the call returns as always."""

from __future__ import annotations

import datetime as dt
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from proxy import Loss, Proxy
from sqlalchemy import Engine, select, text

from storage import BusyError, EmbeddedServer, PostgresStorage, UnreachableError, ensure_schema, open_engine, parse_url
from storage.coordination import claims, control, standings, studies
from storage.coordination.claims import Claim
from storage.coordination.standings import Budget
from storage.database.sessions import Backoff
from storage.database.tables import optuna_metadata, tuner_metadata, tuner_operations
from storage.embedded.postmaster import wait_until
from storage.trials.curves import CurvePoint

OPTUNAS = optuna_metadata.sorted_tables
X = FloatDistribution(0, 1)
BY_HAND = claims.GivenBack(outcome="released", reason="by hand", counts=False)
BUDGET = Budget(trials=100, timeout_s=None, max_failures=100, max_attempts=2)


def at_once(call: Callable[[], Any]) -> Any:
    """Call again, without a pause, a call whose connection was lost."""
    for _ in range(2):
        try:
            return call()
        except UnreachableError as error:
            if isinstance(error, BusyError):
                raise
    return call()


@dataclass(frozen=True, kw_only=True)
class Write:
    """A call that writes. `prepare` makes what it needs and returns the call; `shown` tells its result by content."""

    prepare: Callable[[PostgresStorage], Callable[[], Any]]
    shown: Callable[[PostgresStorage, Any], Any] = lambda storage, result: result


def a_study(storage: PostgresStorage) -> int:
    return studies.create_study(storage.engine, "s", "minimize", {"version": 1}, {}, "value").study_id


def running(storage: PostgresStorage) -> int:
    return storage.create_new_trial(a_study(storage))


def claim(storage: PostgresStorage, study_id: int) -> Claim:
    held = claims.claim(storage.sessions, study_id, BUDGET, claims.Holder(worker="worker"))
    assert isinstance(held, Claim)
    return held


def claimed(storage: PostgresStorage) -> Claim:
    return claim(storage, a_study(storage))


def held(storage: PostgresStorage) -> int:
    mine = claimed(storage)
    storage.hold(mine)
    return mine.trial_id


def waiting(storage: PostgresStorage) -> int:
    return storage.create_new_trial(a_study(storage), create_trial(state=TrialState.WAITING))


def held_waiting(storage: PostgresStorage) -> int:
    trial_id = held(storage)
    storage.set_trial_state_values(trial_id, TrialState.WAITING)
    return trial_id


def with_lost_workers(storage: PostgresStorage) -> int:
    """Make a study of two trials whose leases ran out: one in its first attempt, one in its last."""
    study_id = a_study(storage)
    first, last = claim(storage, study_id), claim(storage, study_id)
    storage.set_trial_intermediate_value(first.trial_id, 0, 0.5)
    with storage.engine.begin() as conn:
        conn.execute(text("UPDATE tuner_leases SET expires_at = now() - interval '1 hour'"))
        conn.execute(text("UPDATE tuner_leases SET attempts = 2 WHERE trial_id = :id"), {"id": last.trial_id})
    return study_id


def to_extend(storage: PostgresStorage) -> int:
    spec = {"version": 1, "budget": {"trials": 30, "timeout_s": None, "max_failures": 10}}
    return studies.create_study(storage.engine, "s", "minimize", spec, {}, "value").study_id


def extend(storage: PostgresStorage, study_id: int) -> Any:
    def more(standing: standings.Standing) -> dict[str, Any]:
        assert standing.budget is not None
        return {**standing.budget, "trials": standing.budget["trials"] + 20}

    return control.extend(storage.sessions, study_id, more).budget


def adopt(storage: PostgresStorage, study_id: int) -> Any:
    spec = {"version": 1, "budget": {"trials": 30, "timeout_s": None, "max_failures": 10}}
    return control.adopt(storage.sessions, study_id, lambda _: spec, {"seed": 0}, "loss").budget


def in_study(call: Callable[[PostgresStorage, int], Any]) -> Write:
    return Write(prepare=lambda storage: _bound(call, storage, a_study(storage)))


def in_trial(make: Callable[[PostgresStorage], int], call: Callable[[PostgresStorage, int], Any]) -> Write:
    return Write(prepare=lambda storage: _bound(call, storage, make(storage)))


def of_claim(call: Callable[[PostgresStorage, Claim], Any]) -> Write:
    return Write(prepare=lambda storage: _bound(call, storage, claimed(storage)))


def creating(make: Callable[[PostgresStorage], int], call: Callable[[PostgresStorage, int], int]) -> Write:
    return Write(
        prepare=lambda storage: _bound(call, storage, make(storage)),
        shown=lambda storage, trial_id: storage.get_trial_number_from_id(trial_id),
    )


def claiming(make: Callable[[PostgresStorage], int]) -> Write:
    return Write(
        prepare=lambda storage: _bound(claim, storage, make(storage)),
        shown=lambda storage, mine: (mine.number, mine.attempt, claims.renew(storage.sessions, mine)),
    )


def _bound(call: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: call(*arguments)


def with_waiting(storage: PostgresStorage) -> int:
    study_id = a_study(storage)
    storage.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
    return study_id


def to_delete(storage: PostgresStorage) -> int:
    study_id = a_study(storage)
    storage.create_new_trial(study_id, TEMPLATE)
    return study_id


TEMPLATE = create_trial(
    params={"x": 0.5, "y": "a"},
    distributions={"x": X, "y": CategoricalDistribution(["a", "b"])},
    value=1.0,
    user_attrs={"user": 1},
    system_attrs={"system": 1},
    intermediate_values={0: 0.5, 1: 0.25},
)

WRITES = {
    "create_new_study": Write(
        prepare=lambda storage: lambda: storage.create_new_study([StudyDirection.MINIMIZE] * 2, "new"),
        shown=lambda storage, study_id: storage.get_study_name_from_id(study_id),
    ),
    "delete_study": in_trial(to_delete, lambda storage, study: storage.delete_study(study)),
    "set_study_user_attr": in_study(lambda storage, study: storage.set_study_user_attr(study, "key", 1)),
    "set_study_system_attr": in_study(lambda storage, study: storage.set_study_system_attr(study, "key", 1)),
    "create_new_trial": creating(a_study, lambda storage, study: storage.create_new_trial(study)),
    "create_new_trial, template": creating(a_study, lambda storage, study: storage.create_new_trial(study, TEMPLATE)),
    "extend": in_trial(to_extend, extend),
    "adopt": Write(
        prepare=lambda storage: _bound(adopt, storage, storage.create_new_study([StudyDirection.MINIMIZE], "s"))
    ),
    "enqueue": in_study(lambda storage, study: control.enqueue(storage.sessions, study, {"x": 0.5})),
    "cancel": in_trial(with_waiting, lambda storage, study: control.cancel(storage.sessions, study, 0)),
    "record_heartbeat": in_trial(running, lambda storage, trial: storage.record_heartbeat(trial)),
    "start": in_trial(waiting, lambda storage, trial: storage.set_trial_state_values(trial, TrialState.RUNNING)),
    "start, held": in_trial(
        held_waiting, lambda storage, trial: storage.set_trial_state_values(trial, TrialState.RUNNING)
    ),
    "claim, new": claiming(a_study),
    "claim, waiting": claiming(with_waiting),
    "claim, expired": claiming(with_lost_workers),
    "renew": of_claim(lambda storage, mine: claims.renew(storage.sessions, mine)),
    "release": of_claim(lambda storage, mine: claims.release(storage.sessions, mine, BY_HAND, 2)),
    "release, counted": of_claim(lambda storage, mine: claims.release(storage.sessions, mine, claims.LOST, 2)),
    "release, last": of_claim(lambda storage, mine: claims.release(storage.sessions, mine, claims.LOST, 1)),
}
IN_TRIAL: dict[str, Callable[[PostgresStorage, int], Any]] = {
    "report, epoch": lambda storage, trial: storage.report(
        trial, CurvePoint(step=1, value=0.5, train_loss=0.25, metrics={"accuracy": 0.5})
    ),
    "set_trial_param": lambda storage, trial: storage.set_trial_param(trial, "x", 0.5, X),
    "complete": lambda storage, trial: storage.set_trial_state_values(trial, TrialState.COMPLETE, [1.0]),
    "fail": lambda storage, trial: storage.set_trial_state_values(trial, TrialState.FAIL),
    "requeue": lambda storage, trial: storage.set_trial_state_values(trial, TrialState.WAITING),
    "report": lambda storage, trial: storage.set_trial_intermediate_value(trial, 1, 0.5),
    "set_trial_user_attr": lambda storage, trial: storage.set_trial_user_attr(trial, "key", 1),
    "set_trial_user_attrs": lambda storage, trial: storage.set_trial_user_attrs(trial, {"a": 1, "b": 2}),
    "set_trial_system_attr": lambda storage, trial: storage.set_trial_system_attr(trial, "key", 1),
}
WRITES |= {name: in_trial(running, call) for name, call in IN_TRIAL.items()}
WRITES |= {f"{name}, held": in_trial(held, call) for name, call in IN_TRIAL.items()}


@pytest.fixture
def direct(database: str) -> Iterator[Engine]:
    engine = open_engine(database)
    yield engine
    engine.dispose()


@pytest.fixture
def proxy(database: str) -> Iterator[Proxy]:
    proxy = Proxy(database)
    yield proxy
    proxy.close()


def dump(engine: Engine) -> dict[str, list[str]]:
    """Return all rows of all tables, by content: studies by name, trials by number, times and tokens as being there."""
    named: dict[tuple[str, int], Any] = {}
    found: dict[str, list[str]] = {}
    with engine.connect() as conn:
        for row in conn.execute(text("SELECT study_id, study_name FROM studies")):
            named["study_id", row.study_id] = row.study_name
        for row in conn.execute(text("SELECT trial_id, study_id, number FROM trials")):
            named["trial_id", row.trial_id] = (named["study_id", row.study_id], row.number)
        for table in (*OPTUNAS, *tuner_metadata.sorted_tables):
            rows = [row._asdict() for row in conn.execute(select(table))]
            found[table.name] = sorted(str(_by_content(row, named, table.primary_key.columns.keys())) for row in rows)
    return found


def _by_content(row: dict[str, Any], named: dict[tuple[str, int], Any], keys: list[str]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, value in row.items():
        if name in ("study_id", "trial_id"):
            shown[name] = named[name, value]
        elif name not in keys:
            shown[name] = type(value) if isinstance(value, dt.datetime | uuid.UUID) else value
    return shown


@dataclass(frozen=True, kw_only=True)
class Run:
    result: Any
    rows: dict[str, list[str]]
    queries: list[str]


def run(
    write: Write,
    proxy: Proxy,
    direct: Engine,
    cut: tuple[int | str, Loss] | None = None,
    retry: Callable[[Callable[[], Any]], Any] = at_once,
) -> Run:
    """Make the write by way of the proxy in an empty database, with the connection cut as asked."""
    with direct.begin() as conn:
        for table in (tuner_operations, *reversed(OPTUNAS)):  # the others of ours go with the studies
            conn.execute(table.delete())
    storage = PostgresStorage(proxy.url, retry=retry)
    try:
        storage.get_all_studies()  # asks what the engine asks on its first connection
        call = write.prepare(storage)
        proxy.forget()
        if cut is not None:
            proxy.cut(*cut)
        result = call()
        queries = list(proxy.queries)
        assert proxy.has_cut
        return Run(result=write.shown(storage, result), rows=dump(direct), queries=queries)
    finally:
        storage.engine.dispose()


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_a_write_is_done_once_whichever_of_its_requests_or_answers_is_lost(write, proxy, direct):
    undisturbed = run(write, proxy, direct)
    for loss, (index, query) in product((Loss.REQUEST, Loss.ANSWER), enumerate(undisturbed.queries)):
        disturbed = run(write, proxy, direct, (index, loss))
        assert disturbed.result == undisturbed.result, (loss, query)
        assert disturbed.rows == undisturbed.rows, (loss, query)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [Loss.NOTICE, Loss.BOTH])
@pytest.mark.parametrize("name", ["create_new_study", "create_new_trial", "claim, new", "complete", "release"])
def test_a_commit_is_settled_though_the_server_takes_the_lost_client_for_connected(name, loss, proxy, direct):
    undisturbed = run(WRITES[name], proxy, direct)
    disturbed = run(WRITES[name], proxy, direct, ("COMMIT", loss))
    assert (disturbed.result, disturbed.rows) == (undisturbed.result, undisturbed.rows)
    assert "pg_terminate_backend" in str(disturbed.queries)


def test_a_lost_claim_that_nobody_repeats_gives_its_number_back(proxy, direct):
    """Without a retry the caller is told; what was not committed leaves no trial and no gap."""
    storage = PostgresStorage(proxy.url, retry=lambda call: call())
    try:
        study_id = a_study(storage)
        claim(storage, study_id)
        proxy.cut("COMMIT", Loss.REQUEST)
        with pytest.raises(UnreachableError, match=r"lost the connection to postgresql://"):
            claim(storage, study_id)
        assert claim(storage, study_id).number == 1
    finally:
        storage.engine.dispose()


@pytest.fixture(scope="module")
def crashing(killable_server: EmbeddedServer) -> Iterator[tuple[EmbeddedServer, Engine, Proxy]]:
    """A server with all tables, for tests that crash it; an engine that reaches it, and a proxy before it."""
    killable_server.start()
    proxy, engine = Proxy(killable_server.url()), open_engine(killable_server.url())
    ensure_schema(engine)
    yield killable_server, engine, proxy
    proxy.close()
    engine.dispose()


def after_a_crash(server: EmbeddedServer, engine: Engine, others: int) -> Callable[[Callable[[], Any]], Any]:
    """Return a retry that crashes the server when a call has lost its connection, and lets others write before it."""
    crashes: list[int] = []

    def retry(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except UnreachableError:
            if crashes:
                raise
        crashes.append(1)
        os.kill(server.status().pid, signal.SIGQUIT)  # what reached no disk is gone
        assert wait_until(lambda: not server.status().running, 30)
        server.start()
        engine.dispose()
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            for _ in range(others):
                conn.execute(text("SELECT pg_current_xact_id()"))
        return at_once(call)

    return retry


@pytest.mark.slow
@pytest.mark.parametrize("others", [0, 50], ids=["no ids reused", "ids reused"])
@pytest.mark.parametrize("name", [name for name in WRITES if "held" not in name and "attr" not in name])
def test_a_write_is_done_once_though_the_server_crashes_at_it(name, others, crashing):
    server, engine, proxy = crashing
    undisturbed = run(WRITES[name], proxy, engine)
    losses = [(index, Loss.REQUEST) for index in range(len(undisturbed.queries))]
    if undisturbed.queries[-1] == "COMMIT":
        losses.append((losses[-1][0], Loss.ANSWER))
    for cut in losses if others else losses[-2:]:
        disturbed = run(WRITES[name], proxy, engine, cut, after_a_crash(server, engine, others))
        assert (disturbed.result, disturbed.rows) == (undisturbed.result, undisturbed.rows), cut


@pytest.mark.slow
def test_an_immediate_restart_of_the_server_loses_and_repeats_nothing(killable):
    """A thread creates, reports to and completes trials while the server is killed under it and started again."""
    url = killable.url()
    engine = open_engine(url)
    ensure_schema(engine)
    engine.dispose()
    storage = PostgresStorage(url)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE])
    done: list[int] = []
    warm, stop = threading.Event(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            trial_id = storage.create_new_trial(study_id)
            storage.set_trial_intermediate_value(trial_id, 0, len(done))
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [len(done)])
            done.append(trial_id)
            if len(done) >= 20:
                warm.set()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert warm.wait(30)
        os.kill(killable.status().pid, signal.SIGQUIT)  # what pg_ctl sends for an immediate shutdown
        assert wait_until(lambda: not killable.status().running, 30)
        before = len(done)
        killable.start()
        assert wait_until(lambda: len(done) > before + 20, 30)
    finally:
        stop.set()
        worker.join(30)
    found = storage.get_all_trials(study_id)
    storage.engine.dispose()
    assert [trial.number for trial in found] == list(range(len(done)))
    assert [trial._trial_id for trial in found] == done
    assert [(trial.value, trial.intermediate_values) for trial in found] == [(n, {0: n}) for n in range(len(done))]


@pytest.mark.slow
def test_a_server_that_accepts_and_says_nothing_is_unreachable_in_time(proxy):
    proxy.is_hole = True
    url = proxy.url.set(password="s3cret").update_query_dict({"connect_timeout": "2"})
    storage = PostgresStorage(url, retry=Backoff(limit_s=0))
    start = time.monotonic()
    with pytest.raises(UnreachableError, match=r"cannot reach .*tuner:\*\*\*@127.0.0.1.*timeout expired") as caught:
        storage.get_all_studies()
    assert time.monotonic() - start < 4
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("write", [claim, PostgresStorage.create_new_trial], ids=["claim", "create_new_trial"])
def test_a_client_that_froze_with_the_study_locked_is_told_of(write, database, direct):
    impatient = parse_url(database).update_query_dict({"options": "-c lock_timeout=200ms"})
    storage = PostgresStorage(impatient)
    try:
        study_id = a_study(storage)
        with direct.begin() as frozen:
            frozen.execute(text("SELECT 1 FROM studies FOR UPDATE"))
            with pytest.raises(BusyError, match=r"another session keeps .* locked.*pg_stat_activity shows it"):
                write(storage, study_id)
        write(storage, study_id)
        assert [trial.number for trial in storage.get_all_trials(study_id)] == [0]
    finally:
        storage.engine.dispose()
