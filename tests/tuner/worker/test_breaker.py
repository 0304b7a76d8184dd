"""A slot is held back once its device, and not its trials, seems to be what fails."""

from tuner.worker.breaker import FAST_S, LONGEST_PAUSE_S, Breaker


def test_it_opens_after_three_fast_failures_and_pauses_longer_each_time():
    breaker = Breaker()
    assert [breaker.failed(trial, 1.0) for trial in (0, 1, 2, 2)] == [0, 0, 60, 120]
    pauses = [breaker.failed(3, 1.0) for _ in range(5)]
    assert pauses == [240, 480, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


def test_one_trial_that_fails_each_time_does_not_open_it():
    breaker = Breaker()
    assert [breaker.failed(7, 1.0) for _ in range(5)] == [0] * 5
    assert breaker.failed(8, 1.0) == 60


def test_a_slot_that_does_not_come_back_opens_it():
    breaker = Breaker()
    assert [breaker.failed(None, 1.0) for _ in range(3)] == [0, 0, 60]


def test_a_trial_that_ends_closes_it():
    breaker = Breaker()
    for trial in range(3):
        breaker.failed(trial, 1.0)
    breaker.succeeded()
    assert [breaker.failed(trial, 1.0) for trial in range(3)] == [0, 0, 60]


def test_a_failure_long_after_the_start_is_no_sign():
    breaker = Breaker()
    assert [breaker.failed(trial, FAST_S + 1) for trial in range(5)] == [0] * 5
