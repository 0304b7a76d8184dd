"""Which trials are drawn, and how what people wrote gets into a figure and a page."""

import json

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from tuner.errors import TunerError
from tuner.report.figures import as_plain
from tuner.report.page import for_script, write_page
from tuner.report.shown import chosen, drawable, evenly


def trials(values):
    found = []
    for number, value in enumerate(values):
        state = TrialState.PRUNED if value is None else TrialState.COMPLETE
        trial = create_trial(state=state, value=value)
        trial.number = number
        found.append(trial)
    return found


def test_the_best_and_those_that_were_the_best_are_among_the_few_that_are_drawn():
    values = [abs(number - 700) + 1.0 for number in range(1000)]
    values[10] = 0.5
    few = chosen(trials(values), "minimize", 50)
    numbers = [trial.number for trial in few]
    assert len(few) == 50
    assert numbers == sorted(numbers)
    assert {10, 699, 700, 701, 0, 999} <= set(numbers)
    assert [trial.number for trial in chosen(few, "minimize", 50)] == numbers


def test_trials_without_a_value_are_drawn_too():
    assert len(chosen(trials([None] * 30), "maximize", 10)) == 10


def test_items_are_taken_at_even_distances():
    assert evenly(list(range(9)), 3) == [0, 4, 8]
    assert evenly([1, 2], 5) == [1, 2]


@pytest.mark.filterwarnings("ignore:Choices for a categorical")
def test_a_choice_that_is_a_list_is_drawn_as_text():
    kind = CategoricalDistribution([[1, 2], None, "a"])
    (trial,) = drawable([create_trial(value=1.0, params={"x": [1, 2]}, distributions={"x": kind})])
    assert trial.params == {"x": "[1, 2]"}
    assert trial.distributions["x"].choices == ("[1, 2]", None, "a")


def test_long_choices_are_cut_and_can_be_told_apart():
    kind = CategoricalDistribution(["a" * 50 + "1", "a" * 50 + "2", "b"])
    for choice, end in (("a" * 50 + "2", "…_#1"), ("b", "b")):
        (trial,) = drawable([create_trial(value=1.0, params={"x": choice}, distributions={"x": kind})])
        assert trial.params["x"].replace(" ", "_").endswith(end)
        assert len(trial.params["x"]) <= 40


def test_a_figure_has_numbers_of_json_and_no_tags_that_people_wrote():
    given = {
        "x": np.array([1 / 3, np.nan]),
        "name": '<a href="https://a.example">a</a>',
        "n": 2**60,
        "hovertemplate": "%{y}<extra>ours</extra>",
        "text": "<b>1</b><br>2",
    }
    assert as_plain(given) == {
        "x": [0.333333, None],
        "name": '&lt;a href="https://a.example">a&lt;/a>',
        "n": 1.15292e18,
        "hovertemplate": "%{y}<extra>ours</extra>",
        "text": "<b>1</b><br>2",
    }


def test_nothing_in_the_data_of_a_page_ends_their_element():
    text = "</script><!--<script>]]>&"
    assert not set("<>&") & set(for_script([text]))
    assert json.loads(for_script([text])) == [text]


def test_a_page_is_replaced_as_a_whole_and_one_that_cannot_be_written_is_told(tmp_path):
    place = tmp_path / "report.html"
    place.write_text("old")
    (tmp_path / "link.html").symlink_to(place)
    write_page(tmp_path / "link.html", "new é")
    assert place.read_text("utf-8") == "new é"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "report.html"]
    with pytest.raises(TunerError, match=r"cannot write the report to .*: .*; choose another file with --output"):
        write_page(tmp_path / "none" / "report.html", "new")
    with pytest.raises(TunerError, match="Is a directory"):
        write_page(tmp_path, "new")
    write_page(tmp_path / "/dev/null", "new")
