"""Studies of other Optuna storages, as they are here once imported: compared with what Optuna reads from the source."""

import math
import os
import signal
import sqlite3
import time
from contextlib import closing

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from origins import PARAMS, SPACE, a_journal, here, imported, set_up_every_kind
from sqlalchemy import event, func, select

from storage import PostgresStorage, StudyExistsError, StudyNotFoundError, open_engine, open_storage
from storage.coordination import claims, records, standings, studies
from storage.database.sessions import Sessions
from storage.database.tables import tuner_curves
from storage.importing.sources import Source, open_source
from storage.importing.studies import IMPORTED_FROM, import_studies
from storage.trials.curves import CurvePoint, curves


def comparable(trial):
    """All of a trial but its id, in which NaN is equal to NaN, and True is not 1."""
    fields = {name: value for name, value in sorted(vars(trial).items()) if name != "_trial_id"}
    return repr({**fields, "intermediate_values": sorted(trial.intermediate_values.items())})  # Optuna's come unordered


def counts(result):
    return result.copied, result.updated, result.already_there, result.unfinished


@pytest.mark.slow
@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin"])
def test_a_study_arrives_as_it_is_from_every_kind_of_storage(origin, target, monkeypatch, zone):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        theirs = set_up_every_kind(origin)
        (result,) = imported(origin, target)
        study, trials = here(target, theirs.study_name)
        assert [comparable(trial) for trial in trials] == [comparable(trial) for trial in theirs.trials]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert [trial.number for trial in trials] == list(range(11))
    assert counts(result) == (11, 0, 0, 2)
    assert result.changes == ()
    assert study.directions == theirs.directions
    assert study.user_attrs == theirs.user_attrs
    assert study.system_attrs.pop(IMPORTED_FROM)["study"] == theirs.study_name
    assert study.system_attrs == theirs._storage.get_study_system_attrs(theirs._study_id)


@pytest.mark.slow
def test_a_study_that_was_imported_gains_what_is_new_and_nothing_else(origin, target):
    theirs = origin.study()
    theirs.add_trials([create_trial(value=float(number)) for number in range(3)])
    assert counts(imported(origin, target)[0]) == (3, 0, 0, 0)
    before = [comparable(trial) for trial in here(target)[1]]
    assert counts(imported(origin, target)[0]) == (0, 0, 3, 0)
    assert [comparable(trial) for trial in here(target)[1]] == before
    theirs.add_trials([create_trial(value=4.0), create_trial(value=5.0)])
    assert counts(imported(origin, target)[0]) == (2, 0, 3, 0)
    assert [comparable(trial) for trial in here(target)[1]] == [comparable(trial) for trial in theirs.trials]


@pytest.mark.slow
def test_a_running_trial_waits_here_until_it_is_found_finished(origin, target):
    theirs = origin.study()
    trial = theirs.ask(SPACE)
    trial.report(0.5, 0)
    assert counts(imported(origin, target)[0]) == (1, 0, 0, 1)
    (waiting,) = here(target)[1]
    assert (waiting.state, waiting.params, waiting.intermediate_values) == (TrialState.WAITING, trial.params, {})
    trial.set_user_attr("later", 1)
    assert counts(imported(origin, target)[0]) == (0, 1, 0, 1)
    assert here(target)[1][0].user_attrs == {"later": 1}
    assert counts(imported(origin, target)[0]) == (0, 0, 1, 1)
    theirs.tell(trial, 0.25)
    assert counts(imported(origin, target)[0]) == (0, 1, 0, 0)
    assert [comparable(trial) for trial in here(target)[1]] == [comparable(trial) for trial in theirs.trials]
    assert counts(imported(origin, target)[0]) == (0, 0, 1, 0)


def test_a_trial_that_was_run_here_meanwhile_stays_as_it_is(journal, target):
    theirs = journal.study()
    trial = theirs.ask(SPACE)
    imported(journal, target)
    ours = optuna.load_study(study_name="s", storage=open_storage(target.url))
    ours.optimize(lambda _: 7.0, n_trials=1)
    theirs.tell(trial, 0.25)
    (result,) = imported(journal, target)
    assert here(target)[1][0].value == 7.0
    assert counts(result) == (0, 0, 1, 0)
    assert [(change.trial, change.what) for change in result.changes] == [
        (0, "it was run here since, and stays as it is")
    ]
    ours._storage.engine.dispose()


@pytest.mark.slow
def test_a_complete_trial_whose_value_is_nan_is_failed_here(origin, target):
    theirs = origin.study()
    theirs.add_trial(create_trial(value=1.0))
    trial = create_trial(value=2.0, params=PARAMS, distributions={name: SPACE[name] for name in PARAMS})
    trial.values = [math.nan]
    origin.storage.create_new_trial(theirs._study_id, trial)
    (result,) = imported(origin, target)
    failed = here(target)[1][1]
    assert (failed.state, failed.values, failed.params) == (TrialState.FAIL, None, PARAMS)
    assert records.count_failures(target, studies.find_study(target, "s").study_id)["nan"][0] == 1
    assert "NaN" in failed.user_attrs["failure_message"]
    assert [change.trial for change in result.changes] == [1]
    assert counts(imported(origin, target)[0]) == (0, 0, 2, 0)


def test_what_our_tables_cannot_hold_is_left_out_and_told(journal, target):
    study = journal.study()
    study.set_user_attr("k" * 513, 1)
    journal.storage.create_new_trial(
        study._study_id,
        create_trial(
            value=1.0,
            params={"x": 0.5, "p" * 513: 0.5},
            distributions={"x": FloatDistribution(0, 1), "p" * 513: FloatDistribution(0, 1)},
            user_attrs={"a\0b": 1, "fine": 2},
            intermediate_values={2**31: 0.1, 1: 0.2},
        ),
    )
    (result,) = imported(journal, target)
    (trial,) = here(target)[1]
    assert (trial.params, trial.user_attrs, trial.intermediate_values) == ({"x": 0.5}, {"fine": 2}, {1: 0.2})
    assert sorted((change.trial is None, change.what[:17]) for change in result.changes) == [
        (False, "left out: a param"),
        (False, "left out: a step "),
        (False, "left out: an attr"),
        (True, "left out: an attr"),
    ]


def test_numbers_that_are_not_dense_are_given_anew_and_told(sqlite, target):
    study = sqlite.study()
    study.add_trials([create_trial(value=float(number)) for number in range(4)])
    with closing(sqlite3.connect(sqlite.storage.engine.url.database)) as conn, conn:
        conn.execute("UPDATE trials SET number = 1 WHERE number = 2")
        conn.execute("UPDATE trials SET number = 7 WHERE number = 3")
    (result,) = imported(sqlite, target)
    found = [(trial.number, trial.value, trial.system_attrs) for trial in here(target)[1]]
    assert found == [
        (0, 0.0, {}),
        (1, 1.0, {}),
        (2, 2.0, {"tuner:source_number": 1}),
        (3, 3.0, {"tuner:source_number": 7}),
    ]
    assert [change.trial for change in result.changes] == [2, 3]
    study.add_trial(create_trial(value=4.0))
    assert counts(imported(sqlite, target)[0]) == (1, 0, 4, 0)


def test_a_name_that_another_study_has_is_refused_before_anything_is_written(journal, target):
    journal.study("first").add_trial(create_trial(value=1.0))
    journal.study("taken").add_trial(create_trial(value=1.0))
    storage = open_storage(target.url)
    optuna.create_study(study_name="taken", storage=storage).add_trial(create_trial(value=2.0))
    storage.engine.dispose()
    with pytest.raises(StudyExistsError, match=r"'taken' in .* was not imported from there; --study NAME --as NEWNAME"):
        imported(journal, target)
    assert [summary.study.name for summary in studies.summaries(target)] == ["taken"]
    assert [trial.value for trial in here(target, "taken")[1]] == [2.0]
    assert imported(journal, target, "taken", new_name="theirs")[0].study == "theirs"
    assert [trial.value for trial in here(target, "theirs")[1]] == [1.0]
    assert counts(imported(journal, target, "taken", new_name="theirs")[0]) == (0, 0, 1, 0)


def test_a_study_of_the_same_name_from_elsewhere_is_another_one(journal, target, tmp_path):
    journal.study().add_trial(create_trial(value=1.0))
    imported(journal, target)
    other = a_journal(tmp_path / "other.log")
    study = other.study()
    with pytest.raises(StudyExistsError, match=r"was imported from study 's' of journal:.*journal\.log"):
        imported(other, target)
    study.add_trial(create_trial(value=2.0))
    with pytest.raises(StudyExistsError, match=r"has another trial 0 than journal:.*other\.log"):
        imported(other, target)
    assert [trial.value for trial in here(target)[1]] == [1.0]


def test_a_source_that_moved_is_recognised_by_its_trials(journal, target, tmp_path):
    journal.study().add_trial(create_trial(value=1.0))
    imported(journal, target)
    moved = (tmp_path / "journal.log").rename(tmp_path / "moved.log")
    assert counts(imported(a_journal(moved), target)[0]) == (0, 0, 1, 0)
    assert here(target)[0].system_attrs[IMPORTED_FROM]["url"] == f"journal:{moved}"


def test_what_was_noted_here_survives_the_next_import(journal, target):
    study = journal.study()
    study.set_user_attr("note", "theirs")
    imported(journal, target)
    storage = open_storage(target.url)
    storage.set_study_user_attr(storage.get_study_id_from_name("s"), "note", "ours")
    storage.engine.dispose()
    study.set_user_attr("more", 1)
    imported(journal, target)
    assert here(target)[0].user_attrs == {"note": "ours", "more": 1}


def many(journal, count):
    """Give a journal a study of so many trials, faster than Optuna does."""
    study = journal.study()
    moment = "2026-01-02T03:04:05.000006+00:00"
    journal.storage._backend.append_logs(
        [
            {
                "op_code": 4,
                "worker_id": "w",
                "study_id": study._study_id,
                "state": 1,
                "value": float(number),
                "datetime_start": moment,
                "datetime_complete": moment,
                "intermediate_values": {"0": 0.5, "1": 0.25},
            }
            for number in range(count)
        ]
    )
    return study


IMPORT_AND_HANG = """
import sys
from storage import open_engine
from storage.importing.studies import import_studies
from storage.importing.sources import open_source

def hang(study, done, total):
    if done >= 1000:
        print(done, flush=True)
        sys.stdin.read()

with open_source(sys.argv[1]) as source:
    import_studies(source, open_engine(sys.argv[2]), progress=hang)
"""


@pytest.mark.slow
def test_an_import_that_was_killed_goes_on_where_it_was(journal, target, database, start_python):
    theirs = many(journal, 2500)
    process = start_python(IMPORT_AND_HANG, journal.url, database)
    assert process.stdout.readline() == "1000\n"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [trial.number for trial in here(target)[1]] == list(range(1000))
    assert counts(imported(journal, target)[0]) == (1500, 0, 1000, 0)
    assert [comparable(trial) for trial in here(target)[1]] == [comparable(trial) for trial in theirs.trials]


class Interrupted(Source):
    """A source that lets something else happen before its trials are read."""

    def __init__(self, source, happen):
        self.shown = source.shown
        self.studies, self.stamps = source.studies, source.stamps
        self._source, self._happen = source, happen

    def studies(self):
        raise NotImplementedError

    def stamps(self, study_id):
        raise NotImplementedError

    def trials(self, trial_ids):
        self._happen()
        return self._source.trials(trial_ids)


def test_two_imports_at_once_copy_each_trial_once(journal, target):
    theirs = many(journal, 5)
    with open_source(journal.url) as source:
        other = Interrupted(source, lambda: imported(journal, target))
        (result,) = import_studies(other, target)
    assert [comparable(trial) for trial in here(target)[1]] == [comparable(trial) for trial in theirs.trials]
    assert counts(result) == (0, 0, 5, 0)


def test_somebody_who_adds_trials_meanwhile_is_not_overwritten(journal, target):
    many(journal, 5)
    storage = open_storage(target.url)

    def add():
        storage.create_new_trial(storage.get_study_id_from_name("s"), create_trial(value=9.0))

    with open_source(journal.url) as source, pytest.raises(StudyExistsError, match="somebody else writes to study 's'"):
        import_studies(Interrupted(source, add), target)
    assert [trial.value for trial in here(target)[1]] == [9.0]
    storage.engine.dispose()


def test_a_study_deleted_meanwhile_is_told(journal, target):
    many(journal, 5)
    storage = open_storage(target.url)

    def delete():
        storage.delete_study(storage.get_study_id_from_name("s"))

    with open_source(journal.url) as source, pytest.raises(StudyNotFoundError, match="was deleted while it was import"):
        import_studies(Interrupted(source, delete), target)
    storage.engine.dispose()


def test_the_number_of_statements_does_not_grow_with_the_trials(journal, target):
    seen = []
    event.listen(target, "before_cursor_execute", lambda *arguments: seen.append(arguments[2]))
    study = many(journal, 2)
    imported(journal, target)
    few = len(seen)
    optuna.delete_study(study_name="s", storage=journal.storage)
    seen.clear()
    many(journal, 900)
    imported(journal, target, new_name="many")
    assert study.study_name == "s"
    assert len(seen) == few


def test_the_curves_of_another_tuner_database_come_along(another_database, target):
    budget = standings.Budget(trials=9, timeout_s=None, max_failures=3, max_attempts=2)
    details = {"train_loss": 0.1, "seconds": 2.5, "rates": (1e-7, None), "metrics": {"f1": 5e-324, "odd": None}}
    epochs = [CurvePoint(step=step, value=0.5, **details, train_metrics={"f1": 1.0}) for step in (1, 2)]
    elsewhere = PostgresStorage(another_database)
    study_id = studies.create_study(elsewhere.engine, "s", "maximize", {"version": 1}, {}, "f1").study_id
    studies.create_study(target, "other", "maximize", {"version": 1}, {}, "f1")  # other ids than there
    for values in ([0.5], None):
        held = claims.claim(elsewhere.sessions, study_id, budget, claims.Holder(worker="test"))
        elsewhere.hold(held)
        for point in epochs:
            elsewhere.report(held.trial_id, point)
        if values is not None:
            elsewhere.set_trial_state_values(held.trial_id, TrialState.COMPLETE, values)
    for _ in range(2):
        with open_source(another_database) as source:
            import_studies(source, target)
    with target.connect() as conn:
        assert curves(conn, studies.find_study(target, "s").study_id) == {
            0: epochs
        }  # the other one waits, without what it had reported
        assert conn.scalar(select(func.count()).select_from(tuner_curves)) == 2
    elsewhere.engine.dispose()


@pytest.mark.parametrize("history", [None, [{"number": 0, "value": 0.5, "params": {"lr": 0.1}}]])
def test_a_study_of_another_tuner_database_keeps_its_spec_and_history(database, another_database, target, history):
    spec = {"version": 1, "budget": {"trials": 3}}
    elsewhere = open_engine(another_database)
    created = studies.create_study(elsewhere, "s", "maximize", spec, {"metric": "accuracy"}, "accuracy", history)
    elsewhere.dispose()
    with open_source(another_database) as source:
        import_studies(source, target)
        import_studies(source, target)
    found = studies.find_study(target, "s")
    assert (found.spec, found.created_at, found.metrics) == (spec, created.created_at, ("accuracy",))
    assert studies.history(Sessions(target), found.study_id) == (history or [])


def test_the_pickles_of_a_sampler_stay_where_they_are(journal, target):
    """Optuna's CMA-ES unpickles them in every process that samples, whoever wrote them."""
    study = journal.study()
    kept = {"grid_id": 3}
    for name in ("cma:optimizer:0", "sepcma:optimizer:12", "cmawm:optimizer:1", "cma:generation"):
        study.add_trial(create_trial(value=1.0, system_attrs={name: "80", **kept}))
    for _ in range(2):
        (result,) = imported(journal, target)
    assert [trial.system_attrs for trial in here(target)[1]] == [kept] * 4
    assert counts(result) == (0, 0, 4, 0)
