"""The same random calls on Optuna's RDBStorage and on ours, two databases: no reader sees a difference."""

from __future__ import annotations

import datetime as dt
import math
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from sqlalchemy import func, select

from storage.database.engine import engine_options
from storage.database.tables import optuna_metadata
from storage.database.url import parse_url
from storage.optuna_storage.storage import PostgresStorage

NUMBERS = st.sampled_from([0.0, -1.5, math.inf, -math.inf]) | st.floats(allow_nan=False)
REPORTS = st.sampled_from([1.0, math.nan, -math.inf, math.inf]) | st.floats()
STEPS = st.integers(0, 2)
KEYS = st.sampled_from(["a", "b", "é 'x'; --", ""])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)
DISTRIBUTIONS = {
    "x": [FloatDistribution(0, 1), FloatDistribution(0, 2)],
    "n": [IntDistribution(1, 9), IntDistribution(1, 9, step=2)],
    "c": [CategoricalDistribution((None, True, 2, 0.5, "s")), CategoricalDistribution((True, None))],
    "m": [FloatDistribution(1e-3, 1, log=True), IntDistribution(1, 3)],
}
PARAMS = st.sampled_from([(name, which) for name, options in DISTRIBUTIONS.items() for which in options])
DIRECTIONS = st.lists(st.sampled_from([StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE]), min_size=1, max_size=2)
STATES = st.sampled_from(list(TrialState))
# Ids of both databases, which start empty, are the same; some are of nothing, or of what was deleted.
STUDIES = st.integers(1, 3)
TRIALS = st.integers(1, 6)


class _Refused:
    """What a call raised, by the type that Optuna's contract names."""

    def __init__(self, error):
        self.kind = type(error)

    def __eq__(self, other):
        return isinstance(other, _Refused) and self.kind is other.kind

    def __repr__(self):
        return f"raised {self.kind.__name__}"


class TwoStorages(RuleBasedStateMachine):
    """Calls go to both; ids are Optuna's on either side, which agree as both databases start empty."""

    theirs: RDBStorage
    ours: PostgresStorage
    others: tuple[PostgresStorage, ...]  # more objects on our database: one that reads anew, one that read before

    def __init__(self):
        super().__init__()
        self.directions = {}
        self.study_of = {}

    @initialize(first=DIRECTIONS, second=DIRECTIONS)
    def start_with_two_studies(self, first, second):
        for engine in (self.theirs_engine, self.ours.engine):
            with engine.begin() as conn:
                for table in reversed(optuna_metadata.sorted_tables):  # TRUNCATE takes 10 times as long
                    conn.execute(table.delete())
                for sequence in ("studies_study_id_seq", "trials_trial_id_seq"):
                    conn.execute(select(func.setval(sequence, 1, False)))
        for storage in (self.ours, *self.others):
            for known in (storage._caches, storage._study_of, storage._n_objectives, storage._distributions):
                known.clear()
        for name, directions in (("s", first), ("t", second)):
            self.create_study(directions, name)
        for study in (1, 1, 2):
            self.create_running(study)

    def both(self, method, *args):
        results = [_called(getattr(storage, method), *args) for storage in (self.theirs, self.ours)]
        assert results[0] == results[1], (method, args)
        return results[1]

    @rule(directions=DIRECTIONS, name=st.sampled_from(["s", "t", "naïve", ""]))
    def create_study(self, directions, name):
        study_id = self.both("create_new_study", directions, name)
        if not isinstance(study_id, _Refused):
            self.directions[study_id] = directions

    @rule(study=st.integers(2, 4))
    def delete_study(self, study):
        self.both("delete_study", study)

    @rule(study=STUDIES, key=KEYS, value=JSON, kind=st.sampled_from(["user", "system"]))
    def set_study_attr(self, study, key, value, kind):
        self.both(f"set_study_{kind}_attr", study, key, value)

    @rule(study=STUDIES)
    def create_running(self, study):
        self.create(study)

    @rule(
        study=STUDIES,
        state=STATES,
        values=st.lists(NUMBERS, min_size=2, max_size=2),
        params=st.lists(PARAMS, max_size=2, unique_by=lambda param: param[0]),
        attrs=st.dictionaries(KEYS, JSON, max_size=2),
        reports=st.dictionaries(STEPS, REPORTS, max_size=2),
    )
    def create_from_template(self, study, state, values, params, attrs, reports):
        has_values = state in (TrialState.COMPLETE, TrialState.PRUNED)
        template = create_trial(
            state=TrialState.RUNNING,
            params={name: external(which) for name, which in params},
            distributions=dict(params),
            user_attrs=attrs,
            system_attrs=attrs,
            intermediate_values=reports,
        )
        template.state = state
        template.values = values[: len(self.directions.get(study, [1]))] if has_values else None
        template.datetime_start = None if state == TrialState.WAITING else dt.datetime(2026, 3, 29, 2, 30, 0, 5)
        template.datetime_complete = dt.datetime(2026, 10, 25, 2, 30) if state.is_finished() else None
        self.create(study, template)

    def create(self, study, template=None):
        trial = self.both("create_new_trial", study, template)
        if not isinstance(trial, _Refused):
            self.study_of[trial] = study

    @rule(trial=TRIALS, param=PARAMS, internal=st.sampled_from([1.0, 1, 0.0]))
    def set_param(self, trial, param, internal):
        name, distribution = param
        if getattr(distribution, "log", False):
            internal = distribution.high  # of 0, which no sampler gives, stock takes the logarithm when it reads it
        self.both("set_trial_param", trial, name, internal, distribution)

    @rule(trial=TRIALS, step=STEPS, value=REPORTS)
    def report(self, trial, step, value):
        self.both("set_trial_intermediate_value", trial, step, value)

    @rule(trial=TRIALS, key=KEYS, value=JSON, kind=st.sampled_from(["user", "system"]))
    def set_trial_attr(self, trial, key, value, kind):
        self.both(f"set_trial_{kind}_attr", trial, key, value)

    @rule(trial=TRIALS, state=STATES, values=st.lists(NUMBERS, min_size=2, max_size=2))
    def set_state(self, trial, state, values):
        n_values = len(self.directions[self.study_of[trial]]) if trial in self.study_of else 1
        found = _called(self.theirs.get_trial, trial)
        if not isinstance(found, _Refused) and found.state.is_finished():
            n_values = 2  # right or wrong, it is refused for being finished
        given = values[:n_values] if state in (TrialState.COMPLETE, TrialState.PRUNED) else None
        self.both("set_trial_state_values", trial, state, given)

    @rule(trial=TRIALS, name=st.sampled_from(sorted(DISTRIBUTIONS)))
    def read_trial(self, trial, name):
        for method in (
            "get_trial_number_from_id",
            "get_trial_user_attrs",
            "get_trial_system_attrs",
            "get_trial_params",
        ):
            self.both_alike(method, trial)
        self.both("get_trial_param", trial, name)
        self.both_alike("get_trial", trial)

    @rule(study=STUDIES, states=st.none() | st.lists(STATES, max_size=2), copy=st.booleans())
    def read_study(self, study, states, copy):
        for method in ("get_study_name_from_id", "get_study_directions", "get_study_user_attrs"):
            self.both_alike(method, study)
        self.both_alike("get_study_system_attrs", study)
        self.both_alike("get_all_trials", study, copy, states if states is None else tuple(states))
        self.both("get_n_trials", study, states if states is None else tuple(states))
        self.both("get_trial_id_from_study_id_trial_number", study, 0)
        best = [_called(storage.get_best_trial, study) for storage in (self.theirs, self.ours)]
        assert [getattr(trial, "value", trial) for trial in best[:1]] == [getattr(t, "value", t) for t in best[1:]]

    @rule()
    def every_reader_sees_the_same(self):
        expected = comparable(self.theirs.get_all_studies())
        for storage in (self.ours, *self.others):
            assert comparable(storage.get_all_studies()) == expected
        for study in self.directions:
            expected = comparable(_called(self.theirs.get_all_trials, study))
            for storage in (self.ours, *self.others):
                assert comparable(_called(storage.get_all_trials, study)) == expected
                assert comparable(_called(storage.get_all_trials, study, False)) == expected

    def teardown(self):
        self.every_reader_sees_the_same()

    def both_alike(self, method, *args):
        theirs, ours = (comparable(_called(getattr(storage, method), *args)) for storage in (self.theirs, self.ours))
        assert theirs == ours, (method, args)


def external(distribution):
    """A value of the distribution, as a param."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    return distribution.low


def comparable(found):
    """What was read as something to compare: NaN as itself, times only as present where the clock gave them."""
    if isinstance(found, float) and math.isnan(found):
        return "NaN"
    if isinstance(found, dt.datetime):
        return found if found < dt.datetime(2026, 10, 26) and found.microsecond in (0, 5) else "now"
    if isinstance(found, dict):
        return {name: comparable(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [comparable(value) for value in found]
    if type(found).__name__ == "LazyTrial":
        assert found.intermediate_values is not None
        return ("FrozenTrial", comparable({k: v for k, v in found.__dict__.items() if k != "_load"}))
    if type(found).__name__ in ("FrozenTrial", "FrozenStudy"):
        return (type(found).__name__, comparable(found.__dict__))
    return (type(found).__name__, found)


def _called(method, *args):
    try:
        return method(*args)
    except Exception as error:  # noqa: BLE001 - whatever it is, both are to raise it
        return _Refused(error)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_every_call_does_what_optuna_does(database, another_database, cache):
    url = parse_url(another_database)
    theirs = RDBStorage(
        url.render_as_string(hide_password=False),
        engine_kwargs=engine_options(url, read_only=False, application_name="stock"),
        skip_table_creation=True,
    )
    with ExitStack() as stack:
        ours = [PostgresStorage(database, cache=cached) for cached in (cache, True, False)]
        for storage in (*ours, theirs):
            stack.callback(lambda storage=storage: storage.engine.dispose())

        class OnThese(TwoStorages):
            def __init__(self):
                self.theirs, self.theirs_engine = get_storage(theirs), theirs.engine
                self.ours, self.others = ours[0], tuple(ours[1:])
                super().__init__()

        run_state_machine_as_test(
            OnThese,
            settings=settings(
                max_examples=10,
                stateful_step_count=30,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate, Phase.shrink],  # to explain a failure is to trace each line: 20 times as slow
                suppress_health_check=list(HealthCheck),
            ),
        )
