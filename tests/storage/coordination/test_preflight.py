"""A study's pre-flight: due once, and one at a time."""

import optuna
import pytest

from storage import open_engine, open_storage
from storage.coordination import preflight, studies
from storage.database.sessions import Sessions


@pytest.fixture
def engine(database):
    engine = open_engine(database)
    yield engine
    engine.dispose()


@pytest.fixture
def study_id(engine):
    return studies.create_study(engine, "one", "maximize", {}, {}, "value").study_id


def test_it_is_due_until_it_is_recorded_for_this_code(engine, study_id):
    sessions = Sessions(engine)
    assert preflight.is_due(sessions, study_id, "a", "a")
    preflight.record(sessions, study_id, "a", ["no program"])
    assert not preflight.is_due(sessions, study_id, "a", "a")
    assert preflight.is_due(sessions, study_id, "b", "a")
    preflight.record(sessions, study_id, "b", [])
    assert not preflight.is_due(sessions, study_id, "b", "a")


@pytest.mark.parametrize(("state", "is_due"), [("WAITING", True), ("COMPLETE", False), ("FAIL", False)])
def test_trials_that_ran_have_tried_the_studys_own_code(engine, database, study_id, state, is_due):
    value = 1.0 if state == "COMPLETE" else None
    trial = optuna.trial.create_trial(state=optuna.trial.TrialState[state], value=value)
    optuna.load_study(study_name="one", storage=open_storage(database)).add_trial(trial)
    assert preflight.is_due(Sessions(engine), study_id, "a", "a") == is_due
    assert preflight.is_due(Sessions(engine), study_id, "b", "a")


def test_one_has_the_turn_until_its_block_or_its_connection_ends(engine, database, study_id):
    theirs = open_engine(database)
    with preflight.turn(engine, study_id) as mine, preflight.turn(theirs, study_id) as other:
        assert (mine, other) == (True, False)
    with preflight.turn(engine, study_id), preflight.turn(theirs, study_id + 1) as of_another:
        assert of_another
    with pytest.raises(KeyboardInterrupt), preflight.turn(engine, study_id):
        raise KeyboardInterrupt
    with preflight.turn(theirs, study_id) as mine:
        assert mine
    theirs.dispose()


def test_it_goes_with_the_study(engine, study_id):
    preflight.record(Sessions(engine), study_id, "a", [])
    assert studies.delete_if_unused(engine, study_id)
