"""`--pruner rungs` on real workers and PostgreSQL: the replay of what they recorded decides the same."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sqlalchemy import text

from storage import open_engine
from storage.optuna_storage.rule_tables import Tables, best_so_far
from storage.optuna_storage.rules import standard_rungs

if TYPE_CHECKING:
    from pathlib import Path

    from command import Tuner

# A trial reports and asks before another does, so that the order of the reports is that of the decisions. A report that
# takes the database long is waited for here: else the trial would go on, and not be asked about.
OBJECTIVE = """
import fcntl
import threading
from pathlib import Path

import optuna


def objective(trial):
    end, start = trial.suggest_float("end", 0, 1), trial.suggest_float("start", 0, 1)
    for step in range(10):
        with open(Path(__file__).parent / "turn", "w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            trial.report(end + start / (1 + step), step)
            while trial._reports.is_behind:
                threading.Event().wait(0.01)
            if trial.should_prune():
                raise optuna.TrialPruned
    return end
"""
N_TRIALS = 30


def test_workers_decide_as_the_replay_of_what_they_recorded(tuner: Tuner, database: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OBJECTIVE)
    options = ("--study", "s", "--trials", str(N_TRIALS), "--pruner", "rungs:epochs=10,eta=1.5", "--audit", "0.5")
    command = ("run", tmp_path / "mine.py:objective", *options, "--direction", "minimize", "--workers", "2")
    done = tuner(*command)
    assert done.code == 0, done.stderr
    assert tuner("show", "s", "--json").json()["spec"]["sampler"] == {"name": "tpe", "settings": {"gamma": "sqrt"}}
    again = tuner(*command, "--sampler", "tpe")  # the same study
    assert again.code == 0, again.stderr
    assert again.stderr.startswith("joined study s")
    engine = open_engine(database)
    with engine.connect() as conn:
        reports = conn.execute(
            text(
                """SELECT number, state::text, step, intermediate_value, value_json::int FROM trials
                    JOIN trial_intermediate_values USING (trial_id) LEFT JOIN trial_user_attributes attrs
                    ON attrs.trial_id = trials.trial_id AND key = 'audit.pruned_at'
                    ORDER BY trial_intermediate_value_id"""
            )
        ).all()
    engine.dispose()
    rule, tables = standard_rungs(10, 1.5, N_TRIALS), Tables()
    so_far: dict[int, list[float]] = {}
    stopped: dict[int, int] = {}
    for number, _, step, value, _ in reports:
        if number in stopped:
            continue
        its = so_far.setdefault(number, [])
        its.append(value)
        assert step == len(its) - 1
        best = best_so_far(its)[-1]
        tables.report(step, best)
        if rule.stops(step, best, tables):
            stopped[number] = step
    last = {number: step for number, state, step, _, _ in reports if state == "PRUNED"}
    audited = {number: step for number, _, _, _, step in reports if step is not None}
    assert stopped == last | audited
    assert len(so_far) == N_TRIALS
    assert 5 < len(stopped) < N_TRIALS
    assert audited
    assert all(last[number] == 9 for number in audited)

    status = json.loads(tuner("status", "s", "--json").stdout)
    n_complete = N_TRIALS - len(stopped)
    assert status["trials"]["complete"] == n_complete
    assert status["audited"]["audited"] == len(audited)
    best = status["audited"]["best"]
    assert 0 <= best["low"] <= best["share"] <= best["high"] <= 1
    assert tuner("report", "s", "--output", tmp_path / "s.html").code == 0
    assert f"{len(audited)} of the trials that were to be pruned ran on" in (tmp_path / "s.html").read_text()
    if n_complete >= 10:
        assert status["replay"]["pruner"] == "median"
        found = json.loads(tuner("replay", "s", "--json").stdout)
        assert (found["complete"], found["replayed"], found["epochs"]) == (n_complete, n_complete, 10)
        assert [its["rule"] for its in found["rules"]] == ["median", "percentile", "rungs", "rungs:eta=1.5"]
        shown = tuner("replay", "s").stdout.splitlines()
        assert shown[0].startswith(f"s: {n_complete} complete trials of up to 10 epochs")
        assert [line.split()[0] for line in shown[2:]] == [its["rule"] for its in found["rules"]]
        assert "--pruner median would have saved" in tuner("status", "s").stdout
    else:
        assert status["replay"] is None
        assert "fewer than 10 complete trials" in tuner("replay", "s").error()


def test_a_study_of_two_trials_has_a_complete_one(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OBJECTIVE)
    options = ("--study", "s", "--trials", "2", "--pruner", "rungs:epochs=10", "--direction", "minimize")
    done = tuner("run", tmp_path / "mine.py:objective", *options, "--workers", "1")
    assert done.code == 0, done.stderr
    states = [trial["state"] for trial in json.loads(tuner("trials", "s", "--json").stdout)]
    assert states[0] == "COMPLETE"
