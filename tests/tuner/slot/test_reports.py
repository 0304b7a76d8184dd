"""Reports are written in order, by a thread that outlasts the database's absence."""

import threading
import time

import pytest
from command import wait_for

from storage.database.errors import LeaseLostError, UnreachableError
from storage.trials.curves import CurvePoint
from tuner.slot.reports import PATIENCE_S, Reports


def at(step, value):
    return CurvePoint(step=step, value=value)


class Database:
    """Takes reports while it is there."""

    def __init__(self):
        self.is_there = threading.Event()
        self.taken: list[CurvePoint] = []
        self.refusal: Exception | None = None

    def write(self, point):
        if self.refusal is not None:
            raise self.refusal
        if not self.is_there.is_set():
            raise UnreachableError("away")
        self.taken.append(point)


@pytest.fixture
def database():
    database = Database()
    database.is_there.set()
    return database


def test_a_report_has_been_written_when_put_returns(database):
    written = []
    with Reports(database.write, written.append) as reports:
        for step in range(3):
            reports.put(at(step, step / 2))
            assert database.taken[-1] == written[-1] == at(step, step / 2)
            assert not reports.is_behind


@pytest.mark.slow
def test_training_goes_on_while_the_database_is_away_and_nothing_is_lost(database):
    database.is_there.clear()
    with Reports(database.write, lambda *_: None) as reports:
        start = time.monotonic()
        for step in range(100):
            reports.put(at(step, 0.5))
        assert time.monotonic() - start < PATIENCE_S + 1  # the first waits, the others do not
        assert reports.is_behind
        assert reports.flush(0.1, threading.Event()) == [at(step, 0.5) for step in range(100)]
        database.is_there.set()
        wait_for(lambda: not reports.is_behind, "they are written")
        assert database.taken == [at(step, 0.5) for step in range(100)]
        assert reports.flush(5, threading.Event()) == []
        reports.put(at(100, 1.0))
        assert database.taken[-1] == at(100, 1.0)


@pytest.mark.slow
def test_the_wait_at_the_end_is_cut_short_by_the_order_to_stop(database):
    database.is_there.clear()
    stop = threading.Event()
    stop.set()
    with Reports(database.write, lambda *_: None) as reports:
        reports.put(at(0, 0.5))
        start = time.monotonic()
        assert reports.flush(600, stop) == [at(0, 0.5)]
        assert time.monotonic() - start < 10


def test_a_lost_lease_ends_the_attempt_at_the_next_look(database):
    database.is_there.clear()
    with Reports(database.write, lambda *_: None) as reports:
        reports.put(at(0, 0.5))
        database.refusal = LeaseLostError("somebody else's")

        def is_lost():
            try:
                reports.check()
            except LeaseLostError:
                return True
            return False

        wait_for(is_lost, "the writer meets it")
        with pytest.raises(LeaseLostError):
            reports.put(at(1, 0.5))
        with pytest.raises(LeaseLostError):
            reports.flush(600, threading.Event())
