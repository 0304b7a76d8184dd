"""A sampler or pruner as the command line names it, and values as it takes them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from searching import SCALARS

from tuner.study.params import parse_value
from tuner.study.sampling import parse_choice


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        ("tpe", "tpe", {}),
        ("tpe:", "tpe", {}),
        ("median:n_warmup_steps=3,interval_steps=2", "median", {"n_warmup_steps": 3, "interval_steps": 2}),
        ("tpe:multivariate=true", "tpe", {"multivariate": True}),
        ("qmc:qmc_type=halton", "qmc", {"qmc_type": "halton"}),
        ('grid:{"search_space": {"lr": [0.1, 1]}}', "grid", {"search_space": {"lr": [0.1, 1]}}),
        ("x:a=b=c", "x", {"a": "b=c"}),
    ],
)
def test_a_choice_is_a_name_and_settings(text, name, settings):
    assert parse_choice(text) == (name, settings)


VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
NAMES = st.from_regex(r"[a-z_]+", fullmatch=True)


@given(VALUES)
def test_a_value_comes_back_from_its_json(value):
    assert parse_value(json.dumps(value)) == value


@pytest.mark.slow
@given(NAMES, st.dictionaries(NAMES, VALUES, min_size=1))
def test_a_choice_comes_back_from_its_json(name, settings):
    assert parse_choice(f"{name}:{json.dumps(settings)}") == (name, settings)


@pytest.mark.slow
@given(NAMES, st.dictionaries(NAMES, st.booleans() | st.integers(-999, 999) | NAMES.map("_".__add__), min_size=1))
def test_a_choice_comes_back_from_its_pairs(name, settings):
    pairs = ",".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
    )
    assert parse_choice(f"{name}:{pairs}") == (name, settings)


@given(st.text())
def test_any_text_is_a_value_that_the_database_can_hold(text):
    json.loads(json.dumps(parse_value(text)), parse_constant=pytest.fail)


@pytest.mark.parametrize("text", ["", "NaN", "-Infinity", "relu", "01", "1_000", "9" * 5000, "1e999", "+1e999"])
def test_what_is_no_json_is_text(text):
    assert parse_value(text) == text
