"""Filling a study with finished trials by bulk SQL, as a sweep would have left them."""

from __future__ import annotations

from sqlalchemy import Engine, text

N_PARAMS, N_STEPS = 5, 20

_STATEMENTS = (
    """
    INSERT INTO trials (study_id, number, state, datetime_start, datetime_complete)
    SELECT :study_id, n, (CASE WHEN n % 3 = 2 THEN 'PRUNED' ELSE 'COMPLETE' END)::trialstate,
           timestamp '2026-01-01' + n * interval '1 min', timestamp '2026-01-01' + (n + 1) * interval '1 min'
    FROM generate_series(0, :n_trials - 1) n
    """,
    """
    INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
    SELECT trial_id, 'x' || p, random(),
           '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}'
    FROM trials, generate_series(1, :n_params) p WHERE study_id = :study_id ORDER BY trial_id, p
    """,
    """
    INSERT INTO trial_values (trial_id, objective, value, value_type)
    SELECT trial_id, 0, random(), 'FINITE' FROM trials WHERE study_id = :study_id
    """,
    """
    INSERT INTO trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
    SELECT trial_id, s, random(), 'FINITE'
    FROM trials, generate_series(1, :n_steps) s
    WHERE study_id = :study_id AND (state = 'COMPLETE' OR s <= :n_steps / 4) ORDER BY trial_id, s
    """,
    """
    INSERT INTO tuner_attempts
        (token, trial_id, attempt, worker, slot, device, share, started_at, ended_at, outcome)
    SELECT gen_random_uuid(), trial_id, 1, 'host-' || number % 100 || '\\:1', 0, 'cuda:0', 1,
           datetime_start AT TIME ZONE 'UTC', datetime_complete AT TIME ZONE 'UTC', lower(state::text)
    FROM trials WHERE study_id = :study_id ORDER BY trial_id
    """,
    """
    INSERT INTO tuner_leases (trial_id, attempts, token, worker)
    SELECT trial_id, attempt, token, worker FROM tuner_attempts JOIN trials USING (trial_id) WHERE study_id = :study_id
    """,
    """
    INSERT INTO tuner_workers (worker_id, study_id, name, slots, versions, started_at, last_seen)
    SELECT gen_random_uuid(), :study_id, 'host-' || n || '\\:1',
           '[{"slot": 0, "device": "cuda:0", "share": 1.0, "state": "idle"}]', '{"torch": "2.10.0"}',
           timestamptz '2026-01-01', now()
    FROM generate_series(0, 99) n
    """,
    """
    INSERT INTO trial_user_attributes (trial_id, key, value_json)
    SELECT trial_id, k, '1.5' FROM trials, unnest(ARRAY['seconds', 'seed']) k WHERE study_id = :study_id
    """,
)


def fill(engine: Engine, study_id: int, n_trials: int) -> None:
    """Give an empty study of one objective finished trials of N_PARAMS params and up to N_STEPS steps.

    Each ran once, on one of 100 workers, which are all there.
    """
    with engine.begin() as conn:
        conn.execute(text("SET LOCAL statement_timeout = 0"))
        for statement in _STATEMENTS:
            values = {"study_id": study_id, "n_trials": n_trials, "n_params": N_PARAMS, "n_steps": N_STEPS}
            conn.execute(text(statement), {name: value for name, value in values.items() if f":{name}" in statement})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(text("ANALYZE"))
