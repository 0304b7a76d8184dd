"""A row that another program or a hand has left: skipped with one warning that names it, whatever is read."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from optuna_dashboard import wsgi
from sqlalchemy import text

from storage import InvalidWriteError, PostgresStorage
from storage.coordination.records import best_trial, find_trial, list_trials
from storage.coordination.standings import Budget, Standing
from storage.database import foreign
from storage.trials.curves import curves, slowest_epoch_s

if TYPE_CHECKING:
    from collections.abc import Iterator

DEEP = "[" * 100_000 + "]" * 100_000
LONG = "1" * 5000
JSON_TEXTS = [DEEP, LONG, "[" * 101 + "]" * 101, '{"a":' * 500 + "1" + "}" * 500, "", "1,2", "1],[2", "nul", '"a', None]
SPACE = {"x": FloatDistribution(0, 1), "n": IntDistribution(1, 8, log=True), "c": CategoricalDistribution(["a", "b"])}
FLOAT = '{"name": "FloatDistribution", "attributes": {"low": %s, "high": %s, "log": false, "step": null}}'
BAD_PARAMS = [
    ("distribution_json", FLOAT % (2, 1)),
    ("distribution_json", FLOAT % (0, "1" * 1000)),
    ("distribution_json", FLOAT % (0, "NaN")),
    ("distribution_json", FLOAT % (0, '"1"')),
    ("distribution_json", '{"name": "NoDistribution", "attributes": {}}'),
    ("distribution_json", '{"name": "FloatDistribution"}'),
    ("distribution_json", '{"name": "CategoricalDistribution", "attributes": {"choices": []}}'),
    ("distribution_json", '{"name": "CategoricalDistribution", "attributes": {"choices": 3}}'),
    ("distribution_json", '"FloatDistribution"'),
    ("distribution_json", "[]"),
    ("distribution_json", "[" * 1000),
    ("param_value", None),
    ("param_value", math.nan),
    ("param_value", math.inf),
    ("param_value", -1.0),
]


pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")


class Told(logging.Handler):
    """What is told since it was last asked."""

    def __init__(self) -> None:
        super().__init__()
        self._messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())

    def __call__(self) -> list[str]:
        said, self._messages = self._messages, []
        foreign._told.clear()
        return said


@pytest.fixture
def told() -> Iterator[Told]:
    told = Told()
    logger = logging.getLogger("storage.database.foreign")
    logger.addHandler(told)
    told()
    yield told
    logger.removeHandler(told)


def a_study(storage: PostgresStorage) -> optuna.Study:
    """Five trials, the last of them the best."""
    study = optuna.create_study(storage=storage, sampler=optuna.samplers.TPESampler(n_startup_trials=2, seed=1))
    for number in range(5):
        trial = create_trial(
            value=-float(number),
            params={"x": 0.5, "n": 2, "c": "b"},
            distributions=SPACE,
            user_attrs={"note": "kept", "other": number},
            intermediate_values={0: 1.0},
        )
        study.add_trial(trial)
    return study


def spoil(storage: PostgresStorage, statement: str, **values: Any) -> None:
    with storage.engine.begin() as conn:
        assert conn.execute(text(statement), values).rowcount == 1


def goes_on(storage: PostgresStorage, study: optuna.Study, *, is_skipped: bool, told: Told) -> str:
    """The other trials are read, shown and learnt from, by whoever does."""
    expected = [0, 1, 2, 3] if is_skipped else [0, 1, 2, 3, 4]
    # a fresh object, as a worker that starts
    fresh = optuna.load_study(study_name=study.study_name, storage=PostgresStorage(storage.engine.url))
    assert [trial.number for trial in fresh.trials if trial.number < 5] == expected
    assert [one.number for one in list_trials(storage.engine, study._study_id) if one.number < 5] == expected
    assert fresh.best_trial.number == expected[-1]
    best = best_trial(storage.engine, study._study_id, "minimize")
    assert best is not None
    assert best.number == expected[-1]
    assert (find_trial(storage.engine, study._study_id, 4) is None) is is_skipped
    assert status(storage, f"/api/studies/{study._study_id}") == 200
    fresh.sampler = study.sampler
    trial = fresh.ask(SPACE)
    fresh.tell(trial, state=TrialState.FAIL)
    fresh._storage.engine.dispose()
    (message,) = told()
    return message


def status(storage: PostgresStorage, path: str) -> int:
    """What optuna-dashboard answers."""
    found: list[str] = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "HTTP_ACCEPT_ENCODING": "identity", "SERVER_NAME": "x"}
    b"".join(wsgi(storage)(environ, lambda status, *_: found.append(status)))
    return int(found[0][:3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x", "n", "c"])
def test_a_trial_with_a_param_that_cannot_be_read_is_skipped(storage: PostgresStorage, told: Told, name: str) -> None:
    study = a_study(storage)
    trial_id = study.trials[4]._trial_id
    bad = "update trial_params set {} = :bad where trial_id = :trial_id and param_name = :name"
    good = "select distribution_json, param_value from trial_params where trial_id = :trial_id and param_name = :name"
    with storage.engine.connect() as conn:
        before = conn.execute(text(good), {"trial_id": trial_id, "name": name}).one()
    for column, value in BAD_PARAMS:
        if (column, value, name) == ("param_value", -1.0, "x") or (column != "param_value" and name != "x"):
            continue  # out of its range, as what somebody enqueued may be; or the same for all kinds
        spoil(storage, bad.format(column), bad=value, trial_id=trial_id, name=name)
        message = goes_on(storage, study, is_skipped=True, told=told)
        assert f"trial of id {trial_id}" in message
        assert repr(name) in message
        for key, old in before._mapping.items():
            spoil(storage, bad.format(key), bad=old, trial_id=trial_id, name=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["user", "system"])
def test_an_attribute_of_a_trial_that_cannot_be_read_is_skipped(
    storage: PostgresStorage, told: Told, kind: str
) -> None:
    study = a_study(storage)
    trial_id = study.trials[4]._trial_id
    insert = "insert into trial_{}_attributes (trial_id, key, value_json) values (:trial_id, 'bad', :bad)"
    delete = "delete from trial_{}_attributes where trial_id = :trial_id and key = 'bad'"
    for value in JSON_TEXTS:
        spoil(storage, insert.format(kind), trial_id=trial_id, bad=value)
        message = goes_on(storage, study, is_skipped=False, told=told)
        assert "'bad'" in message
        assert f"id {trial_id}" in message
        assert storage.get_trial(trial_id).user_attrs == {"note": "kept", "other": 4}
        told()
        spoil(storage, delete.format(kind), trial_id=trial_id)


BAD_ROWS = {
    "too few values": "delete from trial_values where trial_id = :trial_id",
    "too many values": "insert into trial_values (trial_id, objective, value, value_type) values"
    " (:trial_id, 1, 0.5, 'FINITE')",
    "no number": "update trials set number = null where trial_id = :trial_id",
    "a negative number": "update trials set number = -7 where trial_id = :trial_id",
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_trial_that_is_not_as_its_state_says_is_skipped(storage: PostgresStorage, told: Told, fault: str) -> None:
    study = a_study(storage)
    trial_id = study.trials[4]._trial_id
    spoil(storage, BAD_ROWS[fault], trial_id=trial_id)
    fresh = optuna.load_study(study_name=study.study_name, storage=PostgresStorage(storage.engine.url))
    assert [trial.number for trial in fresh.trials] == [0, 1, 2, 3]
    assert fresh.best_trial.number == 3
    assert status(storage, f"/api/studies/{study._study_id}") == 200
    (message,) = told()
    assert f"trial of id {trial_id}" in message
    list_trials(storage.engine, study._study_id)
    fresh._storage.engine.dispose()


ODD_ROWS = [
    "update trial_intermediate_values set intermediate_value = null where trial_id = :trial_id",
    "update trial_values set value = null where trial_id = :trial_id",
    "update trials set datetime_start = 'infinity', datetime_complete = '-infinity' where trial_id = :trial_id",
    "update trials set datetime_start = '4000-01-01 BC', datetime_complete = '9999-12-31' where trial_id = :trial_id",
]


@pytest.mark.parametrize("statement", ODD_ROWS)
def test_what_is_not_known_of_a_trial_keeps_nobody_from_the_others(
    storage: PostgresStorage, told: Told, statement: str
) -> None:
    study = a_study(storage)
    spoil(storage, statement, trial_id=study.trials[2]._trial_id)
    fresh = optuna.load_study(study_name=study.study_name, storage=PostgresStorage(storage.engine.url))
    assert [trial.number for trial in fresh.trials] == [0, 1, 2, 3, 4]
    assert [trial.intermediate_values for trial in fresh.trials if trial.number != 2] == [{0: 1.0}] * 4
    assert len(list_trials(storage.engine, study._study_id)) == 5
    assert status(storage, f"/api/studies/{study._study_id}") == 200
    assert told() == []
    fresh._storage.engine.dispose()


def test_an_attribute_of_a_study_that_cannot_be_read_is_skipped(storage: PostgresStorage, told: Told) -> None:
    study = a_study(storage)
    study.set_user_attr("kept", 1)
    other = optuna.create_study(storage=storage, study_name="none left")
    spoil(storage, "delete from study_directions where study_id = :study_id", study_id=other._study_id)
    for value in JSON_TEXTS:
        study.set_user_attr("bad", 0)
        spoil(storage, "update study_user_attributes set value_json = :bad where key = 'bad'", bad=value)
        told()
        assert study.user_attrs == {"kept": 1}
        (message,) = told()
        assert "'bad'" in message
        (summary,) = optuna.get_all_study_summaries(storage)
        assert summary.user_attrs == {"kept": 1}
        assert ["'bad'" in one or "'none left'" in one for one in told()] == [True, True]
        assert status(storage, "/api/studies") == 200


def test_details_of_an_epoch_are_read_as_far_as_they_are_some(storage: PostgresStorage) -> None:
    study = a_study(storage)
    insert = "insert into tuner_curves (trial_id, step, epoch) values (:trial_id, 0, cast(:epoch as json))"
    odd = [
        "[]",
        f'{{"seconds": {LONG}}}',
        "{}",
        '{"rates": 3, "metrics": [1], "more": 1, "seconds": "long", "train_loss": {}}',
        '{"rates": ["a"], "metrics": {"a": "b"}, "seconds": 1e5000, "train_loss": 1e400}',
    ]
    for trial, epoch in zip(study.trials, odd, strict=True):
        spoil(storage, insert, trial_id=trial._trial_id, epoch=epoch)
    with storage.engine.connect() as conn:
        found = curves(conn, study._study_id)
        assert [points[0].value for points in found.values()] == [1.0] * 5
        assert not any(points[0].train_loss or points[0].seconds for points in found.values())
        assert slowest_epoch_s(conn, study._study_id) == 0


@pytest.mark.parametrize(
    "found", [[], 3, {"trials": "many"}, {"trials": None}, {"more": 1}, {"timeout_s": {}}, {"max_failures": 1e400}]
)
def test_a_budget_that_is_none_leaves_the_one_that_is_known(told: Told, found: Any) -> None:
    known = Budget(trials=3, timeout_s=None, max_failures=1, max_attempts=2)
    standing = Standing(
        state="open", age_s=1, budget=found, n_trials=0, running=0, waiting=0, failed=0, cancelled=0,
        oldest_waiting=None, expired=0,
    )  # fmt: skip
    assert standing.now_of(known) == known
    assert len(told()) == 1
    raised = replace(standing, budget={"trials": 5, "timeout_s": 2.5, "max_failures": 7})
    assert raised.now_of(known) == Budget(trials=5, timeout_s=2.5, max_failures=7, max_attempts=2)
    assert told() == []


def test_what_would_not_be_read_again_is_refused_when_it_is_written(storage: PostgresStorage) -> None:
    study = a_study(storage)
    deep: list[Any] = []
    for _ in range(foreign.MAX_JSON_DEPTH):
        deep = [deep]
    for value in (deep, "x" * foreign.MAX_JSON_BYTES):
        for keep in (study.set_user_attr, study.ask().set_user_attr):
            with pytest.raises(InvalidWriteError, match="attribute"):
                keep("key", value)
    study.set_user_attr("key", deep[0])
    assert study.user_attrs == {"key": deep[0]}


def test_warnings_come_to_an_end(told: Told) -> None:
    for number in range(1000):
        foreign.skipped(f"the trial of id {number}", "it is odd")
        foreign.skipped(f"the trial of id {number}", "it is odd")
    assert len(told()) == 101
