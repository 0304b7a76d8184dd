"""Checkpoints in the database: whole or not there, written by the holder alone, gone with their trial."""

from __future__ import annotations

import os
import threading
import uuid
from dataclasses import replace

import pytest
from optuna.trial import TrialState
from proxy import Loss, Proxy
from sqlalchemy import text

from storage import InvalidWriteError, UnreachableError, open_engine
from storage.coordination import checkpoints, claims, control, studies
from storage.coordination.checkpoints import MAX_BYTES, PART_BYTES
from storage.coordination.claims import Holder
from storage.coordination.standings import Budget
from storage.database.schema import ensure_schema
from storage.database.sessions import Sessions

BUDGET = Budget(trials=10, timeout_s=None, max_failures=3, max_attempts=2)
BY_HAND = claims.GivenBack(outcome="released", reason="by hand", counts=False)
NOW_MS = 2000
"""More than any statement here takes, and less than the time that one waits for a lock."""


@pytest.fixture
def sessions(database):
    engine = open_engine(database)
    yield Sessions(engine)
    engine.dispose()


@pytest.fixture
def study_id(database):
    engine = open_engine(database)
    yield studies.create_study(engine, "s", "maximize", {"version": 1}, {}, "value").study_id
    engine.dispose()


@pytest.fixture
def proxied(database):
    """A proxy before the database, and sessions by way of it."""
    proxy = Proxy(database)
    engine = open_engine(proxy.url)
    yield proxy, Sessions(engine)
    engine.dispose()
    proxy.close()


def claim(sessions, study_id):
    held = claims.claim(sessions, study_id, BUDGET, Holder(worker="test"))
    assert isinstance(held, claims.Claim)
    return held


def expire(sessions, held):
    late = text("update tuner_leases set expires_at = now() - interval '1 hour' where trial_id = :id")
    sessions.statement(lambda conn: conn.execute(late, {"id": held.trial_id}))


def rows(sessions):
    return sessions.statement(lambda conn: conn.scalar(text("select count(*) from tuner_checkpoints")))


class GivesUpAfter(threading.Event):
    """An event that is set once it was looked at so often."""

    def __init__(self, looks):
        super().__init__()
        self.left = looks

    def is_set(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES - 1])
def test_a_checkpoint_comes_back_as_it_was_saved(sessions, study_id, size):
    held, data = claim(sessions, study_id), os.urandom(size)
    assert checkpoints.save(sessions, held, data)
    assert checkpoints.load(sessions, held.trial_id) == data
    assert checkpoints.load_head(sessions, held.trial_id, 100) == data[:100]


def test_a_trial_without_a_checkpoint_has_none(sessions, study_id):
    trial_id = claim(sessions, study_id).trial_id
    assert checkpoints.load(sessions, trial_id) is None
    assert checkpoints.load_head(sessions, trial_id, 100) is None


def test_the_last_of_many_is_the_only_one_kept(sessions, study_id):
    first, second = claim(sessions, study_id), claim(sessions, study_id)
    for n in range(5):
        assert checkpoints.save(sessions, first, b"%d" % n * (PART_BYTES + n))
        assert checkpoints.save(sessions, second, b"second %d" % n)
    assert checkpoints.load(sessions, first.trial_id) == b"4" * (PART_BYTES + 4)
    assert checkpoints.load(sessions, second.trial_id) == b"second 4"
    assert rows(sessions) == 3


def test_what_is_too_large_is_refused_and_the_one_before_stays(sessions, study_id):
    held = claim(sessions, study_id)
    checkpoints.save(sessions, held, b"small")
    with pytest.raises(InvalidWriteError, match="may have 64 MB, got 65 MB"):
        checkpoints.save(sessions, held, bytes(MAX_BYTES + 2**20))
    assert checkpoints.load(sessions, held.trial_id) == b"small"


def test_the_next_holder_reads_it_and_the_one_before_cannot_write_any_more(sessions, study_id):
    lost = claim(sessions, study_id)
    checkpoints.save(sessions, lost, b"of the first attempt")
    expire(sessions, lost)
    held = claim(sessions, study_id)
    assert held.trial_id == lost.trial_id
    assert checkpoints.load(sessions, held.trial_id) == b"of the first attempt"
    assert not checkpoints.save(sessions, lost, bytes(2 * PART_BYTES))
    assert checkpoints.load(sessions, held.trial_id) == b"of the first attempt"
    assert checkpoints.save(sessions, held, b"of the second")
    assert checkpoints.load(sessions, held.trial_id) == b"of the second"
    assert rows(sessions) == 1


def test_a_trial_that_was_given_back_keeps_it(sessions, study_id):
    held = claim(sessions, study_id)
    checkpoints.save(sessions, held, b"for the next one")
    assert claims.release(sessions, held, BY_HAND, 2)
    assert not checkpoints.save(sessions, held, b"too late")
    assert checkpoints.load(sessions, held.trial_id) == b"for the next one"


@pytest.mark.slow
@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
def test_it_goes_with_the_end_of_its_trial_and_cannot_be_written_after(storage, sessions, study_id, state):
    held, other = claim(sessions, study_id), claim(sessions, study_id)
    storage.hold(held)
    checkpoints.save(sessions, held, bytes(2 * PART_BYTES))
    checkpoints.save(sessions, other, b"of another trial")
    storage.set_trial_state_values(held.trial_id, state, [1.0] if state == TrialState.COMPLETE else None)
    assert not checkpoints.save(sessions, held, b"late")
    assert checkpoints.load(sessions, held.trial_id) is None
    assert rows(sessions) == 1


def test_it_goes_when_its_trial_is_quarantined(sessions, study_id):
    for _ in range(BUDGET.max_attempts):
        held = claim(sessions, study_id)
        checkpoints.save(sessions, held, b"of an attempt that dies")
        expire(sessions, held)
    assert claim(sessions, study_id).number == 1
    assert rows(sessions) == 0


def test_it_goes_with_its_study(sessions, study_id):
    checkpoints.save(sessions, claim(sessions, study_id), bytes(2 * PART_BYTES))
    control.delete_study(sessions, study_id, force=True)
    assert rows(sessions) == 0


def test_given_up_on_the_way_it_leaves_the_one_before(sessions, study_id):
    held = claim(sessions, study_id)
    checkpoints.save(sessions, held, b"before")
    assert not checkpoints.save(sessions, held, bytes(3 * PART_BYTES), GivesUpAfter(2))
    assert rows(sessions) == 3
    assert checkpoints.load(sessions, held.trial_id) == b"before"
    assert checkpoints.load_head(sessions, held.trial_id, 3) == b"bef"
    assert checkpoints.save(sessions, held, b"after")
    assert checkpoints.load(sessions, held.trial_id) == b"after"
    assert rows(sessions) == 1


@pytest.mark.slow
@pytest.mark.parametrize("request_", [0, 1, 2, 3])
@pytest.mark.parametrize("loss", Loss)
def test_a_connection_lost_on_the_way_leaves_the_one_or_the_other(sessions, study_id, proxied, request_, loss):
    proxy, far = proxied
    held = claim(sessions, study_id)
    before, after = b"before" * 10, os.urandom(2 * PART_BYTES + 1)
    checkpoints.save(far, held, before)
    proxy.cut(request_, loss)
    with pytest.raises(UnreachableError):
        checkpoints.save(far, held, after)
    assert proxy.has_cut
    is_done = request_ == 3 and loss in (Loss.ANSWER, Loss.BOTH)
    assert checkpoints.load(sessions, held.trial_id) == (after if is_done else before)
    assert checkpoints.save(far, held, b"the next")
    assert checkpoints.load(sessions, held.trial_id) == b"the next"
    assert rows(sessions) == 1


def test_a_client_that_vanishes_on_the_way_keeps_nobody_waiting(sessions, study_id, proxied):
    proxy, far = proxied
    held = claim(sessions, study_id)
    proxy.cut(2, Loss.NOTICE)  # the server goes on taking it for connected
    with pytest.raises(UnreachableError):
        checkpoints.save(far, held, bytes(4 * PART_BYTES))

    def release(conn):
        conn.execute(text(f"set local lock_timeout = {NOW_MS}"))
        return claims._give_back(conn, claims._holds(held), BY_HAND, 2)

    assert sessions.transaction(release) == 1
    again = claim(sessions, study_id)
    assert checkpoints.save(sessions, again, b"of the next")
    assert rows(sessions) == 1


@pytest.mark.slow
def test_a_server_that_logs_each_statement_logs_none_of_a_checkpoint(killable):
    engine = open_engine(killable.url())
    ensure_schema(engine)
    sessions = Sessions(engine)
    held = claim(sessions, studies.create_study(engine, "s", "maximize", {"version": 1}, {}, "value").study_id)
    admin = open_engine(killable.admin_url())
    Sessions(admin).statement(lambda conn: conn.execute(text("ALTER ROLE tuner SET log_min_duration_statement = 0")))
    admin.dispose()
    engine.dispose()  # its next session has the setting
    log = killable.password_file.with_name("postgresql.log")
    before = log.stat().st_size
    data = b"telltale" * (PART_BYTES // 8) + b"end"
    assert checkpoints.save(sessions, held, data)
    assert not checkpoints.save(sessions, replace(held, token=uuid.uuid4()), data)
    assert not checkpoints.save(sessions, replace(held, trial_id=2**31 - 1), data)  # an error, which is logged
    assert checkpoints.load(sessions, held.trial_id) == data
    engine.dispose()
    written = log.read_bytes()[before:]
    assert written.count(b"COPY tuner_checkpoints") >= 4
    assert b"telltale" not in written
    assert b"telltale".hex().encode() not in written
    assert len(written) < 100_000


def test_a_checkpoint_of_a_deleted_study_is_not_written(sessions, study_id):
    held = claim(sessions, study_id)
    control.delete_study(sessions, study_id, force=True)
    assert not checkpoints.save(sessions, held, b"late")
    assert not checkpoints.save(sessions, replace(held, trial_id=2**31 - 1), b"of no trial")
