"""Pruners that ask rungs: by Optuna's trials and by the index they decide the same, and as the rule does."""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING, Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from sqlalchemy import event, text

from storage import PostgresStorage
from storage.optuna_storage.rule_pruning import IndexedRulePruner, RulePruner, RungsPruner
from storage.optuna_storage.rule_tables import PRUNED_AT
from storage.optuna_storage.rules import Rungs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from optuna.trial import FrozenTrial

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
STATES = (*FINISHED, TrialState.RUNNING, TrialState.WAITING)
NUMBERS = itertools.count()
RULES = (
    Rungs((0, 2)),
    Rungs((1,), eta=2.0),
    Rungs((0, 2), n_startup=3, latest=4),
    Rungs((1, 3), eta=1.5),
)

values = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 0.1, 0.2, 0.3, 1e308, -1e308]) | st.floats()
reports = st.dictionaries(st.integers(0, 9), values, max_size=5)
marks = st.none() | st.sampled_from([0, 1, 3, -1, True, "1", None, 1.5])
changes = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(STATES), reports, marks),
    st.tuples(st.just("end"), st.integers(0, 9), st.sampled_from(FINISHED)),
    st.tuples(st.just("report"), st.integers(0, 9), reports),
)


@pytest.fixture
def statements(storage: PostgresStorage) -> list[tuple[str, Any]]:
    """What the engine has executed since, with parameters."""
    executed: list[tuple[str, Any]] = []

    @event.listens_for(storage.engine, "before_cursor_execute")
    def note(conn, cursor, statement, parameters, context, executemany) -> None:
        executed.append((statement, parameters))

    return executed


def a_study(database: str, direction: str = "minimize") -> optuna.Study:
    """A study of a stock Optuna client."""
    storage = optuna.storages.get_storage(RDBStorage(database, skip_table_creation=True))
    return optuna.create_study(study_name=f"rules {next(NUMBERS)}", storage=storage, direction=direction)


def a_trial(state: TrialState, reported: dict[int, float], mark: Any = None) -> FrozenTrial:
    value = 0.0 if state == TrialState.COMPLETE else None
    attrs = {} if mark is None else {PRUNED_AT: mark}
    return create_trial(state=state, value=value, intermediate_values=reported, user_attrs=attrs)


def a_running_trial(*values: float) -> FrozenTrial:
    return a_trial(TrialState.RUNNING, dict(enumerate(values, 1)))


def change(study: optuna.Study, unfinished: list[int], what: tuple[Any, ...]) -> None:
    """Make one change to the study."""
    storage = study._storage
    match what:
        case ("add", state, reported, mark):
            trial_id = storage.create_new_trial(study._study_id, a_trial(state, reported, mark))
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


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    direction=st.sampled_from(["minimize", "maximize"]),
    rounds=st.lists(
        st.tuples(st.lists(changes, max_size=6), st.lists(reports, min_size=1, max_size=6)), min_size=1, max_size=3
    ),
)
def test_the_index_decides_as_optunas_trials_do_while_the_study_changes(
    storage: PostgresStorage, other: PostgresStorage, direction: str, rounds: list[tuple[Any, ...]]
) -> None:
    study = optuna.create_study(study_name=f"rules {next(NUMBERS)}", storage=other, direction=direction)
    pruners = [(RulePruner(rule), IndexedRulePruner(storage, study._study_id, rule)) for rule in RULES]
    unfinished: list[int] = []
    for changed, asked in rounds:
        for what in changed:
            change(study, unfinished, what)
        for trial in (a_trial(TrialState.RUNNING, reported) for reported in asked):
            theirs = [pruner.prune(study, trial) for pruner, _ in pruners]
            assert [ours.prune(study, trial) for _, ours in pruners] == theirs


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_trials_side_by_side_are_stopped_at_rungs_by_both(
    database: str, storage: PostgresStorage, direction: str
) -> None:
    """Four trials at a time, one step after the other, on stock Optuna's storage and the index."""
    study = a_study(database, direction)
    rule = Rungs((1, 3))
    pruner, ours = RulePruner(rule), IndexedRulePruner(storage, study._study_id, rule)
    sign = 1 if direction == "minimize" else -1
    decided = []
    for first in range(0, 12, 4):
        running = [study.ask() for _ in range(4)]
        for step in range(1, 6):
            for place, trial in enumerate(list(running)):
                trial.report(sign * ((first + place) * 7 % 11 + 1 / step), step)
                seen = study._storage.get_trial(trial._trial_id)
                decided.append(pruner.prune(study, seen))
                assert ours.prune(study, seen) == decided[-1]
                if decided[-1]:
                    study.tell(trial, state=TrialState.PRUNED)
                    running.remove(trial)
        for trial in running:
            study.tell(trial, 0.0)
    assert 5 < sum(decided) < 12


def test_a_rung_is_a_place_among_a_trials_reports_whatever_its_steps(database: str) -> None:
    study = a_study(database)
    pruner = RulePruner(Rungs((1,)))
    study.add_trial(a_trial(TrialState.PRUNED, {5: 0.5, 10: 0.1}))
    assert not pruner.prune(study, a_trial(TrialState.RUNNING, {2: 0.9}))
    assert pruner.prune(study, a_trial(TrialState.RUNNING, {2: 0.9, 4: 0.2}))
    assert not pruner.prune(study, a_trial(TrialState.RUNNING, {2: 0.05, 4: 0.2}))  # its best counts
    assert not pruner.prune(study, a_trial(TrialState.RUNNING, {2: 0.9, 4: 0.2, 6: 0.2}))
    assert not pruner.prune(study, a_trial(TrialState.RUNNING, {}))
    assert pruner.prune(study, a_running_trial(math.nan, math.nan))


def test_what_an_audited_trial_reported_after_its_pruning_does_not_count(
    database: str, storage: PostgresStorage
) -> None:
    study = a_study(database)
    study.add_trial(a_trial(TrialState.PRUNED, {1: 0.5, 2: 0.1}, mark=1))
    for pruner in (RulePruner(Rungs((1,))), IndexedRulePruner(storage, study._study_id, Rungs((1,)))):
        assert not pruner.prune(study, a_running_trial(0.9, 0.9))
    for pruner in (RulePruner(Rungs((0,))), IndexedRulePruner(storage, study._study_id, Rungs((0,)))):
        assert pruner.prune(study, a_running_trial(0.9))


def test_rungs_lie_at_a_tenth_and_at_three_of_a_trials_reports() -> None:
    assert RungsPruner(20).rule == Rungs((1, 5), 3.0, n_startup=3, latest=6)
    assert RungsPruner(3, eta=4.0, trials=5).rule == Rungs((0,), 4.0)
    assert RungsPruner(3, trials=6).rule == Rungs((0,), 3.0, n_startup=3, latest=6)


def test_a_decision_between_rungs_reads_nothing_and_one_at_a_rung_is_one_statement(
    database: str, storage: PostgresStorage, statements: list[tuple[str, Any]]
) -> None:
    study = a_study(database)
    for number in range(9):
        study.add_trial(a_trial(TrialState.COMPLETE, {1: number / 9, 2: 0.5}))
    ours = IndexedRulePruner(storage, study._study_id, Rungs((0, 1)))
    statements.clear()
    assert not ours.prune(study, a_running_trial(0.1, 0.1, 0.1))
    assert statements == []
    assert not ours.prune(study, a_running_trial(0.2))
    assert ours.prune(study, a_running_trial(0.3))
    assert len(statements) == 2
    study.add_trial(a_trial(TrialState.PRUNED, {1: 0.0}))
    with storage.engine.begin() as conn:
        conn.execute(text("DELETE FROM trial_intermediate_values WHERE trial_id <> (SELECT max(trial_id) FROM trials)"))
    statements.clear()
    assert ours.prune(study, a_running_trial(0.2))  # of eleven, three are better
    assert len(statements) == 1


@pytest.mark.slow
def test_a_decision_finds_what_changed_by_indexes(
    database: str, storage: PostgresStorage, statements: list[tuple[str, Any]]
) -> None:
    study = a_study(database)
    with storage.engine.begin() as conn:
        for statement in (
            """INSERT INTO trials (study_id, number, state)
                SELECT :study_id, number, 'COMPLETE' FROM generate_series(0, 3999) AS number""",
            """INSERT INTO trial_intermediate_values
                    (trial_id, step, intermediate_value, intermediate_value_type)
                SELECT trial_id, step, random(), 'FINITE'
                FROM trials, generate_series(1, 5) AS step WHERE study_id = :study_id""",
            """INSERT INTO trial_user_attributes (trial_id, key, value_json)
                SELECT trial_id, 'seconds', '1.0' FROM trials WHERE study_id = :study_id""",
        ):
            conn.execute(text(statement), {"study_id": study._study_id})
    running = study._storage.create_new_trial(study._study_id)
    ours = IndexedRulePruner(storage, study._study_id, Rungs((0, 1)))
    ours.prune(study, a_running_trial(0.5))
    study._storage.set_trial_intermediate_value(running, 1, 0.5)
    study.add_trial(a_trial(TrialState.PRUNED, {1: 0.5}))
    with storage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(text("VACUUM ANALYZE"))
    statements.clear()
    ours.prune(study, a_running_trial(0.5))
    ((statement, parameters),) = statements
    with storage.engine.connect() as conn:
        (plan,) = conn.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).scalar_one()
    scans = [node for node in nodes(plan["Plan"]) if "Relation Name" in node]
    assert scans
    for scan in scans:
        assert "Index" in scan["Node Type"] or scan["Node Type"] == "Bitmap Heap Scan", json.dumps(scan)
        assert scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0) <= 5, json.dumps(scan)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)
