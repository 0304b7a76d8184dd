import math

import pytest

from storage.coordination.records import TrialRecord
from tuner.cli.trials_view import best_first, lines


def a_trial(number, state="COMPLETE", value=None, **fields):
    return TrialRecord(
        trial_id=number, number=number, state=state, value=value, started_at=None, ended_at=None, **fields
    )


TRIALS = [
    a_trial(0, "FAIL", params={"lr": 0.5}, user_attrs={"failure_message": "KeyError: 'x' (mine.py, line 3)"}),
    a_trial(
        1, value=0.5, params={"lr": 0.123456789, "units": 64}, last_step=9, user_attrs={"epoch": 4, "seconds": 1.5}
    ),
    a_trial(2, "PRUNED", 0.9, params={"lr": 1e-05, "units": 8}, last_step=2),
    a_trial(3, "WAITING", params={"lr": 0.2}),
    a_trial(4, value=0.7, params={"lr": 0.1, "units": 8}, last_step=3),
    a_trial(5, "RUNNING", params={"lr": 0.1}, last_step=1),
    a_trial(6, value=math.nan),
    a_trial(7, "FAIL", user_attrs={"failure_message": "out of memory"}),
]


@pytest.mark.parametrize(
    ("direction", "numbers"), [("minimize", [1, 4, 6, 2, 5, 3, 0, 7]), ("maximize", [4, 1, 6, 2, 5, 3, 0, 7])]
)
def test_sorted_by_value_the_best_complete_trial_is_first_and_those_without_a_value_last(direction, numbers):
    assert [trial.number for trial in best_first(TRIALS, direction)] == numbers


def test_a_trial_shows_its_params_its_best_step_and_what_it_failed_by(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    names, *found = [line.split() for line in lines(TRIALS, {})]
    assert names == ["number", "state", "value", "step", "seconds", "params"]
    assert found[0] == ["0", "fail", "-", "-", "-", "lr=0.5:", "KeyError:", "'x'", "(mine.py,", "line", "3)"]
    assert found[1] == ["1", "complete", "0.5", "4", "1.5", "lr=0.123457", "units=64"]
    assert found[2][:4] == ["2", "pruned", "0.9", "2"]
    assert found[3] == ["3", "waiting", "-", "-", "-", "lr=0.2"]
    assert found[5][3] == "1"
    assert found[7][5:] == ["out", "of", "memory"]


def test_where_the_terminal_is_narrow_the_names_of_params_stand_above(monkeypatch):
    monkeypatch.setenv("COLUMNS", "59")
    names, *found = list(lines(TRIALS, {}))
    assert names.split() == ["number", "state", "value", "step", "seconds", "lr", "units", "failure"]
    assert found[0].split()[5:9] == ["0.5", "-", "KeyError:", "'x'"]
    assert found[1].split() == ["1", "complete", "0.5", "4", "1.5", "0.123457", "64"]
    assert max(map(len, found[1:6])) <= 59


def test_a_trial_of_several_objectives_shows_all_its_values():
    assert list(lines([a_trial(0, value=1.0)], {0: [1.0, 2.5]}))[1].split()[2:4] == ["1", "2.5"]
