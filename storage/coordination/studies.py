"""Studies and their trials, read and created with set-based statements; nothing here imports Optuna."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import (
    Connection,
    Double,
    Engine,
    Row,
    Select,
    Text,
    and_,
    case,
    cast,
    delete,
    func,
    insert,
    literal,
    null,
    select,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.exc import IntegrityError

from storage.coordination.records import TRIALS_WITH_VALUE, State
from storage.database.errors import StudyExistsError, StudyNotFoundError
from storage.database.foreign import json_values
from storage.database.sessions import Sessions
from storage.database.tables import (
    STUDY_NAME_MAX_LENGTH,
    studies,
    study_directions,
    study_system_attributes,
    study_user_attributes,
    trial_values,
    trials,
    tuner_exports,
    tuner_studies,
)
from storage.database.url import mask_url

METRIC_NAMES: Final = "study:metric_names"  # where optuna.Study.set_metric_names keeps them

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """A study as it was created. `spec` and `created_at` are None for a study that tuner did not create.

    `metrics` and `directions` are of its objectives, of which a study of tuner's has one.
    """

    study_id: int
    name: str
    metrics: tuple[str, ...]
    directions: tuple[Direction, ...]
    spec: dict[str, Any] | None
    created_at: dt.datetime | None

    @property
    def direction(self) -> Direction:
        """The first objective's direction."""
        return self.directions[0]


@dataclass(frozen=True, kw_only=True)
class StateCounts:
    """The trials of a study by state."""

    complete: int = 0
    pruned: int = 0
    running: int = 0
    waiting: int = 0
    failed: int = 0

    @property
    def done(self) -> int:
        """The trials that count towards the budget and have ended."""
        return self.complete + self.pruned


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A study, its trials by state and its best value: None while it has none, and with several objectives."""

    study: StudyRecord
    counts: StateCounts
    best: float | None


def create_study(
    engine: Engine,
    name: str,
    direction: str,
    spec: Mapping[str, Any],
    user_attrs: Mapping[str, Any],
    metric: str,
    history: Sequence[Mapping[str, Any]] | None = None,
) -> StudyRecord:
    """Create a study with its spec, in one transaction: no worker ever sees the one without the other.

    `metric` is what Optuna and its dashboard call the study's value, `history` what its sampler learns from beside its
    own trials.
    Raises StudyExistsError if there is a study of that name, ValueError if PostgreSQL cannot hold the name.
    """
    if not name or "\0" in name or len(name) > STUDY_NAME_MAX_LENGTH:
        raise ValueError(f"a study's name needs 1 to {STUDY_NAME_MAX_LENGTH} characters and no NUL, got {name[:40]!r}")
    try:
        with engine.begin() as conn:
            study_id = conn.execute(insert(studies).values(study_name=name).returning(studies.c.study_id)).scalar_one()
            conn.execute(insert(study_directions).values(study_id=study_id, direction=direction.upper(), objective=0))
            conn.execute(insert(tuner_studies).values(study_id=study_id, spec=dict(spec), history=history or null()))
            conn.execute(
                insert(study_system_attributes).values(
                    study_id=study_id, key=METRIC_NAMES, value_json=json.dumps([metric])
                )
            )
            attributes = [
                {"study_id": study_id, "key": key, "value_json": json.dumps(value)} for key, value in user_attrs.items()
            ]
            if attributes:
                conn.execute(insert(study_user_attributes), attributes)
    except IntegrityError as error:
        raise StudyExistsError(f"a study named {name!r} exists in {mask_url(engine.url)}") from error
    return find_study(engine, name)


def created(engine: Engine) -> list[tuple[int, dt.datetime | None]]:
    """Return the id of each study and when it was created, None for one that tuner did not create."""
    joined = studies.outerjoin(tuner_studies, tuner_studies.c.study_id == studies.c.study_id)
    with engine.connect() as conn:
        rows = conn.execute(select(studies.c.study_id, tuner_studies.c.created_at).select_from(joined))
        return [(row.study_id, row.created_at) for row in rows]


def numbers_in(sessions: Sessions, study_id: int, state: State) -> list[int]:
    """Return the numbers of the study's trials in this state, in their order."""
    query = select(trials.c.number).where(trials.c.study_id == study_id, trials.c.state == state)
    return sessions.statement(lambda conn: list(conn.execute(query.order_by(trials.c.number)).scalars()))


def find_study(engine: Engine, name: str) -> StudyRecord:
    """Return the study of that name. Raises StudyNotFoundError if there is none."""
    with engine.connect() as conn:
        row = conn.execute(_select_studies().where(studies.c.study_name == name)).one_or_none()
    if row is None:
        raise StudyNotFoundError(f"no study named {name!r} in {mask_url(engine.url)}; 'tuner studies' lists them")
    return _study(row)


def history(sessions: Sessions, study_id: int) -> list[dict[str, Any]]:
    """Return what the study was given to learn from at its creation."""
    query = select(tuner_studies.c.history).where(tuner_studies.c.study_id == study_id)
    return sessions.statement(lambda conn: conn.execute(query).scalar_one_or_none()) or []


def delete_if_unused(engine: Engine, study_id: int) -> bool:
    """Delete the study unless it has a trial; whether it was deleted."""
    with engine.begin() as conn:
        # The lock that creating a trial takes.
        conn.execute(select(studies.c.study_id).where(studies.c.study_id == study_id).with_for_update())
        if states_of(conn, study_id) != StateCounts():
            return False
        for table in (study_directions, study_user_attributes, study_system_attributes, studies):
            conn.execute(delete(table).where(table.c.study_id == study_id))
        return True


def count_states(engine: Engine, study_id: int) -> StateCounts:
    """Return how many trials of the study are in each state."""
    with engine.connect() as conn:
        return states_of(conn, study_id)


def states_of(conn: Connection, study_id: int) -> StateCounts:
    """Return how many trials of the study are in each state, as `conn`'s transaction sees them."""
    rows = conn.execute(
        select(trials.c.state, func.count().label("n")).where(trials.c.study_id == study_id).group_by(trials.c.state)
    )
    return _state_counts({row.state: row.n for row in rows})


def summaries(engine: Engine) -> list[Summary]:
    """Return what there is to say of each study, oldest first, in two queries whatever their number."""
    kind = trial_values.c.value_type
    infinite = ((kind == "INF_NEG", literal(-math.inf, Double)), (kind == "INF_POS", literal(math.inf, Double)))
    # Not NaN, which other writers may have left, and which is no value to be the best.
    value = case(*infinite, else_=func.nullif(trial_values.c.value, literal(math.nan, Double)))
    states = (
        select(
            trials.c.study_id,
            trials.c.state,
            func.count().label("n"),
            func.min(value).label("least"),
            func.max(value).label("greatest"),
        )
        .select_from(TRIALS_WITH_VALUE)
        .group_by(trials.c.study_id, trials.c.state)
    )
    by_study: dict[int, dict[str, Row[Any]]] = {}
    with engine.connect() as conn:
        records = [_study(row) for row in conn.execute(_select_studies().order_by(studies.c.study_id))]
        for row in conn.execute(states):
            by_study.setdefault(row.study_id, {})[row.state] = row
    return [_summary(record, by_study.get(record.study_id, {})) for record in records]


def record_export(
    engine: Engine, study_id: int, trial_number: int, weights_sha256: str, test_metrics: Mapping[str, float | None]
) -> None:
    """Record that the test split was evaluated once with these weights; None stands for NaN, which JSON has not."""
    with engine.begin() as conn:
        conn.execute(
            insert(tuner_exports).values(
                study_id=study_id,
                trial_number=trial_number,
                weights_sha256=weights_sha256,
                test_metrics=dict(test_metrics),
            )
        )


def list_exports(engine: Engine, study_id: int) -> list[tuple[int, str, dict[str, float | None]]]:
    """Return (trial number, weights' sha256, test metrics) of each evaluation on test, oldest first."""
    query = select(tuner_exports.c.trial_number, tuner_exports.c.weights_sha256, tuner_exports.c.test_metrics)
    with engine.connect() as conn:
        rows = conn.execute(query.where(tuner_exports.c.study_id == study_id).order_by(tuner_exports.c.export_id))
        return [(row.trial_number, row.weights_sha256, row.test_metrics) for row in rows]


def _select_studies() -> Select[Any]:
    attributes = study_system_attributes
    directions = (
        select(
            func.array_agg(aggregate_order_by(cast(study_directions.c.direction, Text), study_directions.c.objective))
        )
        .where(study_directions.c.study_id == studies.c.study_id)
        .scalar_subquery()
    )
    return select(
        studies.c.study_id,
        studies.c.study_name,
        directions.label("directions"),
        attributes.c.value_json.label("metrics"),
        tuner_studies.c.spec,
        tuner_studies.c.created_at,
    ).select_from(
        studies.outerjoin(tuner_studies, tuner_studies.c.study_id == studies.c.study_id).outerjoin(
            attributes, and_(attributes.c.study_id == studies.c.study_id, attributes.c.key == METRIC_NAMES)
        )
    )


def _study(row: Row[Any]) -> StudyRecord:
    directions: list[str] = row.directions or ["MINIMIZE"]
    unnamed = ["value"] if len(directions) == 1 else [f"value {objective}" for objective in range(len(directions))]
    return StudyRecord(
        study_id=row.study_id,
        name=row.study_name,
        metrics=_names(row.metrics, unnamed),
        directions=tuple("maximize" if direction == "MAXIMIZE" else "minimize" for direction in directions),
        spec=row.spec,
        created_at=row.created_at,
    )


def _names(text: str | None, unnamed: list[str]) -> tuple[str, ...]:
    """Return the metrics' names, one an objective; another program may have set any JSON for them."""
    names = unnamed if text is None else json_values([text])[0]
    is_usable = isinstance(names, list) and len(names) == len(unnamed) and all(isinstance(one, str) for one in names)
    return tuple(names if is_usable else unnamed)


def _state_counts(counts: Mapping[str, int]) -> StateCounts:
    return StateCounts(
        complete=counts.get("COMPLETE", 0),
        pruned=counts.get("PRUNED", 0),
        running=counts.get("RUNNING", 0),
        waiting=counts.get("WAITING", 0),
        failed=counts.get("FAIL", 0),
    )


def _summary(study: StudyRecord, states: Mapping[str, Row[Any]]) -> Summary:
    best = None
    if "COMPLETE" in states and len(study.directions) == 1:
        best = states["COMPLETE"].least if study.direction == "minimize" else states["COMPLETE"].greatest
    return Summary(study=study, counts=_state_counts({state: row.n for state, row in states.items()}), best=best)
