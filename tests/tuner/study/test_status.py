"""What state a study is in, and how long the rest of it takes."""

import uuid

import pytest
from sqlalchemy import text

from storage import StudyNotFoundError
from storage.coordination import claims, control
from storage.database.sessions import Sessions
from tuner.spec import Budget, ObjectiveSpec, Spec
from tuner.study.joining import create_study
from tuner.study.status import look


def a_study(engine, **budget):
    spec = Spec(
        objective=ObjectiveSpec(name="f", code_hash="0" * 64),
        metric="value",
        direction="minimize",
        budget=Budget(**{"trials": 10, **budget}),
        epochs=1,
    )
    return create_study(engine, uuid.uuid4().hex, spec)


def execute(engine, statement, **values):
    with engine.begin() as conn:
        conn.execute(text(statement), values)


def add_trials(engine, study, state, count, started=1800, ended=600):
    """Add trials that started and ended so many seconds ago."""
    execute(
        engine,
        """
        insert into trials (study_id, number, state, datetime_start, datetime_complete)
        select :study_id, (select count(*) from trials where study_id = :study_id) + n - 1, cast(:state as trialstate),
               timezone('UTC', now()) - :started * interval '1 s', timezone('UTC', now()) - :ended * interval '1 s'
        from generate_series(1, :count) n
        """,
        study_id=study.study_id,
        state=state,
        count=count,
        started=started,
        ended=ended,
    )


def a_running_trial(engine, study):
    return claims.claim(Sessions(engine), study.study_id, study.budget, claims.Holder(worker="gpu-1:7"))


def halt(engine, study, state):
    control.set_state(Sessions(engine), study.study_id, state)


def state_of(engine, study):
    found = look(engine, study)
    return found.state, found.reason


def test_a_study_is_idle_until_a_worker_runs_a_trial_of_it(engine):
    study = a_study(engine)
    assert state_of(engine, study) == ("idle", None)
    held = a_running_trial(engine, study)
    assert state_of(engine, study) == ("running", None)
    execute(engine, "update tuner_leases set expires_at = now() - interval '1 h' where trial_id = :i", i=held.trial_id)
    assert (*state_of(engine, study), look(engine, study).lost) == ("idle", None, 1)


def test_a_study_that_is_halted_says_so_whether_or_not_it_still_runs(engine):
    study = a_study(engine)
    a_running_trial(engine, study)
    halt(engine, study, "paused")
    assert state_of(engine, study) == ("paused", "the study is paused; 'tuner resume' lets it go on")
    halt(engine, study, "stopped")
    assert state_of(engine, study) == ("stopped", "the study was stopped; 'tuner resume' lets it go on")


@pytest.mark.slow
@pytest.mark.parametrize("halted", ["open", "paused", "stopped"])
@pytest.mark.parametrize(
    ("budget", "state", "count", "reason"),
    [
        ({"trials": 3}, "PRUNED", 3, "the budget of 3 trials is used up"),
        ({"max_failures": 1}, "FAIL", 2, "2 trials failed, more than the 1 allowed"),
        ({"timeout_s": 60}, "COMPLETE", 1, "the study's time of 60 s is over"),
    ],
)
def test_a_study_that_no_resuming_helps_is_finished(engine, halted, budget, state, count, reason):
    study = a_study(engine, **budget)
    add_trials(engine, study, state, count)
    execute(engine, "update tuner_studies set created_at = now() - interval '1 h'")
    halt(engine, study, halted)
    assert state_of(engine, study) == ("finished", reason)


def test_the_last_trials_of_a_study_whose_time_is_over_still_run(engine):
    study = a_study(engine, timeout_s=60)
    add_trials(engine, study, "COMPLETE", 1)
    a_running_trial(engine, study)
    execute(engine, "update tuner_studies set created_at = now() - interval '1 h'")
    assert state_of(engine, study) == ("running", "the study's time of 60 s is over")
    assert look(engine, study).left_s is None


def test_the_time_left_is_what_the_rest_takes_at_this_rate(engine):
    study = a_study(engine)
    add_trials(engine, study, "COMPLETE", 4)
    add_trials(engine, study, "FAIL", 1)
    assert look(engine, study).left_s is None  # nothing runs
    a_running_trial(engine, study)
    found = look(engine, study)
    assert found.pace.per_hour == pytest.approx(8, rel=0.01)
    assert found.left_s == pytest.approx(6 * 450, rel=0.01)
    halt(engine, study, "paused")
    assert look(engine, study).left_s is None


def test_the_time_left_is_at_most_the_studys_own(engine):
    study = a_study(engine, timeout_s=4000)
    add_trials(engine, study, "COMPLETE", 4)
    a_running_trial(engine, study)
    execute(engine, "update tuner_studies set created_at = now() - interval '3000 s'")
    assert look(engine, study).left_s == pytest.approx(1000, abs=10)


def test_there_is_no_time_left_to_tell_before_any_trial_is_done(engine):
    study = a_study(engine)
    a_running_trial(engine, study)
    found = look(engine, study)
    assert (found.pace.per_hour, found.left_s) == (0, None)


def test_a_study_that_was_deleted_is_not_found(engine):
    study = a_study(engine)
    control.delete_study(Sessions(engine), study.study_id)
    with pytest.raises(StudyNotFoundError, match="was deleted"):
        look(engine, study)
