"""The tables this package reads and writes: Optuna's, as Optuna 5 defines them, and ours beside them.

Optuna's are declared again so that reading a study does not import Optuna's storage; a test holds them
against `optuna.storages._rdb.models`. Ours carry the prefix `tuner_` and disappear with the study.
"""

from __future__ import annotations

from sqlalchemy import (
    Column,
    DateTime,
    Double,
    Enum,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    func,
)
from sqlalchemy.dialects.postgresql import JSON, JSONB, UUID

optuna_metadata = MetaData()
tuner_metadata = MetaData()

STUDY_NAME_MAX_LENGTH = 512  # optuna.storages._rdb.models.MAX_INDEXED_STRING_LENGTH

trial_state = Enum("RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING", name="trialstate")
study_direction = Enum("NOT_SET", "MINIMIZE", "MAXIMIZE", name="studydirection")
value_type = Enum("FINITE", "INF_POS", "INF_NEG", name="trialvaluetype")
intermediate_value_type = Enum("FINITE", "INF_POS", "INF_NEG", "NAN", name="trialintermediatevaluetype")

studies = Table(
    "studies",
    optuna_metadata,
    Column("study_id", Integer, primary_key=True),
    Column("study_name", String(STUDY_NAME_MAX_LENGTH), nullable=False, unique=True, index=True),
)
study_directions = Table(
    "study_directions",
    optuna_metadata,
    Column("study_direction_id", Integer, primary_key=True),
    Column("direction", study_direction, nullable=False),
    Column("study_id", ForeignKey("studies.study_id"), nullable=False),
    Column("objective", Integer, nullable=False),
)
study_user_attributes = Table(
    "study_user_attributes",
    optuna_metadata,
    Column("study_user_attribute_id", Integer, primary_key=True),
    Column("study_id", ForeignKey("studies.study_id")),
    Column("key", String(STUDY_NAME_MAX_LENGTH)),
    Column("value_json", Text),
)
study_system_attributes = Table(
    "study_system_attributes",
    optuna_metadata,
    Column("study_system_attribute_id", Integer, primary_key=True),
    Column("study_id", ForeignKey("studies.study_id")),
    Column("key", String(STUDY_NAME_MAX_LENGTH)),
    Column("value_json", Text),
)
trials = Table(
    "trials",
    optuna_metadata,
    Column("trial_id", Integer, primary_key=True),
    Column("number", Integer),
    Column("study_id", ForeignKey("studies.study_id"), index=True),
    Column("state", trial_state, nullable=False),
    Column("datetime_start", DateTime),
    Column("datetime_complete", DateTime),
)
trial_user_attributes = Table(
    "trial_user_attributes",
    optuna_metadata,
    Column("trial_user_attribute_id", Integer, primary_key=True),
    Column("trial_id", ForeignKey("trials.trial_id")),
    Column("key", String(STUDY_NAME_MAX_LENGTH)),
    Column("value_json", Text),
)
trial_system_attributes = Table(
    "trial_system_attributes",
    optuna_metadata,
    Column("trial_system_attribute_id", Integer, primary_key=True),
    Column("trial_id", ForeignKey("trials.trial_id")),
    Column("key", String(STUDY_NAME_MAX_LENGTH)),
    Column("value_json", Text),
)
trial_params = Table(
    "trial_params",
    optuna_metadata,
    Column("param_id", Integer, primary_key=True),
    Column("trial_id", ForeignKey("trials.trial_id")),
    Column("param_name", String(STUDY_NAME_MAX_LENGTH)),
    Column("param_value", Double),
    Column("distribution_json", Text),
)
trial_values = Table(
    "trial_values",
    optuna_metadata,
    Column("trial_value_id", Integer, primary_key=True),
    Column("trial_id", ForeignKey("trials.trial_id"), nullable=False),
    Column("objective", Integer, nullable=False),
    Column("value", Double),
    Column("value_type", value_type, nullable=False),
)
trial_intermediate_values = Table(
    "trial_intermediate_values",
    optuna_metadata,
    Column("trial_intermediate_value_id", Integer, primary_key=True),
    Column("trial_id", ForeignKey("trials.trial_id"), nullable=False),
    Column("step", Integer, nullable=False),
    Column("intermediate_value", Double),
    Column("intermediate_value_type", intermediate_value_type, nullable=False),
)
trial_heartbeats = Table(
    "trial_heartbeats",
    optuna_metadata,
    Column("trial_heartbeat_id", Integer, primary_key=True),
    Column("trial_id", ForeignKey("trials.trial_id"), nullable=False),
    Column("heartbeat", DateTime, nullable=False),
)

tuner_schema = Table(
    "tuner_schema",
    tuner_metadata,
    Column("version", Integer, nullable=False),
)
# The foreign keys to Optuna's tables are written in SQL by the schema's migration: the two metadata are apart so
# that creating ours never touches Optuna's.
tuner_studies = Table(
    "tuner_studies",
    tuner_metadata,
    Column("study_id", Integer, primary_key=True, autoincrement=False),
    Column("spec", JSONB, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("state", Text, nullable=False, server_default="open"),  # or paused, or stopped
    Column("history", JSONB),  # of another study, for the sampler to learn from
)
# One row a trial that tuner has handed out. `token` is that of the attempt that runs the trial, or that ended it;
# NULL for a trial that was given back. `expires_at` is NULL unless the trial runs.
tuner_leases = Table(
    "tuner_leases",
    tuner_metadata,
    Column("trial_id", Integer, primary_key=True, autoincrement=False),
    Column("attempts", Integer, nullable=False),
    Column("token", UUID),
    Column("worker", Text),
    Column("expires_at", DateTime(timezone=True)),
)
# One row a worker process, kept after its end. `slots` lists {"slot", "device", "share", "state"}; `placement` is
# {"engine", "job", "task", "node"}, NULL for one that was started by hand.
tuner_workers = Table(
    "tuner_workers",
    tuner_metadata,
    Column("worker_id", UUID, primary_key=True),
    Column("study_id", Integer, nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("slots", JSONB, nullable=False),
    Column("versions", JSONB, nullable=False),
    Column("started_at", DateTime(timezone=True), nullable=False),
    Column("last_seen", DateTime(timezone=True), nullable=False),
    Column("ended_at", DateTime(timezone=True)),
    Column("placement", JSONB(none_as_null=True)),
)
# One row each time that a trial was handed out, kept after its end. `share` is the part of the device that its slot
# had; `outcome` is NULL while it runs.
tuner_attempts = Table(
    "tuner_attempts",
    tuner_metadata,
    Column("token", UUID, primary_key=True),
    Column("trial_id", Integer, nullable=False, index=True),
    Column("attempt", Integer, nullable=False),
    Column("worker", Text, nullable=False),
    Column("slot", Integer, nullable=False),
    Column("device", Text, nullable=False),
    Column("share", Double, nullable=False),
    Column("started_at", DateTime(timezone=True), nullable=False),
    Column("ended_at", DateTime(timezone=True)),
    Column("outcome", Text),  # complete, pruned, fail, released, lost or hung
    Column("message", Text),  # why it was released, lost or hung
)
# One row an epoch, beside the report of the same step: what storage/trials/curves.py keeps of it.
tuner_curves = Table(
    "tuner_curves",
    tuner_metadata,
    Column("trial_id", Integer, primary_key=True, autoincrement=False),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("epoch", JSON, nullable=False),
)
# The checkpoint of a trial that has not ended, in parts of some megabytes.
tuner_checkpoints = Table(
    "tuner_checkpoints",
    tuner_metadata,
    Column("trial_id", Integer, primary_key=True, autoincrement=False),
    Column("part", Integer, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
)
# The model of the study's best complete trial, as its function gave it to keep; another's only while its trial ends.
tuner_models = Table(
    "tuner_models",
    tuner_metadata,
    Column("trial_id", Integer, primary_key=True, autoincrement=False),
    Column("part", Integer, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
)
# The transactions that were committed lately, by an id that their client gave them.
tuner_operations = Table(
    "tuner_operations",
    tuner_metadata,
    Column("operation_id", UUID, primary_key=True),
    Column("committed_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)
tuner_exports = Table(
    "tuner_exports",
    tuner_metadata,
    Column("export_id", Integer, primary_key=True),
    Column("study_id", Integer, nullable=False, index=True),
    Column("trial_number", Integer, nullable=False),
    Column("weights_sha256", String(64), nullable=False),
    Column("test_metrics", JSONB, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)
