import enum
import json

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from tuner.study.params import MAX_INT, ParamError, as_param, check_distribution, check_number, parse_value, range_text

UNITS = IntDistribution(8, 64, step=8)
RATE = FloatDistribution(1e-4, 0.5, log=True)
KINDS = CategoricalDistribution(("a", "007", "2024", "1e3", ".5", None, True, 1, 2.5))


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-2.5e-3", -2.5e-3),
        (".2", 0.2),
        ("-.2", -0.2),
        ("1.", 1.0),
        ("+5", 5),
        ("+.5e1", 5.0),
        ("true", True),
        ('"1"', "1"),
        ("007", "007"),
        (".", "."),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("NaN", "NaN"),
        ("e5", "e5"),
        ("", ""),
        ("+" + "9" * 5000, "+" + "9" * 5000),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_a_number_is_read_as_people_write_it_and_all_else_is_text(text, value):
    found = parse_value(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("distribution", "given", "param"),
    [
        (UNITS, 32, 32),
        (UNITS, 32.0, 32),
        (UNITS, "32", 32),
        (UNITS, "3.2e1", 32),
        (RATE, 0.5, 0.5),
        (FloatDistribution(0, 4), 1, 1.0),
        (FloatDistribution(0, 4), ".2", 0.2),
        (FloatDistribution(0, 1e30), 10**20, 1e20),
        (KINDS, "a", "a"),
        (KINDS, "007", "007"),
        (KINDS, 2024, "2024"),
        (KINDS, 1000.0, "1e3"),
        (KINDS, 0.5, ".5"),
        (KINDS, None, None),
        (KINDS, "None", None),
        (KINDS, True, True),
        (KINDS, 1, 1),
        (KINDS, 1.0, 1),
        (KINDS, "2.5", 2.5),
    ],
)
def test_a_value_from_anywhere_gets_the_type_of_its_param(distribution, given, param):
    found = as_param("p", distribution, given)
    assert (found, type(found)) == (param, type(param))
    assert as_param("p", distribution, json.loads(json.dumps(found))) == param


@pytest.mark.parametrize(
    ("distribution", "given", "wanted"),
    [
        (UNITS, 12.7, "p: 8 to 64 in steps of 8, whole numbers; got 12.7"),
        (UNITS, 12, "steps of 8"),
        (UNITS, 72, "p: 8 to 64"),
        (UNITS, True, "got True"),
        (UNITS, None, "got None"),
        (UNITS, "many", "got 'many'"),
        (UNITS, [32], "got [32]"),
        (UNITS, float("inf"), "got inf"),
        (UNITS, 10**400, "p: 8 to 64"),
        (RATE, 5, "p: 0.0001 to 0.5, log; got 5"),
        (RATE, float("nan"), "got nan"),
        (RATE, 10**400, "p: 0.0001 to 0.5"),
        (RATE, False, "got False"),
        (CategoricalDistribution(("adam", "sgd", "rmsprop")), "adamw", "p: adam, sgd or rmsprop; got 'adamw'"),
        (CategoricalDistribution((1, 2)), True, "p: 1 or 2; got True"),
        (CategoricalDistribution((1,)), 2, "p: 1; got 2"),
        (IntDistribution(-MAX_INT, MAX_INT), MAX_INT + 1, f"p: -{MAX_INT} to {MAX_INT}, whole"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_the_range(distribution, given, wanted):
    with pytest.raises(ParamError) as refused:
        as_param("p", distribution, given)
    assert wanted in str(refused.value)


@pytest.mark.parametrize(("given", "param"), [(80.0, 80), (12, 12)])
def test_a_grid_s_values_may_lie_beside_the_range_but_have_its_type(given, param):
    found = as_param("p", UNITS, given, within=False)
    assert (found, type(found)) == (param, int)
    with pytest.raises(ParamError):
        as_param("p", UNITS, 12.7, within=False)


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        (CategoricalDistribution(("a", 1, 2.5, True, None)), None),
        (IntDistribution(-MAX_INT, MAX_INT), None),
        (IntDistribution(0, MAX_INT + 1), "p: whole numbers need to be within 2^53"),
        (IntDistribution(-MAX_INT - 1, 0), "to 0: end the range there"),
        (CategoricalDistribution((Colour.RED,)), "p: choices need to be text, numbers, True, False or None"),
    ],
)
def test_a_space_that_a_study_cannot_give_back_is_refused_by_name(distribution, message):
    if message is None:
        check_distribution("p", distribution)
        return
    with pytest.raises(ParamError) as refused:
        check_distribution("p", distribution)
    assert message in str(refused.value)


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
@pytest.mark.parametrize("choice", [(16, 8), [16], {"a": 1}, int, b"a"])
def test_choices_that_come_back_as_something_else_are_refused_with_a_way_out(choice):
    with pytest.raises(ParamError, match=r"(?s)p: choices need.*TABLE\[trial.suggest_categorical\('p', list\(TABLE\)"):
        check_distribution("p", CategoricalDistribution((choice, "b")))


@pytest.mark.parametrize(
    "text", ["nan", "-Infinity", "inf", "1e400", "+1e400", "-1e309", str(2**53 + 1), "1" + "0" * 400, "9" * 5000]
)
def test_a_number_that_no_study_holds_is_refused_where_it_would_be_taken_as_text_or_rounded(text):
    with pytest.raises(ParamError, match=r"lr: a study holds finite numbers.* got .*quote it as JSON: lr='\""):
        check_number("lr", text)


@pytest.mark.parametrize("text", ['"nan"', "adam", "", "1e308", ".5", "-32", str(2**53), "1e30", "true", "007", "[1]"])
def test_all_other_numbers_and_texts_are_taken(text):
    check_number("lr", text)


def test_ranges_are_told_as_people_write_them():
    assert range_text(FloatDistribution(1e-4, 0.03, log=True)) == "0.0001 to 0.03, log"
    assert range_text(FloatDistribution(0, 1, step=0.25)) == "0 to 1 in steps of 0.25"
    assert range_text(IntDistribution(1, 8)) == "1 to 8, whole numbers"
