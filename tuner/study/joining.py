"""Creating a study with its spec, and joining one that exists."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from pydantic import ValidationError
from sqlalchemy import Engine

from storage.coordination import claims, studies
from storage.coordination.studies import StudyRecord, TrialRecord
from storage.database.errors import StudyExistsError
from tuner.errors import TunerError, UsageError
from tuner.spec import Budget, Direction, ObjectiveSpec, Spec, TrainingSpec, differences, first_problem, parse_spec
from tuner.study.registry import ObjectiveKind, ObjectiveSource, build_objective, is_objective_class

if TYPE_CHECKING:
    from pydantic import JsonValue

    from tuner.objective import Objective


@dataclass(frozen=True, kw_only=True)
class AnyStudy:
    """A study to look at; `spec` is None for one that another program created, or that was imported from one.

    `metrics` and `directions` are of its objectives. `created_at` is None for one that tuner did not create.
    """

    study_id: int
    name: str
    metrics: tuple[str, ...]
    directions: tuple[Direction, ...]
    spec: Spec | None
    created_at: dt.datetime | None = None

    @property
    def directory(self) -> str:
        """A name for a directory of this study's, which no study of another database has."""
        created = "" if self.created_at is None else f"-{self.created_at.astimezone(dt.UTC):%Y%m%dT%H%M%S%f}"
        return f"study-{self.study_id}{created}"

    @property
    def goal(self) -> str:
        """What is searched for, as `maximize accuracy`."""
        pairs = zip(self.directions, self.metrics, strict=False)
        return ", ".join(f"{direction} {metric}" for direction, metric in pairs)


@dataclass(frozen=True, kw_only=True)
class Study(AnyStudy):
    """A study that tuner created: where it is in the database, and its spec."""

    spec: Spec

    @property
    def budget(self) -> claims.Budget:
        """The spec's budget as claims are decided by it."""
        budget = self.spec.budget
        return claims.Budget(
            trials=budget.trials,
            timeout_s=budget.timeout_s,
            max_failures=budget.max_failures,
            max_attempts=self.spec.retry.max_attempts,
        )


OBJECTIVE_CODE_HASH = "objective.code_hash"


def open_study(engine: Engine, name: str) -> Study:
    """Return the study of that name. Raises StudyNotFoundError, or TunerError if tuner did not create it."""
    return _study(studies.find_study(engine, name))


def find_study(engine: Engine, name: str) -> AnyStudy:
    """Return the study of that name, whichever program created it. Raises StudyNotFoundError."""
    record = studies.find_study(engine, name)
    if record.spec is not None:
        return _study(record)
    return AnyStudy(
        study_id=record.study_id, name=name, metrics=record.metrics, directions=record.directions, spec=None
    )


def create_study(engine: Engine, name: str, spec: Spec) -> Study:
    """Create the study. Raises StudyExistsError if there is one of that name."""
    attrs = {
        "objective": spec.objective.name,
        "metric": spec.metric,
        "epochs": spec.epochs,
        "seed": spec.seed,
    }
    try:
        record = studies.create_study(engine, name, spec.direction, spec.model_dump(mode="json"), attrs, spec.metric)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return _study(record)


def create_or_join(engine: Engine, name: str, spec: Spec, *, allow_code_change: bool = False) -> tuple[Study, bool]:
    """Return the study of that name and whether it was created now.

    Raises TunerError that lists the differences if it exists with another spec; other code of the objective is
    none with `allow_code_change`.
    """
    try:
        return create_study(engine, name, spec), True
    except StudyExistsError:
        study = open_study(engine, name)
    found = differences(study.spec, spec)
    changed_code = f"{OBJECTIVE_CODE_HASH}: "
    if allow_code_change:
        found = [line for line in found if not line.startswith(changed_code)]
    if len(found) == 1 and found[0].startswith(changed_code):
        raise TunerError(
            f"the code of the objective is not the one that study {name!r} was created with ({found[0]});"
            " --study NAME starts a study with it, --allow-code-change goes on with this one"
        )
    if found:
        raise TunerError(
            f"study {name!r} exists with another spec ({'; '.join(found)});"
            " give the same options to join it, or --study NAME for a study of its own"
        )
    return study, False


def checkpoint_directory(data_dir: Path, study: AnyStudy) -> Path:
    """Return the directory that holds the checkpoints of the study's running trials, while there are any."""
    return data_dir / "checkpoints" / study.directory


def check_code(study: Study, source: ObjectiveSource, *, allow_code_change: bool) -> None:
    """Raise TunerError, naming both, if the objective here is not the study's: another name or other code."""
    wanted, found = study.spec.objective, source.code_hash()
    if source.name != wanted.name:
        raise TunerError(f"study {study.name!r} searches objective {wanted.name!r}, got {source.name!r}")
    if found != wanted.code_hash and not allow_code_change:
        raise TunerError(
            f"study {study.name!r} was created with other code of {wanted.name!r}: it has {wanted.code_hash[:12]},"
            f" {source.file} is {found[:12]}; install the same version, or pass --allow-code-change"
        )


def best_of(engine: Engine, study: AnyStudy) -> TrialRecord:
    """Return the study's best trial. Raises TunerError if none is complete, or none can be best."""
    if len(study.directions) > 1:
        raise TunerError(
            f"study {study.name!r} has {len(study.directions)} objectives ({study.goal}), and so no best trial;"
            f" 'tuner trials {study.name}' lists the values of all"
        )
    best = studies.best_trial(engine, study.study_id, study.directions[0])
    if best is None:
        raise TunerError(
            f"study {study.name!r} has no complete trial yet; 'tuner status {study.name}' shows its trials"
        )
    return best


def plan(
    source: ObjectiveSource,
    kind: ObjectiveKind,
    *,
    options: Mapping[str, JsonValue],
    budget: Budget,
    epochs: int | None,
    sampler: str,
    pruner: str,
    direction: Direction | None,
    seed: int,
    training: TrainingSpec = TrainingSpec(),  # noqa: B008 - frozen
    checkpoints: str = Spec.model_fields["checkpoints"].default,
    checkpoint_every_s: float = Spec.model_fields["checkpoint_every_s"].default,
    trial_timeout_s: float | None = None,
    watchdog: bool | None = None,
    option_texts: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Spec, Objective | None]:
    """Return the checked spec of a study of `kind`, and the objective (None for a plain function).

    A grid smaller than the budget's trials is the budget. `option_texts` are the options as they were typed. The
    objective suggests params once, so that a space that cannot be is told now. Raises UsageError that names the
    option or the line at fault.
    """
    from tuner.study.sampling import discover, grid_size, pruner_spec, sampler_spec

    objective = None
    if is_objective_class(kind):
        objective = build_objective(kind, options, seed, option_texts)
        discover(objective)
        _check_metric(kind)
        if direction not in (None, kind.direction):
            raise UsageError(f"--direction: {kind.__name__} says {kind.direction}, got {direction}")
        metric, direction, epochs = kind.metric, kind.direction, epochs or kind.epochs
        training = _with_own(training, kind)
    else:
        if options:
            raise UsageError(f"--set: the plain function {source.name} has no options, got {', '.join(options)}")
        if epochs is not None:
            raise UsageError(f"--epochs: the plain function {source.name} trains as long as it likes")
        if training != TrainingSpec():
            raise UsageError(f"--{_first_change(training)}: the plain function {source.name} trains as it likes")
        for name, value in (("checkpoints", checkpoints), ("checkpoint_every_s", checkpoint_every_s)):
            if value != Spec.model_fields[name].default:
                option = name.removesuffix("_s").replace("_", "-")
                raise UsageError(f"--{option}: the plain function {source.name} keeps no checkpoints")
        metric, direction, epochs = "value", direction or "minimize", 1
    sampler_ = sampler_spec(sampler, objective)
    spec = Spec(
        objective=ObjectiveSpec(
            name=source.name,
            code_hash=source.code_hash(),
            options={} if objective is None else objective.model_dump(mode="json"),
        ),
        metric=metric,
        direction=direction,
        sampler=sampler_,
        pruner=pruner_spec(pruner, epochs if objective is not None else None),
        budget=budget.model_copy(update={"trials": min(budget.trials, grid_size(sampler_) or budget.trials)}),
        epochs=epochs,
        seed=seed,
        training=training,
        checkpoints=checkpoints,
        checkpoint_every_s=checkpoint_every_s,
        trial_timeout_s=trial_timeout_s,
        watchdog=watchdog,
    )
    return spec, objective


def _check_metric(kind: type[Objective]) -> None:
    from tuner.training.record import OWN_NAMES

    if kind.metric in OWN_NAMES:
        raise UsageError(
            f"{kind.__name__}.metric: {kind.metric!r} is recorded of each trial anyway, give the metric another name"
        )


def _with_own(training: TrainingSpec, kind: type[Objective]) -> TrainingSpec:
    """Return how to train, with what the objective says where no option does. Raises UsageError."""
    own = {name: getattr(kind, name) for name in ("readers", "prefetch") if getattr(training, name) is None}
    try:
        return TrainingSpec.model_validate({**training.model_dump(), **own})
    except ValidationError as error:
        raise UsageError(f"{kind.__name__}.{first_problem(error)}") from error


def _first_change(training: TrainingSpec) -> str:
    default = TrainingSpec()
    changed = (name for name, value in training if value != getattr(default, name))
    return next(changed).replace("_", "-")


def _study(record: StudyRecord) -> Study:
    return Study(
        study_id=record.study_id,
        name=record.name,
        metrics=record.metrics,
        directions=record.directions,
        spec=parse_spec(record.spec, record.name),
        created_at=record.created_at,
    )
