"""Raising a study's budget: what is added to what, and what is refused."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import text

from storage.coordination import claims
from storage.coordination.claims import Claim
from storage.coordination.standings import NothingToClaim
from storage.database.sessions import Sessions
from tuner.errors import UsageError
from tuner.spec import Budget, ObjectiveSpec, SamplerSpec, Spec
from tuner.study.extending import Amount, extend_study
from tuner.study.joining import Study, create_study, open_study
from tuner.study.status import look


def a_spec(sampler: SamplerSpec = SamplerSpec(), **budget: Any) -> Spec:  # noqa: B008 - frozen
    return Spec(
        objective=ObjectiveSpec(name="mine.py:loss", code_hash="0" * 64),
        metric="value",
        direction="minimize",
        sampler=sampler,
        budget=Budget(**{"trials": 2, **budget}),
        epochs=1,
    )


def a_study(engine, **budget) -> Study:
    return create_study(engine, "s", a_spec(**budget))


def end_trials(engine, study: Study, state: str, count: int) -> None:
    for _ in range(count):
        held = claim(engine, study)
        assert isinstance(held, Claim)
        with engine.begin() as conn:
            conn.execute(
                text("update trials set state = :state where trial_id = :id"), {"state": state, "id": held.trial_id}
            )


def claim(engine, study: Study) -> Claim | NothingToClaim:
    return claims.claim(Sessions(engine), study.study_id, study.budget, claims.Holder(worker="test"))


def by(value: float) -> Amount:
    return Amount(value=value, is_more=True)


def to(value: float) -> Amount:
    return Amount(value=value, is_more=False)


def test_a_worker_that_knows_the_old_budget_claims_by_the_new_one(engine):
    study = a_study(engine)
    end_trials(engine, study, "COMPLETE", 2)
    refused = claim(engine, study)
    assert isinstance(refused, NothingToClaim)
    assert (refused.final, refused.limit) == (True, "trials")
    found = extend_study(engine, study, trials=by(3), max_failures=to(10))
    assert (found.before.trials, found.budget.trials, found.closed) == (2, 5, None)
    end_trials(engine, study, "PRUNED", 3)
    assert isinstance(claim(engine, study), NothingToClaim)
    opened = open_study(engine, "s")
    assert opened.spec == study.spec.model_copy(update={"budget": Budget(trials=5)})
    assert look(engine, study).study == opened
    assert extend_study(engine, study, trials=to(6)).budget.trials == 6


def test_time_that_ran_out_is_added_from_now_on_and_other_time_to_what_is_left(engine):
    study = a_study(engine, timeout_s=60)
    assert extend_study(engine, study, timeout=by(30)).budget.timeout_s == 90
    with engine.begin() as conn:
        conn.execute(text("update tuner_studies set created_at = now() - interval '1000 seconds'"))
    assert isinstance(claim(engine, study), NothingToClaim)
    found = extend_study(engine, study, timeout=by(3600))
    assert found.budget.timeout_s == pytest.approx(4600, abs=30)
    assert isinstance(claim(engine, study), Claim)


def test_failures_are_added_to_those_there_were(engine):
    study = a_study(engine, max_failures=0)
    first, second = claim(engine, study), claim(engine, study)
    assert isinstance(first, Claim)
    assert isinstance(second, Claim)
    with engine.begin() as conn:
        conn.execute(text("update trials set state = 'FAIL'"))
    found = extend_study(engine, study, trials=by(1))
    assert (found.closed.limit, found.closed.final) == ("max_failures", True)
    assert extend_study(engine, study, max_failures=by(1)).budget.max_failures == 3
    assert isinstance(claim(engine, study), Claim)


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ({"trials": to(1)}, "--trials: study 's' has 2 trials, and that only grows: a + adds to it"),
        ({"trials": by(2**31)}, "--trials: study 's' has 2 trials, and can have at most 2147483647"),
        ({"timeout": by(60)}, "--timeout: study 's' has no time limit, and so there is nothing to add to"),
        ({"trials": by(1), "max_failures": to(3)}, "--max-failures: study 's' has 10 failures, and that only grows"),
    ],
)
def test_what_would_be_less_or_of_no_use_is_refused_and_changes_nothing(engine, amounts, message):
    study = a_study(engine)
    with pytest.raises(UsageError) as caught:
        extend_study(engine, study, **amounts)
    assert message in str(caught.value)
    assert open_study(engine, "s") == study


def test_a_grid_is_not_searched_twice(engine):
    grid = SamplerSpec(name="grid", settings={"search_space": {"x": [0, 1], "y": [0, 1]}})
    study = create_study(engine, "s", a_spec(grid))
    assert extend_study(engine, study, trials=by(2)).budget.trials == 4
    with pytest.raises(UsageError, match="the study's grid has 4 combinations, and would begin again at 5"):
        extend_study(engine, study, trials=by(1))


def test_of_two_who_extend_at_once_each_adds(engine):
    study = a_study(engine)
    threads = [threading.Thread(target=extend_study, args=(engine, study), kwargs={"trials": by(5)}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert open_study(engine, "s").spec.budget.trials == 22
