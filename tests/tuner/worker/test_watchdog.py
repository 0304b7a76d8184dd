"""Which attempts hang, by what their slots tell and when."""

import math

import pytest

from tuner.worker.watchdog import DUMP_S, LEAST_S, TIMES, UNKNOWN_S, Watchdog


class Slots:
    """A watchdog with a clock, looked at four times a second as a worker does."""

    def __init__(self, trial_timeout_s=None, is_on=None):
        self.watchdog = Watchdog(trial_timeout_s, is_on)
        self.now = 1000.0

    def __getattr__(self, name):
        return lambda slot=0, *arguments, **options: getattr(self.watchdog, name)(slot, self.now, *arguments, **options)

    def batch(self, slot=0):
        self.watchdog.sign(slot, self.now, is_batch=True)

    def hangs_after(self, at_most_s=10_000.0):
        """Let time go by until an attempt is found to hang; after how long and for what, None if none is."""
        start = self.now
        while self.now - start < at_most_s:
            found = self.watchdog.look(self.now)
            if found:
                return self.now - start, found
            self.now += 0.25
        return None


def test_an_attempt_hangs_after_ten_times_the_slowest_epoch_but_not_within_a_minute():
    slots = Slots()
    slots.start()
    slots.batch()
    slots.report(0, 2.0)
    after_s, found = slots.hangs_after()
    assert (after_s, list(found)) == (LEAST_S, [0])
    assert found[0].reason == "no batch and no report for 1:00, and the slowest epoch took 2.0 s"
    assert not found[0].is_final
    slots.start()
    slots.report(0, 20.0)
    slots.report(0, 3.0)
    assert slots.hangs_after()[0] == TIMES * 20.0
    # What the study's other workers have told counts as well.
    slots.start()
    slots.watchdog.slowest_s = 30.0
    assert slots.hangs_after()[0] == TIMES * 30.0


def test_each_batch_and_each_report_begins_the_wait_anew():
    slots = Slots()
    slots.start()
    slots.report(0, 1.0)
    for tell in (slots.batch, slots.batch, lambda: slots.report(0, 1.0), slots.sign):
        assert slots.hangs_after(LEAST_S - 1) is None
        tell()
    assert slots.hangs_after()[0] == LEAST_S


def test_before_the_first_epoch_has_ended_only_batches_tell_and_longer():
    slots = Slots()
    slots.start()
    assert slots.hangs_after() is None  # it may be reading its data, or have a loop of its own
    slots.batch()
    after_s, found = slots.hangs_after()
    assert after_s == UNKNOWN_S
    assert found[0].reason == "no batch and no report for 30:00, and no epoch has ended yet"


@pytest.mark.parametrize(("is_on", "after_s"), [(None, None), (False, None), (True, 300.0)])
def test_who_tells_of_no_batch_is_watched_only_if_asked_for(is_on, after_s):
    slots = Slots(is_on=is_on)
    slots.start()
    for _ in range(3):
        slots.now += 30
        slots.report(0, None)
    found = slots.hangs_after()
    assert after_s == (None if found is None else found[0])
    if is_on is False:
        slots.batch()
        assert slots.hangs_after() is None


def test_a_trial_may_not_take_longer_than_its_timeout_however_alive():
    slots = Slots(trial_timeout_s=90.0, is_on=False)
    slots.start()
    for _ in range(8):
        assert slots.hangs_after(10) is None
        slots.batch()
    after_s, found = slots.hangs_after()
    assert (after_s, found[0].is_final) == (10.0, True)
    assert found[0].reason == "it took longer than --trial-timeout, 90 s"
    back = found[0].given_back
    assert (back.outcome, back.failure, back.counts, back.is_final) == ("hung", "hung", True, True)


def test_a_slot_has_a_moment_to_tell_where_it_hangs_and_is_found_once():
    slots = Slots(trial_timeout_s=5.0)
    slots.start(0)
    slots.start(1)
    assert set(slots.hangs_after()[1]) == {0, 1}
    assert slots.watchdog.to_kill(slots.now) == []
    assert slots.watchdog.end(1) is not None  # it ended after all
    slots.now += DUMP_S
    assert slots.watchdog.look(slots.now) == {}
    assert slots.watchdog.to_kill(slots.now) == [0]
    assert slots.watchdog.end(0).is_final
    assert slots.watchdog.end(0) is None
    assert slots.watchdog.to_kill(math.inf) == []


def test_a_worker_that_stood_still_accuses_nobody():
    slots = Slots()
    slots.start()
    slots.batch()
    slots.report(0, 1.0)
    assert slots.hangs_after(10) is None
    slots.now += 600  # frozen, with what its slots told still unread
    assert slots.hangs_after()[0] == LEAST_S
