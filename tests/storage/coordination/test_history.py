"""A study's finished trials in the order of their ends."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from storage import PostgresStorage
from storage.coordination import claims, history, studies
from storage.coordination.claims import Claim
from storage.coordination.history import Ended
from storage.coordination.standings import Budget

BUDGET = Budget(trials=10, timeout_s=None, max_failures=3, max_attempts=2)


def test_trials_are_told_as_they_ended_with_what_they_cost(storage: PostgresStorage) -> None:
    study_id = studies.create_study(storage.engine, "s", "maximize", {"version": 1}, {}, "value").study_id
    held = []
    for share in (0.5, 1.0, 1.0):
        claim = claims.claim(storage.sessions, study_id, BUDGET, claims.Holder(worker="w", share=share))
        assert isinstance(claim, Claim)
        storage.hold(claim)
        held.append(claim)
    for trial, state, value in ((1, TrialState.COMPLETE, 0.5), (0, TrialState.COMPLETE, float("inf"))):
        storage.set_trial_state_values(held[trial].trial_id, state, [value])
    with storage.engine.begin() as conn:
        ten_s = "update tuner_attempts set started_at = ended_at - interval '10 s' where ended_at is not null"
        conn.exec_driver_sql(ten_s)
    in_optuna = optuna.load_study(study_name="s", storage=storage)
    in_optuna.add_trial(create_trial(state=TrialState.FAIL))
    with storage.engine.connect() as conn:
        found = history.ended(conn, study_id)
    assert found == [
        Ended(number=1, state="COMPLETE", value=0.5, device_s=pytest.approx(10)),
        Ended(number=0, state="COMPLETE", value=float("inf"), device_s=pytest.approx(5)),
        Ended(number=3, state="FAIL", value=None, device_s=pytest.approx(0, abs=1)),
    ]
