"""What pruning saved, and what the pruned trials could have become."""

import math

import pytest

from tuner.report.audit import Reports, audit


def a_trial(number, state, reports, value=None, **others):
    by_step = dict(enumerate(reports, 1))
    return Reports(number=number, state=state, value=value, by_step=by_step, **{"device_s": 10.0, **others})


# Of five that were at 0.5 after the first of four epochs, gains of 0.1 to 0.5.
COMPLETE = [a_trial(n, "COMPLETE", [0.5, 0.5, 0.5, 0.6 + n / 10], 0.6 + n / 10) for n in range(5)]


def test_what_was_saved_is_what_the_pruned_lacked_of_the_complete_ones_at_their_own_pace():
    its = audit([*COMPLETE, a_trial(5, "PRUNED", [0.1]), a_trial(6, "PRUNED", [0.1, 0.2])], "maximize", None)
    assert (its.pruned, its.full_epochs, its.epochs_run, its.epochs_saved) == (2, 4, 3, 5)
    assert its.device_s_saved == pytest.approx(10 * 3 + 5 * 2)


def test_a_trial_with_epochs_of_its_own_lacks_those():
    its = audit([*COMPLETE, a_trial(5, "PRUNED", [0.1], epochs=9), a_trial(6, "PRUNED", [])], "maximize", None)
    assert (its.pruned, its.epochs_saved) == (2, 8)
    assert [trial.number for trial in its.trials] == [5]


@pytest.mark.parametrize(("direction", "sign"), [("maximize", 1), ("minimize", -1)])
def test_the_complete_trials_gains_tell_what_a_pruned_one_could_have_become(direction, sign):
    complete = [
        a_trial(one.number, "COMPLETE", [sign * value for value in one.by_step.values()], sign * one.value)
        for one in COMPLETE
    ]
    pruned = [a_trial(5, "PRUNED", [sign * 0.75]), a_trial(6, "PRUNED", [sign * 0.2, sign * 0.1])]
    its = audit([*complete, *pruned], direction, None)
    near, far = its.trials
    assert its.best == pytest.approx(sign * 1.0)
    # 0.75 is above 1.0 with gains of 0.3, 0.4 and 0.5, of five
    assert near.extrapolated == pytest.approx(sign * 1.05)
    assert (near.share, near.rank, near.rivals) == (0.6, 1, 7)
    assert (far.value, far.share, far.rank, far.rivals) == (sign * 0.2, 0.0, 6, 6)
    assert (its.judged, its.might_have_won, its.expected_winners) == (2, 1, 0.6)


def test_too_few_complete_trials_tell_nothing_and_reports_that_are_no_numbers_neither():
    its = audit([*COMPLETE[:4], a_trial(5, "PRUNED", [0.9, math.nan]), a_trial(6, "PRUNED", [math.nan])], "maximize", 4)
    assert [(one.number, one.step, one.value, one.extrapolated) for one in its.trials] == [(5, 1, 0.9, None)]
    assert (its.judged, its.might_have_won, its.epochs_saved) == (0, 0, 5)


def test_without_a_complete_trial_the_studys_epochs_are_the_whole_and_without_a_pruned_one_there_is_no_audit():
    its = audit([a_trial(0, "PRUNED", [0.1]), a_trial(1, "FAIL", [])], "minimize", 20)
    assert (its.best, its.full_epochs, its.epochs_saved) == (None, 20, 19)
    assert audit(COMPLETE, "maximize", 20) is None
