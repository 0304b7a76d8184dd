"""Studies and their trials, read and created with set-based statements; nothing here imports Optuna."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Literal, TypeVarTuple

from sqlalchemy import (
    ARRAY,
    Connection,
    Double,
    Engine,
    Integer,
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
from sqlalchemy.dialects.postgresql import aggregate_order_by, distinct_on
from sqlalchemy.exc import IntegrityError

from storage.database.errors import StudyExistsError, StudyNotFoundError
from storage.database.sessions import Sessions
from storage.database.tables import (
    STUDY_NAME_MAX_LENGTH,
    studies,
    study_directions,
    study_system_attributes,
    study_user_attributes,
    trial_intermediate_values,
    trial_params,
    trial_user_attributes,
    trial_values,
    trials,
    tuner_exports,
    tuner_studies,
)
from storage.database.url import mask_url
from storage.database.values import json_values, number_of
from storage.trials.queued import queued_params

METRIC_NAMES: Final = "study:metric_names"  # where optuna.Study.set_metric_names keeps them

Ts = TypeVarTuple("Ts")

Direction = Literal["minimize", "maximize"]
State = Literal["RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING"]


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


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial as it stands. `value` is infinite where the trial's is; None without one. Times are UTC.

    `last_step` and `last_value` are the latest intermediate value's, `last_value` NaN where that is. The params of a
    trial that waits are those that it was enqueued with.
    """

    trial_id: int
    number: int
    state: State
    value: float | None
    started_at: dt.datetime | None
    ended_at: dt.datetime | None
    last_step: int | None = None
    last_value: float | None = None
    params: dict[str, Any] = field(default_factory=dict)
    user_attrs: dict[str, Any] = field(default_factory=dict)


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
        .select_from(_TRIALS_WITH_VALUE)
        .group_by(trials.c.study_id, trials.c.state)
    )
    by_study: dict[int, dict[str, Row[Any]]] = {}
    with engine.connect() as conn:
        records = [_study(row) for row in conn.execute(_select_studies().order_by(studies.c.study_id))]
        for row in conn.execute(states):
            by_study.setdefault(row.study_id, {})[row.state] = row
    return [_summary(record, by_study.get(record.study_id, {})) for record in records]


def list_trials(engine: Engine, study_id: int) -> list[TrialRecord]:
    """Return the study's trials by number, with params, user attributes and the latest intermediate value."""
    with engine.connect() as conn:
        rows = conn.execute(_select_trials().where(trials.c.study_id == study_id).order_by(trials.c.number))
        found = rows.all()
        in_study = select(trials.c.trial_id).where(trials.c.study_id == study_id)
        params = _params(conn, in_study)
        attrs = _user_attrs(conn, in_study)
        latest = _latest_reports(conn, in_study)
        if any(row.state == "WAITING" for row in found):
            for trial_id, queued in queued_params(conn, study_id).items():
                params[trial_id] = queued | params.get(trial_id, {})
    return [_trial(row, params, attrs, latest) for row in found]


def find_trial(engine: Engine, study_id: int, number: int) -> TrialRecord | None:
    """Return the trial of that number, None if there is none."""
    query = _select_trials().where(trials.c.study_id == study_id, trials.c.number == number)
    return _first_trial(engine, query)


def best_trial(engine: Engine, study_id: int, direction: str) -> TrialRecord | None:
    """Return the complete trial with the best value, the earliest of equals; None while there is none."""
    return _first_trial(engine, best_first(_select_trials(), study_id, direction).limit(1))


def _first_trial(engine: Engine, query: Select[Any]) -> TrialRecord | None:
    with engine.connect() as conn:
        row = conn.execute(query).one_or_none()
        if row is None:
            return None
        this = select(trials.c.trial_id).where(trials.c.trial_id == row.trial_id)
        return _trial(row, _params(conn, this), _user_attrs(conn, this), _latest_reports(conn, this))


def best_first(query: Select[*Ts], study_id: int, direction: str) -> Select[*Ts]:
    """Narrow a query of trials, joined with the values of their first objective, to the complete ones, best first."""
    value, kind = trial_values.c.value, trial_values.c.value_type
    # An infinite value is NULL, with a type that sorts around the finite ones. NaN, which other writers may have
    # left, would sort above all of them.
    rank = case((kind == "INF_NEG", -1), (kind == "INF_POS", 1), else_=0)
    order = [rank, value] if direction == "minimize" else [rank.desc(), value.desc()]
    return query.where(
        trials.c.study_id == study_id,
        trials.c.state == "COMPLETE",
        trial_values.c.trial_id.is_not(None),
        value.is_distinct_from(math.nan),
    ).order_by(*order, trials.c.number)


def all_values(engine: Engine, study_id: int) -> dict[int, list[float]]:
    """Return the values of each trial that has any, by its number, in the order of the study's objectives."""
    query = (
        select(trials.c.number, trial_values.c.value, trial_values.c.value_type)
        .join(trial_values, trial_values.c.trial_id == trials.c.trial_id)
        .where(trials.c.study_id == study_id)
        .order_by(trials.c.number, trial_values.c.objective)
    )
    values: dict[int, list[float]] = {}
    with engine.connect() as conn:
        for number, value, kind in conn.execute(query):
            values.setdefault(number, []).append(number_of(value, kind))
    return values


def count_failures(engine: Engine, study_id: int) -> dict[str, tuple[int, str]]:
    """Return for each class of failure how many trials failed by it and the latest message, the latest class last."""
    kind, message = trial_user_attributes.alias("kind"), trial_user_attributes.alias("message")
    query = (
        select(
            func.coalesce(kind.c.value_json, '"unknown"').label("kind"),
            func.coalesce(message.c.value_json, '""').label("message"),
        )
        .select_from(trials)
        .outerjoin(kind, and_(kind.c.trial_id == trials.c.trial_id, kind.c.key == "failure"))
        .outerjoin(message, and_(message.c.trial_id == trials.c.trial_id, message.c.key == "failure_message"))
        .where(trials.c.study_id == study_id, trials.c.state == "FAIL")
        .order_by(trials.c.datetime_complete.nulls_first(), trials.c.number)
    )
    failures: dict[str, tuple[int, str]] = {}
    with engine.connect() as conn:
        for row in conn.execute(query):
            its_kind = _attribute_text(row.kind)
            count, _ = failures.pop(its_kind, (0, ""))
            failures[its_kind] = (count + 1, _attribute_text(row.message))
    return failures


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


def param_value(internal: float, distribution_json: str) -> Any:
    """Return a param's value from what Optuna stores: a float, and the distribution that gives it its type."""
    kind, choices = _kind_and_choices(distribution_json)
    if kind == "CategoricalDistribution":
        return choices[int(internal)]
    return int(internal) if kind.startswith("Int") else internal


@lru_cache(maxsize=1000)  # a study has few distributions, repeated in every trial
def _kind_and_choices(distribution_json: str) -> tuple[str, list[Any]]:
    distribution = json.loads(distribution_json)
    return distribution["name"], distribution["attributes"].get("choices", [])


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
        metrics=tuple(unnamed if row.metrics is None else json.loads(row.metrics)),
        directions=tuple("maximize" if direction == "MAXIMIZE" else "minimize" for direction in directions),
        spec=row.spec,
        created_at=row.created_at,
    )


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


_TRIALS_WITH_VALUE: Final = trials.outerjoin(
    trial_values, and_(trial_values.c.trial_id == trials.c.trial_id, trial_values.c.objective == 0)
)


def _select_trials() -> Select[Any]:
    return select(
        trials.c.trial_id,
        trials.c.number,
        trials.c.state,
        trials.c.datetime_start,
        trials.c.datetime_complete,
        trial_values.c.value,
        trial_values.c.value_type,
    ).select_from(_TRIALS_WITH_VALUE)


def _params(conn: Connection, of: Select[Any]) -> dict[int, dict[str, Any]]:
    """Return params by trial id, in the order in which they came up in the study."""
    table = trial_params
    rows = conn.execute(
        # A row a distribution: 50,000 trials have 250,000 params, and few of these.
        select(
            table.c.param_name,
            table.c.distribution_json,
            func.array_agg(table.c.trial_id, type_=ARRAY(Integer)),
            func.array_agg(table.c.param_value, type_=ARRAY(Double)),
        )
        .where(table.c.trial_id.in_(of))
        .group_by(table.c.param_name, table.c.distribution_json)
        .order_by(func.min(table.c.param_id))
    )
    params: dict[int, dict[str, Any]] = {}
    for name, distribution_json, trial_ids, internals in rows:
        for trial_id, internal in zip(trial_ids, internals, strict=True):
            params.setdefault(trial_id, {})[name] = param_value(internal, distribution_json)
    return params


def _user_attrs(conn: Connection, of: Select[Any]) -> dict[int, dict[str, Any]]:
    """Return user attributes by trial id, in the order in which they came up in the study."""
    table = trial_user_attributes
    rows = conn.execute(
        select(
            table.c.key,
            func.array_agg(table.c.trial_id, type_=ARRAY(Integer)),
            func.array_agg(table.c.value_json, type_=ARRAY(Text)),
        )
        .where(table.c.trial_id.in_(of))
        .group_by(table.c.key)
        .order_by(func.min(table.c.trial_user_attribute_id))
    )
    attrs: dict[int, dict[str, Any]] = {}
    for key, trial_ids, texts in rows:
        for trial_id, value in zip(trial_ids, json_values(texts), strict=True):
            attrs.setdefault(trial_id, {})[key] = value
    return attrs


def _latest_reports(conn: Connection, of: Select[Any]) -> dict[int, tuple[int, float]]:
    table = trial_intermediate_values
    rows = conn.execute(
        select(table.c.trial_id, table.c.step, table.c.intermediate_value, table.c.intermediate_value_type)
        .ext(distinct_on(table.c.trial_id))
        .where(table.c.trial_id.in_(of))
        .order_by(table.c.trial_id, table.c.step.desc())
    )
    return {row.trial_id: (row.step, number_of(row.intermediate_value, row.intermediate_value_type)) for row in rows}


def _trial(
    row: Row[Any],
    params: dict[int, dict[str, Any]],
    attrs: dict[int, dict[str, Any]],
    latest: dict[int, tuple[int, float]],
) -> TrialRecord:
    last_step, last_value = latest.get(row.trial_id, (None, None))
    return TrialRecord(
        trial_id=row.trial_id,
        number=row.number,
        state=row.state,
        value=None if row.value_type is None else number_of(row.value, row.value_type),
        started_at=_utc(row.datetime_start),
        ended_at=_utc(row.datetime_complete),
        last_step=last_step,
        last_value=last_value,
        params=params.get(row.trial_id, {}),
        user_attrs=attrs.get(row.trial_id, {}),
    )


def _attribute_text(value_json: str) -> str:
    """Return an attribute that is text as a rule; another program may have set any JSON by its name."""
    value = json.loads(value_json)
    return value if isinstance(value, str) else value_json


def _utc(time: dt.datetime | None) -> dt.datetime | None:
    return None if time is None else time.replace(tzinfo=dt.UTC)
