"""Studies and trials as they are read back: the same as Optuna reads them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.trial import TrialState, create_trial
from sqlalchemy import Engine, text

from storage import StudyExistsError, StudyNotFoundError, ensure_schema, open_engine, open_storage
from storage.coordination import records, studies

if TYPE_CHECKING:
    from collections.abc import Iterator

SPEC = {"version": 1, "budget": {"trials": 3}}


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    engine = open_engine(database)
    ensure_schema(engine)
    yield engine
    engine.dispose()


def a_finished_trial(value: float, **params: float) -> optuna.trial.FrozenTrial:
    return create_trial(value=value, params=params, distributions={name: FloatDistribution(-10, 10) for name in params})


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_a_created_study_is_read_back_by_us_and_by_optuna(engine: Engine, database: str, direction: str) -> None:
    created = studies.create_study(engine, "née 'x'; --", direction, SPEC, {"metric": "accuracy"}, "accuracy")
    assert studies.find_study(engine, "née 'x'; --") == created
    assert (created.spec, created.direction) == (SPEC, direction)
    study = optuna.load_study(study_name="née 'x'; --", storage=open_storage(database))
    assert study.direction.name == direction.upper()
    assert study.user_attrs == {"metric": "accuracy"}
    assert study.metric_names == ["accuracy"]


def test_two_studies_cannot_have_one_name(engine: Engine) -> None:
    studies.create_study(engine, "s", "minimize", SPEC, {}, "value")
    with pytest.raises(StudyExistsError, match="a study named 's' exists in postgresql://"):
        studies.create_study(engine, "s", "minimize", SPEC, {}, "value")
    with engine.connect() as conn:
        assert conn.execute(text("select count(*) from tuner_studies")).scalar_one() == 1


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 513])
def test_a_name_that_the_database_cannot_hold_is_refused_before_it(engine: Engine, name: str) -> None:
    with pytest.raises(ValueError, match="a study's name needs 1 to 512 characters"):
        studies.create_study(engine, name, "minimize", SPEC, {}, "value")


def test_an_unknown_study_is_named_in_the_error(engine: Engine) -> None:
    with pytest.raises(StudyNotFoundError, match=r"no study named 'nope' in .*; 'tuner studies' lists them"):
        studies.find_study(engine, "nope")


def test_a_study_of_stock_optuna_has_no_spec(engine: Engine, database: str) -> None:
    optuna.create_study(study_name="theirs", storage=open_storage(database), direction="maximize")
    (summary,) = studies.summaries(engine)
    record = summary.study
    assert (record.name, record.direction, record.spec) == ("theirs", "maximize", None)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize(
    "values", [[0.5, 2.0, -1.0], [1.0, 1.0], [math.inf, 3.0], [-math.inf, 3.0], [math.inf, -math.inf, 0.0]]
)
def test_the_best_trial_is_optunas(engine: Engine, database: str, direction: str, values: list[float]) -> None:
    record = studies.create_study(engine, "s", direction, SPEC, {}, "value")
    study = optuna.load_study(study_name="s", storage=open_storage(database))
    study.add_trials([a_finished_trial(value, x=index) for index, value in enumerate(values)])
    study.add_trial(create_trial(state=TrialState.PRUNED, value=100.0))
    study.add_trial(create_trial(state=TrialState.FAIL))
    best = records.best_trial(engine, record.study_id, direction)
    assert best is not None
    assert (best.value, best.params) == (study.best_value, study.best_trial.params)
    assert best.number == values.index(study.best_value)


def test_a_summary_tells_the_best_value_that_is_a_number_and_the_metrics_name(engine: Engine, database: str) -> None:
    values = {"low": [2.0, 1.0], "high": [1.0, 2.0], "endless": [1.0, math.inf], "below": [-math.inf, 1.0], "none": []}
    for name, its in values.items():
        direction = "minimize" if name in ("low", "below") else "maximize"
        studies.create_study(engine, name, direction, SPEC, {}, f"{name}ness")
        optuna.load_study(study_name=name, storage=open_storage(database)).add_trials(map(a_finished_trial, its))
    found = studies.summaries(engine)
    assert [(its.study.name, its.best, its.study.metrics, its.counts.complete) for its in found] == [
        ("low", 1.0, ("lowness",), 2),
        ("high", 2.0, ("highness",), 2),
        ("endless", math.inf, ("endlessness",), 2),
        ("below", -math.inf, ("belowness",), 2),
        ("none", None, ("noneness",), 0),
    ]


def test_a_study_without_a_complete_trial_has_no_best(engine: Engine, database: str) -> None:
    record = studies.create_study(engine, "s", "minimize", SPEC, {}, "value")
    study = optuna.load_study(study_name="s", storage=open_storage(database))
    study.add_trial(create_trial(state=TrialState.PRUNED, value=1.0))
    assert records.best_trial(engine, record.study_id, "minimize") is None


def test_trials_are_read_as_optuna_reads_them(engine: Engine, database: str) -> None:
    record = studies.create_study(engine, "s", "minimize", SPEC, {}, "value")
    study = optuna.load_study(study_name="s", storage=open_storage(database))

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_categorical("kind", ["a", None, 3, True, 2.5])
        trial.suggest_int("n", 1, 9, step=2)
        trial.suggest_float("lr", 1e-5, 1, log=True)
        trial.set_user_attr("nested", {"a": [1, None]})
        trial.report(math.nan, 0)
        trial.report(1.5, 3)
        if trial.number == 1:
            raise optuna.TrialPruned
        return float(trial.number)

    study.optimize(objective, n_trials=4)
    ours = records.list_trials(engine, record.study_id)
    for mine, theirs in zip(ours, study.trials, strict=True):
        assert mine.number == theirs.number
        assert mine.state == theirs.state.name
        assert mine.value == theirs.value
        assert mine.params == theirs.params
        assert [type(value) for value in mine.params.values()] == [type(value) for value in theirs.params.values()]
        assert mine.user_attrs == theirs.user_attrs
        assert (mine.last_step, mine.last_value) == (3, 1.5)
        assert mine.started_at is not None
        assert theirs.datetime_start is not None
        assert mine.started_at.timestamp() == theirs.datetime_start.timestamp()
    assert studies.count_states(engine, record.study_id) == studies.StateCounts(complete=3, pruned=1)


_distributions = st.one_of(
    st.builds(FloatDistribution, st.floats(-5, 0), st.floats(0.5, 5)),
    st.builds(FloatDistribution, st.floats(1e-6, 1), st.floats(1.5, 5), log=st.just(True)),
    st.builds(IntDistribution, st.integers(-9, 0), st.integers(1, 99)),
    st.builds(
        CategoricalDistribution,
        st.lists(st.one_of(st.none(), st.booleans(), st.integers(), st.text()), min_size=1, max_size=5),
    ),
)


@given(distribution=_distributions, share=st.floats(0, 1))
def test_a_params_value_is_what_optuna_makes_of_it(distribution: BaseDistribution, share: float) -> None:
    if isinstance(distribution, CategoricalDistribution):
        internal = float(round(share * (len(distribution.choices) - 1)))
    else:
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        internal = distribution.low + share * (distribution.high - distribution.low)
        if isinstance(distribution, IntDistribution):
            internal = float(round(internal))
    wanted = distribution.to_external_repr(internal)
    found = records.param_value(internal, distribution_to_json(distribution))
    assert (found, type(found)) == (wanted, type(wanted))


def test_exports_are_recorded_in_order_and_vanish_with_the_study(engine: Engine, database: str) -> None:
    record = studies.create_study(engine, "s", "minimize", SPEC, {}, "value")
    studies.record_export(engine, record.study_id, 7, "a" * 64, {"accuracy": 0.5})
    studies.record_export(engine, record.study_id, 8, "b" * 64, {"accuracy": 0.6})
    assert studies.list_exports(engine, record.study_id) == [
        (7, "a" * 64, {"accuracy": 0.5}),
        (8, "b" * 64, {"accuracy": 0.6}),
    ]
    optuna.delete_study(study_name="s", storage=open_storage(database))
    assert studies.list_exports(engine, record.study_id) == []


def test_failures_are_told_by_the_latest_message_whatever_another_program_made_of_them(
    engine: Engine, database: str
) -> None:
    study_id = studies.create_study(engine, "s", "minimize", SPEC, {}, "value").study_id
    study = optuna.load_study(study_name="s", storage=open_storage(database))
    for attrs in (
        {"failure": "nan", "failure_message": "told last"},
        {"failure": "nan", "failure_message": "told first"},
        {"failure": {"a": 1}, "failure_message": [2]},
        {},
    ):
        study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=attrs))
    study.add_trial(create_trial(value=1.0))
    with engine.begin() as conn:
        conn.execute(text("update trials set datetime_complete = now() + interval '1 hour' where number = 0"))
    assert list(records.count_failures(engine, study_id).items()) == [
        ('{"a": 1}', (1, "[2]")),
        ("unknown", (1, "")),
        ("nan", (2, "told last")),
    ]
