"""The indexed pruner: it decides as Optuna's pruners do, and reads each finished trial once."""

from __future__ import annotations

import itertools
import json
import math
import struct
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.pruners import BasePruner, MedianPruner, PercentilePruner
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import Engine, event, text

from storage import PostgresStorage
from storage.optuna_storage.pruning import IndexedPercentilePruner
from storage.trials.finished import Reports

if TYPE_CHECKING:
    from collections.abc import Iterator

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
STATES = (*FINISHED, TrialState.RUNNING, TrialState.WAITING)
NUMBERS = itertools.count()

# Few numbers, so that values are often equal, and the ones on which rounding and infinities show.
values = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 0.1, 0.2, 0.3, 1e308, -1e308]) | st.floats()
reports = st.dictionaries(st.integers(0, 5), values, max_size=6)
percentiles = st.sampled_from([0.0, 25.0, 50.0, 75.0, 100.0]) | st.floats(0, 100)
pruner_settings = st.fixed_dictionaries(
    {
        "n_startup_trials": st.integers(0, 3),
        "n_warmup_steps": st.integers(0, 3),
        "interval_steps": st.integers(1, 3),
        "n_min_trials": st.integers(1, 3),
    }
)
changes = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(STATES), reports),
    st.tuples(st.just("end"), st.integers(0, 9), st.sampled_from(FINISHED)),
    st.tuples(st.just("report"), st.integers(0, 9), reports),
)


@pytest.fixture
def engine(storage: PostgresStorage) -> Engine:
    return storage.engine


@pytest.fixture
def statements(engine: Engine) -> list[tuple[str, Any]]:
    """What the engine has executed since, with parameters."""
    executed: list[tuple[str, Any]] = []

    @event.listens_for(engine, "before_cursor_execute")
    def record(conn, cursor, statement, parameters, context, executemany) -> None:
        executed.append((statement, parameters))

    return executed


def a_study(database: str, direction: str = "minimize", pruner: BasePruner | None = None) -> optuna.Study:
    """A study of a stock Optuna client."""
    storage = optuna.storages.get_storage(RDBStorage(database, skip_table_creation=True))
    return optuna.create_study(study_name=f"s{next(NUMBERS)}", storage=storage, direction=direction, pruner=pruner)


def a_large_study(database: str, engine: Engine, trials: int, steps: int = 5) -> optuna.Study:
    """A study of COMPLETE trials with random reports, written by SQL."""
    study = a_study(database)
    with engine.begin() as conn:
        for statement in (
            """INSERT INTO trials (study_id, number, state, datetime_start, datetime_complete)
                SELECT :study_id, number, 'COMPLETE', now(), now() FROM generate_series(0, :trials - 1) AS number""",
            """INSERT INTO trial_values (trial_id, objective, value, value_type)
                SELECT trial_id, 0, random(), 'FINITE' FROM trials WHERE study_id = :study_id""",
            """INSERT INTO trial_intermediate_values
                    (trial_id, step, intermediate_value, intermediate_value_type)
                SELECT trial_id, step, random(), 'FINITE'
                FROM trials, generate_series(0, :steps - 1) AS step WHERE study_id = :study_id""",
        ):
            conn.execute(text(statement), {"study_id": study._study_id, "trials": trials, "steps": steps})
    return study


def a_trial(state: TrialState, reported: dict[int, float]) -> FrozenTrial:
    value = 0.0 if state == TrialState.COMPLETE else None
    return create_trial(state=state, value=value, intermediate_values=reported)


def a_running_trial(reported: dict[int, float]) -> FrozenTrial:
    return a_trial(TrialState.RUNNING, reported)


def change(study: optuna.Study, unfinished: list[int], what: tuple[Any, ...]) -> None:
    """Make one change to the study by way of stock Optuna's storage."""
    storage = study._storage
    match what:
        case ("add", state, reported):
            trial_id = storage.create_new_trial(study._study_id, a_trial(state, reported))
            if not state.is_finished():
                unfinished.append(trial_id)
        case (_, index, _) if index >= len(unfinished):
            pass
        case ("end", index, state):
            value = [0.0] if state == TrialState.COMPLETE else None
            storage.set_trial_state_values(unfinished.pop(index), state, value)
        case ("report", index, reported):
            for step, value in reported.items():
                storage.set_trial_intermediate_value(unfinished[index], step, value)


@contextmanager
def numpys_warnings_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def indexed(
    storage: PostgresStorage, study: optuna.Study, percentile: float = 50.0, **settings: int
) -> IndexedPercentilePruner:
    return IndexedPercentilePruner(storage, study._study_id, percentile, **settings)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    direction=st.sampled_from(["minimize", "maximize"]),
    configurations=st.lists(st.tuples(percentiles, pruner_settings), min_size=1, max_size=4),
    rounds=st.lists(
        st.tuples(st.lists(changes, max_size=6), st.lists(reports, min_size=1, max_size=12)), min_size=1, max_size=4
    ),
)
def test_it_decides_as_optunas_percentile_pruner_while_the_study_changes(
    database: str,
    storage: PostgresStorage,
    engine: Engine,
    direction: str,
    configurations: list[tuple[float, dict[str, int]]],
    rounds: list[tuple[list[tuple[Any, ...]], list[dict[int, float]]]],
) -> None:
    study = a_study(database, direction)
    pruners = [
        (PercentilePruner(percentile, **settings), indexed(storage, study, percentile, **settings))
        for percentile, settings in configurations
    ]
    unfinished: list[int] = []
    for changed, asked in rounds:
        for what in changed:
            change(study, unfinished, what)
        for trial in map(a_running_trial, asked):
            with numpys_warnings_ignored():
                theirs = [bool(pruner.prune(study, trial)) for pruner, _ in pruners]
            assert [ours.prune(study, trial) for _, ours in pruners] == theirs


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_it_decides_as_optunas_percentile_pruner_with_any_settings(
    database: str, storage: PostgresStorage, direction: str
) -> None:
    """With trials that report most steps, so that each setting decides something."""
    study = a_study(database, direction)
    random = np.random.default_rng(0)
    pruners = []
    for _ in range(40):
        startup, warmup, interval, least = random.integers((0, 0, 1, 1), (9, 4, 5, 7)).tolist()
        settings = {"n_startup_trials": startup, "n_warmup_steps": warmup, "interval_steps": interval}
        percentile = float(random.choice([0, 10, 25, 50, 75, 90, 100]))
        pruners.append(
            (
                PercentilePruner(percentile, **settings, n_min_trials=least),
                indexed(storage, study, percentile, **settings, n_min_trials=least),
            )
        )

    def some_reports() -> dict[int, float]:
        special = random.choice([math.nan, math.inf, -math.inf])
        drawn = [special if random.random() < 0.05 else round(random.normal(), 1) for _ in range(7)]
        steps = [step for step in range(int(random.integers(1, 8))) if random.random() < 0.8]
        return {step: float(drawn[step]) for step in steps}

    decided = []
    for _ in range(3):
        for index in random.choice(len(STATES), size=8, p=[0.6, 0.1, 0.1, 0.1, 0.1]):
            study.add_trial(a_trial(STATES[index], some_reports()))
        for theirs, ours in pruners:
            for trial in (a_running_trial(some_reports()) for _ in range(8)):
                with numpys_warnings_ignored():
                    decided.append(bool(theirs.prune(study, trial)))
                assert ours.prune(study, trial) == decided[-1]
    assert decided.count(True) > 50


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(batches=st.lists(st.lists(values, max_size=40), max_size=3), percentile=percentiles)
def test_a_percentile_is_numpys_to_the_last_bit(batches: list[list[float]], percentile: float) -> None:
    reports = Reports()
    for batch in batches:
        reports.add(struct.pack(f">{len(batch)}d", *batch))
        reports.percentile(50)  # sorts
    together = [value for batch in batches for value in batch]
    assert reports.count == len(together)
    with numpys_warnings_ignored():
        expected = float(np.nanpercentile(together, percentile)) if together else math.nan
    assert reports.percentile(percentile) == expected or (
        math.isnan(reports.percentile(percentile)) and math.isnan(expected)
    )


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_trials_that_report_and_ask_get_the_median_pruners_answers(
    database: str, storage: PostgresStorage, direction: str
) -> None:
    study = a_study(database, direction, MedianPruner(n_startup_trials=2, n_warmup_steps=1))
    ours = indexed(storage, study, n_startup_trials=2, n_warmup_steps=1)
    random = np.random.default_rng(0)
    decisions = []
    study.enqueue_trial({})
    # Pairs run side by side, and the second ends first.
    for pair in ((study.ask(), study.ask()) for _ in range(8)):
        for step, trial in itertools.product(range(4), pair):
            trial.report(random.normal(), step)
            decisions.append(trial.should_prune())
            assert ours.prune(study, trial._get_latest_trial()) == decisions[-1]
        for trial in reversed(pair):
            study.tell(trial, random.normal())
        study.add_trial(a_trial(TrialState.COMPLETE, {0: 0.5, 2: random.normal()}))
    assert True in decisions
    assert False in decisions


def test_a_trial_that_finishes_after_later_ones_counts_from_then_on(database: str, storage: PostgresStorage) -> None:
    study = a_study(database)
    ours = indexed(storage, study, n_startup_trials=2)
    early = study.ask()
    early.report(0.0, 0)
    study.add_trial(a_trial(TrialState.COMPLETE, {0: 2.0}))
    assert not ours.prune(study, a_running_trial({0: 5.0}))
    study.tell(early, 0.0)
    assert ours.prune(study, a_running_trial({0: 1.1}))  # the median is 1.0
    assert not ours.prune(study, a_running_trial({0: 0.9}))


def test_before_any_trial_completed_not_even_one_without_numbers_is_pruned(
    database: str, storage: PostgresStorage
) -> None:
    study = a_study(database)
    study.add_trial(a_trial(TrialState.PRUNED, {0: 1.0}))
    alone = a_running_trial({0: math.nan})
    ours = indexed(storage, study, n_startup_trials=0)
    assert not ours.prune(study, alone)
    assert not MedianPruner(n_startup_trials=0).prune(study, alone)
    study.add_trial(a_trial(TrialState.COMPLETE, {}))
    assert ours.prune(study, alone)


def test_trials_of_other_studies_do_not_count(database: str, storage: PostgresStorage) -> None:
    study, other = a_study(database), a_study(database)
    ours = indexed(storage, study, n_startup_trials=1)
    study.add_trial(a_trial(TrialState.COMPLETE, {0: 1.0}))
    assert not ours.prune(study, a_running_trial({0: 0.5}))
    other.add_trial(a_trial(TrialState.COMPLETE, {0: -1.0}))
    other.add_trial(a_trial(TrialState.COMPLETE, {0: -1.0}))
    assert not ours.prune(study, a_running_trial({0: 0.5}))


def test_a_study_that_was_deleted_does_not_crash_it(database: str, storage: PostgresStorage) -> None:
    study = a_study(database)
    ours, fresh = indexed(storage, study, n_startup_trials=1), indexed(storage, study, n_startup_trials=1)
    study.add_trial(a_trial(TrialState.COMPLETE, {0: 1.0}))
    study.ask()
    assert ours.prune(study, a_running_trial({0: 2.0}))
    optuna.delete_study(study_name=study.study_name, storage=study._storage)
    assert ours.prune(study, a_running_trial({0: 2.0}))
    assert not fresh.prune(study, a_running_trial({0: 2.0}))


def test_a_refresh_that_failed_is_made_again(database: str, storage: PostgresStorage, engine: Engine) -> None:
    study = a_study(database)
    ours = indexed(storage, study, n_startup_trials=1)
    study.add_trial(a_trial(TrialState.COMPLETE, {0: 1.0}))

    @event.listens_for(engine, "before_cursor_execute")
    def fail(conn, cursor, statement, parameters, context, executemany) -> None:
        if "string_agg" in statement:
            raise ConnectionError("the database went away")

    with pytest.raises(ConnectionError):
        ours.prune(study, a_running_trial({0: 2.0}))
    event.remove(engine, "before_cursor_execute", fail)
    assert ours.prune(study, a_running_trial({0: 2.0}))


@pytest.mark.parametrize("bad", [{"percentile": 101.0}, {"n_startup_trials": -1}, {"interval_steps": 0}])
def test_settings_are_refused_as_optuna_refuses_them(storage: PostgresStorage, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Percentile|Number of startup|interval"):
        IndexedPercentilePruner(storage, 1, **{"percentile": 50.0, **bad})


@pytest.mark.slow
@pytest.mark.parametrize("trials", [10, 1000])
def test_a_decision_is_one_statement_whatever_the_size_of_the_study(
    database: str, storage: PostgresStorage, engine: Engine, statements: list[tuple[str, Any]], trials: int
) -> None:
    study = a_large_study(database, engine, trials)
    ours = indexed(storage, study)
    statements.clear()
    ours.prune(study, a_running_trial({0: 0.5}))
    assert len(statements) == 2
    for step in range(1, 5):
        statements.clear()
        ours.prune(study, a_running_trial({step: 0.5}))
        assert len(statements) == 1


def test_a_decision_that_needs_no_other_trial_reads_nothing(
    database: str, storage: PostgresStorage, statements: list[tuple[str, Any]]
) -> None:
    study = a_study(database)
    ours = indexed(storage, study, n_warmup_steps=3, interval_steps=2)
    statements.clear()
    for reported in ({}, {2: 1.0}, {3: 1.0, 4: 1.0}):
        assert not ours.prune(study, a_running_trial(reported))
    assert statements == []


def test_history_is_not_read_again(
    database: str, storage: PostgresStorage, engine: Engine, statements: list[tuple[str, Any]]
) -> None:
    study = a_large_study(database, engine, 100)
    ours = indexed(storage, study)
    asked = [a_running_trial({step: value / 20}) for step in range(5) for value in range(20)]
    before = [ours.prune(study, trial) for trial in asked]
    assert True in before
    assert False in before
    with engine.begin() as conn:
        conn.execute(text("DELETE FROM trial_intermediate_values"))
    assert [ours.prune(study, trial) for trial in asked] == before

    trial_id = study._storage.create_new_trial(study._study_id, a_trial(TrialState.COMPLETE, {0: 0.5}))
    statements.clear()
    ours.prune(study, asked[0])
    (_, seen), (_, read) = statements
    assert (seen["last_number"], seen["unfinished"], read) == (99, "{}", {**read, "trial_ids": f"{{{trial_id}}}"})


@pytest.mark.slow
def test_a_refresh_finds_what_changed_by_indexes(
    database: str, storage: PostgresStorage, engine: Engine, statements: list[tuple[str, Any]]
) -> None:
    study = a_large_study(database, engine, 4000)
    running = [study._storage.create_new_trial(study._study_id) for _ in range(3)]
    ours = indexed(storage, study)
    ours.prune(study, a_running_trial({0: 0.5}))
    a_large_study(database, engine, 4000)  # whose ids are above those of the first
    study._storage.set_trial_intermediate_value(running[1], 0, 0.5)
    study._storage.set_trial_state_values(running[1], TrialState.COMPLETE, [0.5])
    study.add_trial(a_trial(TrialState.COMPLETE, {0: 0.5}))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(text("VACUUM ANALYZE"))
    statements.clear()
    ours.prune(study, a_running_trial({0: 0.5}))
    assert len(statements) == 2
    for statement, parameters in list(statements):
        with engine.connect() as conn:
            (plan,) = conn.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).scalar_one()
        scans = [node for node in nodes(plan["Plan"]) if "Scan" in node["Node Type"]]
        assert scans
        for scan in scans:
            assert "Index" in scan["Node Type"], json.dumps(scan)
            assert scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0) <= 5, json.dumps(scan)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        if child["Node Type"] != "Bitmap Index Scan":
            yield from nodes(child)
