"""What runs on fresh seeds tell: means, the gap to the runner-up, and when trials cannot be told apart."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest

from tuner.study.confirmation import Candidate, Confirmation, gap

CLOSE = {3: (0.970, 0.971, 0.972, 0.969, 0.973), 5: (0.970, 0.971, 0.973, 0.968, 0.972), 9: (0.91, 0.92, 0.93, 0.92)}


def a_confirmation(values: dict[int, tuple[float, ...]], direction: Any = "maximize", **more: Any) -> Confirmation:
    """Of candidates whose values in the search are 0.01 better than their best runs, and that have 1,000 x number
    parameters."""
    better = max if direction == "maximize" else min
    sign = 1 if direction == "maximize" else -1
    candidates = []
    for number, its in values.items():
        searched = better(its, default=0.5) + 0.01 * sign
        fields = {"parameters": 1000 * number, "failed": {}, **more.pop(f"of_{number}", {})}
        candidates.append(Candidate(number=number, searched=searched, params={}, values=its, **fields))
    best = better(candidates, key=lambda one: one.searched)
    whole = {
        "study": "d",
        "name": "d/confirm",
        "direction": direction,
        "metric": "accuracy",
        "seed": 0,
        "candidates": candidates,
        "search_best": best.number,
        "search_value": best.searched,
        "n_complete": 30,
    }
    return Confirmation(**{**whole, **more})


def test_the_choice_is_the_best_mean_and_what_is_within_noise_of_it_is_said():
    found = a_confirmation(CLOSE)
    assert [its.number for its in found.ranked] == [3, 5, 9]
    assert found.choice is found.candidates[0]
    assert (found.choice.mean, found.choice.std) == (pytest.approx(0.971), pytest.approx(statistics.stdev(CLOSE[3])))
    assert [its.number for its in found.alike] == [3, 5]
    assert (found.gaps[5].low < 0 < found.gaps[5].value < found.gaps[5].high, found.gaps[9].low > 0) == (True, True)
    said = list(found.sentences())
    assert said[0] == "the choice is trial 3, accuracy 0.971 ± 0.0016 over 5 runs"
    assert said[1].startswith("its lead over trial 5, the runner-up, is 0.0002 (95 %: -0.00")
    assert said[2] == "2 of these cannot be told apart; the simplest has 3,000 parameters (trial 3)"
    assert said[3] == (
        "trial 3 was the best of 30 complete ones in the search, with 0.983; on fresh seeds it is 0.012 worse on"
        " average: the best of many was lucky, too"
    )
    assert len(said) == 4


def test_less_is_better_where_the_study_minimizes():
    found = a_confirmation({1: (0.30, 0.31, 0.32), 2: (0.10, 0.11, 0.12)}, "minimize")
    assert [its.number for its in found.ranked] == [2, 1]
    assert found.gaps[1].value == pytest.approx(0.2)
    assert [its.number for its in found.alike] == [2]
    assert found.regression == pytest.approx(0.11 - 0.09)
    assert not any("told apart" in line for line in found.sentences())


@pytest.mark.parametrize(("searched", "said"), [(0.6, "0.05 better on average"), (0.65 + 3e-8, "as good on average")])
def test_the_search_need_not_have_been_lucky(searched, said):
    candidate = Candidate(number=1, searched=searched, params={}, values=(0.6, 0.7), failed={})
    found = a_confirmation({1: ()}, candidates=[candidate], search_value=searched)
    assert found.regression == pytest.approx(searched - 0.65)
    assert list(found.sentences())[-1].endswith(f"; on fresh seeds it is {said}")
    assert (found.gaps, [its.number for its in found.alike]) == ({}, [1])


def test_what_diverged_on_a_seed_is_not_chosen_before_others_and_other_failures_are_told():
    of = {"of_1": {"failed": {"nan": 1}}, "of_2": {"failed": {"oom": 2, "lost": 1}}}
    found = a_confirmation({1: (0.99, 0.98), 2: (0.5, 0.6), 3: (0.4, 0.5)}, **of)
    assert [its.number for its in found.ranked] == [2, 3, 1]
    assert found.choice.number == 2
    assert 1 not in [its.number for its in found.alike]
    said = list(found.sentences())
    assert said[0] == "3 of 5 runs of trial 2 failed (2 oom, 1 lost)"
    assert said[1] == "1 of 3 runs of trial 1 failed (1 nan), and so it is not chosen before others"
    alone = a_confirmation({1: (0.99, 0.98)}, of_1={"failed": {"nan": 1}})
    assert alone.choice.number == 1


def test_nothing_is_chosen_while_runs_are_to_be_done_or_if_none_is_complete():
    found = a_confirmation({1: (0.9, 0.8), 2: (0.7,)}, of_2={"unfinished": 1})
    assert (found.choice, found.alike, found.gaps, found.runs) == (None, [], {}, 4)
    assert list(found.sentences()) == [
        "1 of 4 runs are still to be done, and nothing is chosen; 'tuner confirm' goes on"
    ]
    failed = a_confirmation({1: ()}, of_1={"failed": {"user_error": 2}})
    assert failed.choice is None
    assert list(failed.sentences())[-1].startswith("no run is complete, and nothing is chosen")


def test_one_run_tells_nothing_of_a_gap():
    found = a_confirmation({1: (0.9, 0.8, 0.85), 2: (0.7,)})
    assert found.gaps == {2: None}
    assert [its.number for its in found.alike] == [1, 2]
    assert "its lead over trial 2 cannot be told from less than two runs of each" in list(found.sentences())


def test_a_size_that_is_not_known_makes_no_simplest():
    found = a_confirmation({1: (0.9, 0.8), 2: (0.9, 0.8)}, of_2={"parameters": None})
    assert "2 of these cannot be told apart" in list(found.sentences())


def test_the_interval_holds_the_true_gap_about_as_often_as_it_says():
    """Of 400 pairs of 8 values each; the resampled means are spread, or fewer would."""
    generator = np.random.default_rng(7)
    held = 0
    for seed in range(400):
        one, other = generator.normal(1.0, 1.0, 8), generator.normal(0.5, 1.0, 8)
        its = gap(list(one), list(other), "maximize", seed)
        held += its.low <= 0.5 <= its.high
    assert 0.91 <= held / 400 <= 0.97


def test_a_gap_is_the_same_each_time():
    assert gap(CLOSE[3], CLOSE[5], "maximize", 1) == gap(CLOSE[3], CLOSE[5], "maximize", 1)
    same = gap((1.0, 1.0), (1.0, 1.0), "maximize", 1)
    assert (same.value, same.low, same.high) == (0, 0, 0)
