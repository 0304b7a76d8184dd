"""Confirming a study: which trials are run again, as what, how often, and which is exported then."""

from __future__ import annotations

import datetime as dt
import threading
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from storage.coordination import claims, control, standings
from storage.coordination.claims import Claim
from storage.coordination.records import TrialRecord, list_trials
from storage.coordination.standings import NothingToClaim
from storage.database.sessions import Sessions
from tuner.errors import TunerError, UsageError
from tuner.seeds import derive_seed
from tuner.spec import Budget, ObjectiveSpec, PrunerSpec, SamplerSpec, Spec
from tuner.study.confirming import (
    candidates_of,
    choose,
    confirmation_of,
    enqueue_runs,
    find_companion,
    is_anything_due,
    open_confirmable,
    pick,
)
from tuner.study.extending import Amount, extend_study
from tuner.study.joining import Study, create_study, open_study
from tuner.study.status import look

SPACE = {"x": FloatDistribution(0, 9)}


def a_study(engine, storage, values=(0.5, 0.9, 0.7, 0.8)) -> Study:
    """A study with complete trials of these values and of params of their own."""
    spec = Spec(
        objective=ObjectiveSpec(name="f.py:f", code_hash="0" * 64),
        metric="value",
        direction="maximize",
        sampler=SamplerSpec(name="tpe"),
        budget=Budget(trials=4, timeout_s=60.0, max_failures=1),
        epochs=3,
        seed=7,
    )
    study = create_study(engine, "s", spec)
    theirs = optuna.load_study(study_name="s", storage=storage)
    for number, value in enumerate(values):
        theirs.add_trial(create_trial(value=value, params={"x": number}, distributions=SPACE))
    return study


def confirm(engine, study: Study, top=2, seeds=2) -> Study:
    return enqueue_runs(engine, study, candidates_of(engine, study, top), seeds, "0" * 64)


def claim(engine, study: Study) -> Claim | NothingToClaim:
    return claims.claim(Sessions(engine), study.study_id, study.budget, claims.Holder(worker="test"))


def run(engine, storage, companion: Study, value_of=lambda trial: float(trial.user_attrs["confirms"])) -> list[Any]:
    """Run what waits as a slot does: what `value_of` gives is the value, None a failure; the records afterwards."""
    theirs = optuna.load_study(study_name=companion.name, storage=storage)
    while isinstance(held := claim(engine, companion), Claim):
        storage.hold(held)
        trial = optuna.Trial(theirs, held.trial_id)
        trial.suggest_float("x", 0, 9)
        value = value_of(storage.get_trial(held.trial_id))
        if isinstance(value, str):
            storage.set_trial_user_attrs(held.trial_id, {"failure": value})
        state = TrialState.FAIL if isinstance(value, str) else TrialState.COMPLETE
        theirs.tell(trial, None if isinstance(value, str) else value, state)
        storage.let_go(held)
    assert held.final
    return list_trials(engine, companion.study_id)


def a_record(number: int, value: float | None, state: Any = "COMPLETE", **params: Any) -> TrialRecord:
    return TrialRecord(
        trial_id=number, number=number, state=state, value=value, started_at=None, ended_at=None, params=params
    )


def test_the_best_are_picked_each_with_params_of_its_own():
    trials = [
        a_record(0, 0.5, x=1),
        a_record(1, 0.9, x=2),
        a_record(2, 0.9, x=2),
        a_record(3, 0.95, "PRUNED", x=3),
        a_record(4, float("inf"), x=4),
        a_record(5, None, "FAIL", x=5),
        a_record(6, 0.7, x=6),
    ]
    assert [trial.number for trial in pick(trials, "maximize", 2)] == [1, 6]
    assert [trial.number for trial in pick(trials, "minimize", 9)] == [0, 6, 1]


def test_the_runs_are_trials_of_a_study_of_the_same_spec_on_seeds_of_their_own(engine, storage):
    study = a_study(engine, storage)
    companion = confirm(engine, study)
    assert (companion.name, companion.spec.confirms.study) == ("s/confirm", "s")
    kept = {"sampler", "pruner", "budget", "confirms"}
    assert companion.spec.model_dump(exclude=kept) == study.spec.model_dump(exclude=kept)
    assert (companion.spec.pruner, companion.spec.budget) == (
        PrunerSpec(name="none"),
        Budget(trials=4, max_failures=4),
    )
    ran = run(engine, storage, companion)
    assert [(trial.params["x"], trial.user_attrs["confirms"]) for trial in ran] == [(1, 1), (3, 3), (1, 1), (3, 3)]
    of_the_search = {study.spec.trial_seed(number) for number in range(100)}
    of_the_runs = {companion.spec.trial_seed(number) for number in range(100)}
    assert (len(of_the_search | of_the_runs), study.spec.trial_seed(0)) == (200, derive_seed(7, "trial", 0))


def test_no_claim_creates_a_trial_whatever_fails(engine, storage):
    companion = confirm(engine, a_study(engine, storage))
    first = claim(engine, companion)
    assert isinstance(first, Claim)
    others = [claim(engine, companion) for _ in range(3)]
    waits = claim(engine, companion)
    assert isinstance(waits, NothingToClaim)
    assert (waits.final, waits.reason) == (False, "4 running trials are the last enqueued ones")
    why = claims.GivenBack(outcome="released", reason="by hand", counts=False)
    assert claims.release(Sessions(engine), first, why, 3)
    again = claim(engine, companion)
    assert isinstance(again, Claim)
    assert (again.number, [held.number for held in others]) == (0, [1, 2, 3])
    with engine.begin() as conn:
        conn.exec_driver_sql("update trials set state = 'FAIL' where state = 'RUNNING'")
    ended = claim(engine, companion)
    assert isinstance(ended, NothingToClaim)
    assert (ended.final, ended.limit, ended.reason) == (True, None, "all trials that were enqueued have run")
    assert look(engine, companion).state == "finished"


def test_a_trial_that_another_program_takes_at_that_moment_is_replaced_by_no_new_one(engine, storage):
    companion = confirm(engine, a_study(engine, storage), top=1)
    with engine.begin() as conn:
        seen = standings.standing_of(conn, companion.study_id)
        conn.exec_driver_sql("update trials set state = 'RUNNING' where state = 'WAITING'")  # without the study's lock
        refused = claims._hand_out(conn, companion.study_id, seen, claims.Holder(worker="test"))
    assert isinstance(refused, NothingToClaim)
    assert (refused.final, refused.reason) == (False, "another program has taken the trial that waited")
    assert standings.look(Sessions(engine), companion.study_id).n_trials == 2


def test_again_it_adds_what_is_missing_and_makes_up_for_failures_but_not_for_what_diverged(engine, storage):
    study = a_study(engine, storage)
    assert is_anything_due(engine, study, candidates_of(engine, study, 2), 2)
    companion = confirm(engine, study)
    assert confirm(engine, study) == companion
    assert standings.look(Sessions(engine), companion.study_id).waiting == 4
    ran = run(engine, storage, companion, lambda trial: {0: "oom", 1: "nan"}.get(trial.number, 0.5))
    assert [trial.state for trial in ran] == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert is_anything_due(engine, study, candidates_of(engine, study, 2), 2)
    again = confirm(engine, study)
    assert again.spec.budget.trials == 3
    ran = run(engine, storage, again)
    assert [trial.user_attrs["confirms"] for trial in ran] == [1, 3, 1, 3, 1]
    assert not is_anything_due(engine, study, candidates_of(engine, study, 2), 2)
    more = confirm(engine, study, top=3, seeds=3)
    assert [trial.user_attrs["confirms"] for trial in run(engine, storage, more)[5:]] == [1, 3, 2, 2, 2]
    found = confirmation_of(engine, study)
    assert {its.number: (its.values, dict(its.failed)) for its in found.candidates} == {
        1: ((0.5, 1.0, 1.0), {"oom": 1}),
        2: ((2.0, 2.0, 2.0), {}),
        3: ((0.5, 3.0), {"nan": 1}),
    }


def test_of_two_who_confirm_at_once_one_enqueues(engine, storage):
    study = a_study(engine, storage)
    threads = [threading.Thread(target=confirm, args=(engine, study, 3, 5)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert standings.look(Sessions(engine), find_companion(engine, study).study_id).n_trials == 15


def test_the_confirmed_trial_is_chosen_once_all_runs_are_done(engine, storage):
    study = a_study(engine, storage)
    assert (choose(engine, study).trial.number, choose(engine, study).note) == (1, None)
    companion = confirm(engine, study)
    early = choose(engine, study)
    assert (early.trial.number, early.confirmation) == (1, None)
    assert early.note == (
        "exporting the best of the search: s/confirm has chosen none, as 4 of its 4 runs are still to be done;"
        " 'tuner confirm s' goes on"
    )
    run(engine, storage, companion)
    chosen = choose(engine, study)
    assert (chosen.trial.number, chosen.trial.params, chosen.confirmation.choice.mean) == (3, {"x": 3}, 3.0)
    assert chosen.note == "exporting trial 3, which s/confirm confirmed"
    assert choose(engine, study, 0).trial.number == 0
    assert choose(engine, study, 0).confirmation is None
    with pytest.raises(TunerError, match="study 's' has no such trial; 'tuner trials s' lists them"):
        choose(engine, study, 9)
    optuna.load_study(study_name="s", storage=storage).add_trial(
        create_trial(value=0.95, params={"x": 8}, distributions=SPACE)
    )
    assert "; trial 4 has become the best of the search since, and 'tuner confirm s'" in choose(engine, study).note


def test_a_trial_that_is_not_complete_makes_no_model(engine, storage):
    study = a_study(engine, storage)
    control.enqueue(Sessions(engine), study.study_id, {"x": 1})
    with pytest.raises(TunerError, match="study 's' has trial 4 as waiting"):
        choose(engine, study, 4)


def test_a_confirmation_is_none_of_a_later_study_of_the_same_name(engine, storage):
    study = a_study(engine, storage)
    run(engine, storage, confirm(engine, study))
    control.delete_study(Sessions(engine), study.study_id)
    later = a_study(engine, storage)
    assert later.created_at != study.created_at
    assert (find_companion(engine, later), choose(engine, later).confirmation) == (None, None)
    with pytest.raises(TunerError, match=r"'s/confirm' exists, .*'tuner delete s/confirm' makes room"):
        confirm(engine, later)


def test_what_cannot_be_confirmed_is_refused(engine, storage):
    study = a_study(engine, storage, values=())
    with pytest.raises(TunerError, match="study 's' has no complete trial yet"):
        open_confirmable(engine, "s")
    optuna.load_study(study_name="s", storage=storage).add_trial(
        create_trial(value=float("inf"), params={"x": 8}, distributions=SPACE)
    )
    with pytest.raises(TunerError, match="no complete trial whose value is a finite number"):
        candidates_of(engine, study, 3)
    optuna.create_study(study_name="two", storage=storage, directions=["minimize", "maximize"])
    with pytest.raises(TunerError, match="study 'two' has 2 objectives"):
        open_confirmable(engine, "two")
    theirs = optuna.create_study(study_name="theirs", storage=storage)
    theirs.add_trial(create_trial(value=1.0))
    with pytest.raises(TunerError, match="it was not created by tuner"):
        open_confirmable(engine, "theirs")


def test_a_confirmation_is_neither_confirmed_nor_extended_nor_exported(engine, storage):
    companion = confirm(engine, a_study(engine, storage))
    run(engine, storage, companion)
    with pytest.raises(TunerError, match="is a confirmation itself; 'tuner confirm s --seeds N' adds runs to it"):
        open_confirmable(engine, "s/confirm")
    with pytest.raises(UsageError, match="'tuner confirm s --seeds N' adds to them"):
        extend_study(engine, companion, trials=Amount(value=3, is_more=True))
    with pytest.raises(TunerError, match="'tuner export s' exports what it chose"):
        choose(engine, companion)
    assert open_study(engine, "s/confirm") == companion
    assert companion.spec.confirms.created_at.tzinfo == dt.UTC
