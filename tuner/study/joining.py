"""Creating a study with its spec, and joining one that exists."""

from __future__ import annotations

import datetime as dt
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from sqlalchemy import Engine

from storage.coordination import control, records, standings, studies
from storage.coordination.alike import N_ALIKE
from storage.coordination.records import TrialRecord
from storage.coordination.studies import StudyRecord
from storage.database.errors import StudyExistsError, StudyNotFoundError
from storage.database.sessions import Sessions
from tuner.errors import TunerError, UsageError
from tuner.spec import (
    CODE_HASH,
    Budget,
    Direction,
    ObjectiveSpec,
    PrunerSpec,
    SamplerSpec,
    Spec,
    TrainingSpec,
    differences,
    first_problem,
    parse_spec,
)
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
    def worker_command(self) -> str:
        """The command that runs its trials; whoever types it knows where an objective lies that is a file."""
        name = "" if self.spec is None else self.spec.objective.name
        return f"tuner worker {shlex.quote(self.name)}" + (f" --objective path/to/{name}" if ":" in name else "")

    @property
    def directory(self) -> str:
        """A name for a directory of this study's."""
        return directory_name(self.study_id, self.created_at)

    @property
    def goal(self) -> str:
        """What is searched for, as `maximize accuracy`."""
        pairs = zip(self.directions, self.metrics, strict=False)
        return ", ".join(f"{direction} {metric}" for direction, metric in pairs)


@dataclass(frozen=True, kw_only=True)
class Study(AnyStudy):
    """A study that tuner created: where it is in the database, and its spec."""

    spec: Spec

    def as_of(self, standing: standings.Standing) -> Study:
        """Return the study with its budget as it stands: it may have been raised since the study was opened."""
        if standing.budget is None:
            return self
        spec = self.spec.model_copy(update={"budget": Budget.model_validate(standing.budget)})
        return replace(self, spec=spec)

    @property
    def budget(self) -> standings.Budget:
        """The spec's budget as claims are decided by it."""
        budget = self.spec.budget
        return standings.Budget(
            trials=budget.trials,
            timeout_s=budget.timeout_s,
            max_failures=budget.max_failures,
            max_attempts=self.spec.retry.max_attempts,
        )


def budget_now(engine: Engine, study: Study) -> standings.Budget:
    """Return the study's budget, which may have been raised since it was opened; as it was if it was deleted since."""
    try:
        return standings.look(Sessions(engine), study.study_id).now_of(study.budget)
    except StudyNotFoundError:
        return study.budget


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


def create_study(engine: Engine, name: str, spec: Spec, history: Sequence[Mapping[str, Any]] | None = None) -> Study:
    """Create the study, whose sampler learns from `history` too. Raises StudyExistsError if the name is taken."""
    attrs = {
        "objective": spec.objective.name,
        "metric": spec.metric,
        "epochs": spec.epochs,
        "seed": spec.seed,
    }
    try:
        stored = spec.model_dump(mode="json")
        record = studies.create_study(engine, name, spec.direction, stored, attrs, spec.metric, history)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return _study(record)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A study as a command wants it: the arguments of `plan`, and which of these, or of their fields, it `given`."""

    source: ObjectiveSource
    kind: ObjectiveKind
    settings: Mapping[str, Any]
    given: frozenset[str]

    @cached_property
    def _planned(self) -> tuple[Spec, Objective | None]:
        return plan(self.source, self.kind, **self.settings)

    @property
    def spec(self) -> Spec:
        """The spec of a new study. Raises UsageError."""
        return self._planned[0]

    @property
    def objective(self) -> Objective | None:
        """The objective of a new study, None for a plain function. Raises UsageError."""
        return self._planned[1]

    def spec_beside(self, stored: Spec) -> Spec:
        """Return the spec with all that was not given as a study has it. Raises UsageError."""
        ours: dict[str, Any] = {name: its for name, its in self.settings.items() if name in self.given}
        is_class = is_objective_class(self.kind)
        known = self.kind.model_fields if is_objective_class(self.kind) else {}
        theirs: dict[str, Any] = {
            "epochs": stored.epochs if is_class else None,
            "sampler": stored.sampler,
            "pruner": stored.pruner,
            "audit": stored.audit,
            "direction": None if is_class else stored.direction,
            "seed": stored.seed,
            "history": stored.history,
            "checkpoints": stored.checkpoints,
            "checkpoint_every_s": stored.checkpoint_every_s,
        }
        for name, fields in (("budget", stored.budget), ("training", stored.training)):
            said = {field: its for field, its in self.settings[name] if field in self.given}
            theirs[name] = fields.model_copy(update=said)
        options = {name: its for name, its in stored.objective.options.items() if name in known}
        both = {"options": {**options, **self.settings["options"]}, "option_texts": self.settings["option_texts"]}
        return plan(self.source, self.kind, **{**theirs, **ours, **both})[0]


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A study that a command created or joined; `replaced` is the one that it took the place of, with `why`."""

    study: Study
    created: bool
    replaced: Study | None = None
    why: str = ""


def create_or_join(
    engine: Engine,
    name: str,
    wanted: Wanted,
    *,
    command: str,
    allow_code_change: bool | None = False,
    history: Callable[[], Sequence[Mapping[str, Any]] | None] = lambda: None,
) -> Joined:
    """Create the study of that name, or join it: what is not given is as the study has it.

    A study of which nothing is complete, and which nobody runs, is replaced if other code of its objective is here,
    or if it ended by its failures. `command` joins the study when nothing is given; `allow_code_change` is None where
    there is no such option. `history` is asked for only to create or replace it: the study that it is from need not be
    there any more to join this one. Raises TunerError that lists the differences if it exists with another spec; other
    code of the objective is none with `allow_code_change`.
    """
    spec = wanted.spec
    try:
        if spec.history is None or not _is_there(engine, name):
            return Joined(study=create_study(engine, name, spec, history()), created=True)
    except StudyExistsError:  # since
        pass
    study = open_study(engine, name)
    if study.spec.confirms is not None:
        parent = study.spec.confirms.study
        raise TunerError(
            f"study {name!r} confirms {parent!r}; 'tuner confirm {shlex.quote(parent)}' goes on with it, and so does"
            f" '{study.worker_command}'"
        )
    is_same = spec.objective.name == study.spec.objective.name
    is_other_code = spec.objective.code_hash != study.spec.objective.code_hash
    ended = why_failed(engine, study)
    if is_same and (ended or (is_other_code and not allow_code_change)):
        replaced = _replaced(engine, study, wanted, history)
        if replaced is not None:
            return replaced
    if is_same and is_other_code and not allow_code_change:
        goes_on = "" if ended or allow_code_change is None else ", --allow-code-change goes on with this one"
        raise TunerError(
            f"{wanted.source.file} is not what study {name!r} was created with: it has changed from"
            f" {study.spec.objective.code_hash[:12]} to {spec.objective.code_hash[:12]};"
            f" --study NAME starts a study with it{goes_on}"
        )
    found = differences(study.spec, wanted.spec_beside(study.spec))
    if allow_code_change:
        found = [line for line in found if not line.startswith(f"{CODE_HASH}: ")]
    if found and all(line.startswith("budget.") for line in found):
        raise TunerError(_other_budget(study, wanted.spec_beside(study.spec).budget, found))
    if found:
        joins = f"{command!r} joins it as it is, " if is_same else ""
        raise TunerError(
            f"study {name!r} exists with another spec ({'; '.join(found)});"
            f" {joins}--study NAME makes a study of its own"
        )
    return Joined(study=study, created=False)


def _replaced(
    engine: Engine, study: Study, wanted: Wanted, history: Callable[[], Sequence[Mapping[str, Any]] | None]
) -> Joined | None:
    """Delete the study and create it anew, with what was enqueued; None if any of it is done or somebody runs it."""
    spec, sessions = wanted.spec, Sessions(engine)
    if not sessions.snapshot(lambda conn: control.is_nothing_done(conn, study.study_id)):
        return None
    past = history()  # before anything is deleted: it may not be there
    enqueued = control.delete_if_nothing_done(sessions, study.study_id)
    if enqueued is None:
        return None
    if wanted.settings["direction"] is None and not is_objective_class(wanted.kind):  # it was asked for
        spec = spec.model_copy(update={"direction": study.spec.direction})
    new = create_study(engine, study.name, spec, past)
    for params in enqueued:
        control.enqueue(sessions, new.study_id, params)
    return Joined(study=new, created=True, replaced=study, why="; ".join(differences(study.spec, spec)))


def why_failed(engine: Engine, study: Study) -> str | None:
    """Return why the study ended by its failures, None if it did not."""
    with engine.connect() as conn:
        standing = standings.standing_of(conn, study.study_id)
    failed, allowed = standing.failures, standing.now_of(study.budget).max_failures
    if failed > allowed:
        failures = records.count_failures(engine, study.study_id)
        last = [message for kind, (_, message) in failures.items() if kind != standings.CANCELLED][-1]
        why = f"{failed} trials failed, more than the {allowed} allowed; the last: {last}"
    elif standing.alike is not None:
        why = f"{N_ALIKE} trials failed alike, and none is complete: {standing.alike}"
    else:
        return None
    again = "" if standing.done else "; once that is mended, the same 'tuner run' or 'tuner create' replaces the study"
    return f"study {study.name!r} ended: {why}; 'tuner trials {study.name}' lists them{again}"


def _is_there(engine: Engine, name: str) -> bool:
    try:
        studies.find_study(engine, name)
    except StudyNotFoundError:
        return False
    return True


def _other_budget(study: Study, wanted: Budget, found: list[str]) -> str:
    """Return what to say to who wants to join a study with another budget: how to raise it, or what to ask for."""
    more, less = [], []
    for option, here, there in (
        ("--trials", study.spec.budget.trials, wanted.trials),
        ("--max-failures", study.spec.budget.max_failures, wanted.max_failures),
    ):
        if there > here:
            more.append(f"{option} +{there - here}")
        elif there < here:
            less.append(f"{option} {here}")
    has_s, wants_s = study.spec.budget.timeout_s, wanted.timeout_s
    if has_s is not None and wants_s is not None and wants_s > has_s:
        more.append(f"--timeout {wants_s:g}s")
    elif has_s != wants_s:
        less.append("no --timeout" if has_s is None else f"--timeout {has_s:g}s")
    says = []
    if more:
        says.append(f"'tuner extend {shlex.quote(study.name)} {' '.join(more)}' adds to it")
    if less:
        says.append(f"{' and '.join(less)} joins it")
    return f"study {study.name!r} exists with another budget ({'; '.join(found)}); {', '.join(says)}"


def directory_name(study_id: int, created_at: dt.datetime | None) -> str:
    """Return the name of a study's directory, which no study of another database has."""
    created = "" if created_at is None else f"-{created_at.astimezone(dt.UTC):%Y%m%dT%H%M%S%f}"
    return f"study-{study_id}{created}"


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
    best = records.best_trial(engine, study.study_id, study.directions[0])
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
    sampler: str | SamplerSpec,
    pruner: str | PrunerSpec,
    audit: float = 0.0,
    direction: Direction | None,
    seed: int,
    history: str | None = None,
    training: TrainingSpec = TrainingSpec(),  # noqa: B008 - frozen
    checkpoints: str = Spec.model_fields["checkpoints"].default,
    checkpoint_every_s: float = Spec.model_fields["checkpoint_every_s"].default,
    trial_timeout_s: float | None = None,
    watchdog: bool | None = None,
    option_texts: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Spec, Objective | None]:
    """Return the checked spec of a study of `kind`, and the objective (None for a plain function).

    Sampler and pruner are texts as they were typed, or those of a study. A grid smaller than the budget's trials is the
    budget. `option_texts` are the options as they were typed. The
    objective suggests params once, so that a space that cannot be is told now. Raises UsageError that names the
    option or the line at fault.
    """
    from tuner.study.sampling import discover, grid_size, most_epochs, pruner_spec, sampler_spec, suited

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
        metric, direction, epochs = "value", direction or "minimize", 1
    if isinstance(pruner, str):
        pruner = pruner_spec(pruner, None if objective is None else most_epochs(objective, epochs))
    if isinstance(sampler, str):
        sampler = suited(sampler_spec(sampler, objective), pruner)
    spec = Spec(
        objective=ObjectiveSpec(
            name=source.name,
            code_hash=source.code_hash(),
            options={} if objective is None else objective.model_dump(mode="json"),
            source=source.text,
        ),
        metric=metric,
        direction=direction,
        sampler=sampler,
        pruner=pruner,
        audit=audit,
        budget=budget.model_copy(update={"trials": min(budget.trials, grid_size(sampler) or budget.trials)}),
        epochs=epochs,
        seed=seed,
        history=history,
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
