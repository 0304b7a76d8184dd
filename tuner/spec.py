"""The spec: everything that defines a study, stored with it at its creation. Only its budget changes after, by more."""

from __future__ import annotations

import datetime as dt
import shlex
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from tuner.errors import TunerError
from tuner.seeds import derive_seed

SamplerName = Literal["tpe", "random", "gp", "cmaes", "qmc", "grid"]
PrunerName = Literal["median", "percentile", "rungs", "hyperband", "asha", "none"]
Direction = Literal["maximize", "minimize"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
DataPlace = Literal["auto", "resident", "stream"]
CompileMode = Literal["default", "max-autotune"]
CompileBackend = Literal["inductor", "aot_eager"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ObjectiveSpec(_Frozen):
    """The objective: its name, the sha256 of its code and the options it was given."""

    name: str
    code_hash: str
    options: dict[str, JsonValue] = {}
    source: str | None = None
    """The code itself, where it was defined in a notebook or a script. It is for people: no process runs it."""

    @model_serializer(mode="wrap")
    def _without_none(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `source` out where there is none, so that specs, and what is known by them, are as they ever were."""
        dumped: dict[str, Any] = dump(self)
        if dumped.get("source") is None:
            dumped.pop("source", None)
        return dumped


class SamplerSpec(_Frozen):
    """A sampler of Optuna by name; `settings` are keyword arguments of its class."""

    name: SamplerName = "tpe"
    settings: dict[str, JsonValue] = {}


class PrunerSpec(_Frozen):
    """A pruner of Optuna, or ours, by name; `settings` are keyword arguments of its class."""

    name: PrunerName = "median"
    settings: dict[str, JsonValue] = {}


class Budget(_Frozen):
    """When a study is done.

    `trials` counts those that completed or were pruned. Failed trials do not count, but more than
    `max_failures` of them end the study. No trial starts later than `timeout_s` seconds after the study was
    created, by the database's clock.
    """

    trials: PositiveInt
    timeout_s: PositiveFloat | None = None
    max_failures: NonNegativeInt = 10


class Retry(_Frozen):
    """A trial whose worker was lost or stopped runs again, `max_attempts` times in all."""

    max_attempts: PositiveInt = 3


class TrainingSpec(_Frozen):
    """How each trial trains, as far as its result depends on it; what they mean is told by `tuner.training.Options`."""

    precision: Precision = "fp32"
    deterministic: bool = False
    compile: bool = False
    compile_mode: CompileMode = "default"
    compile_backend: CompileBackend = "inductor"
    cuda_graphs: bool = False
    patience: PositiveInt | None = None
    data: DataPlace = "auto"
    readers: NonNegativeInt | None = None
    prefetch: PositiveInt | None = None
    train_metrics: bool = False

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out how to compile where that is the default, so that specs, and what is known by them, stay."""
        dumped: dict[str, Any] = dump(self)
        for name, default in _HOW_TO_COMPILE.items():
            if dumped.get(name) == default:
                del dumped[name]
        return dumped


_HOW_TO_COMPILE = {name: TrainingSpec.model_fields[name].default for name in ("compile_mode", "compile_backend")}
"""What is left out of a spec where it is the default."""


class Confirms(_Frozen):
    """The study whose best trials are run again, by its name and when it was created: another may get its name."""

    study: str
    created_at: dt.datetime


class Spec(_Frozen):
    """What every worker of a study needs to know, apart from where the objective's code and data lie."""

    version: Literal[1] = 1
    objective: ObjectiveSpec
    metric: str
    direction: Direction
    sampler: SamplerSpec = SamplerSpec()
    pruner: PrunerSpec = PrunerSpec()
    audit: float = Field(default=0.0, ge=0.0, le=1.0)
    """The part of the trials to be pruned that run on to their end, to see how often the pruner is wrong."""
    budget: Budget
    epochs: PositiveInt
    seed: NonNegativeInt = Field(default=0, lt=2**63)
    history: str | None = None
    """The study whose finished trials the sampler was given to learn from, at the creation of this one."""
    retry: Retry = Retry()
    training: TrainingSpec = TrainingSpec()
    checkpoints: str = "database"
    """Where every worker finds the checkpoints of trials: `database`, a URL, or `local` for nowhere."""
    checkpoint_every_s: PositiveFloat = 30.0
    """A trial saves its state at most so often; what it trained since is lost with its process."""
    trial_timeout_s: PositiveFloat | None = None
    """An attempt that takes longer is killed, and its trial fails."""
    watchdog: bool | None = None
    """Whether a trial is killed that tells of no batch and no report for long; None for those whose batches are told
    of, which plain functions and loops of an objective's own do not."""
    confirms: Confirms | None = None
    """The study that this one is the confirmation of: it runs what `tuner confirm` enqueues, and nothing else."""

    @model_serializer(mode="wrap")
    def _without_audit(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `audit` out where there is none, so that specs, and what is known by them, are as they ever were."""
        dumped: dict[str, Any] = dump(self)
        if dumped.get("audit") == 0:
            dumped.pop("audit")
        return dumped

    def is_audited(self, number: int) -> bool:
        """Whether the trial of this number runs on if it is to be pruned, whichever worker runs it."""
        return derive_seed(self.seed, "audit", number) < self.audit * 2**32

    def trial_seed(self, number: int) -> int:
        """Return the seed of the trial of this number; no trial of a confirmation has one that the search had."""
        return derive_seed(self.seed, "trial" if self.confirms is None else "confirm", number)


CODE_HASH = "objective.code_hash"
_SOURCE = "objective.source"
"""It goes with the hash."""


def parse_spec(stored: object, study_name: str) -> Spec:
    """Return the spec as the database holds it for `study_name`.

    Raises TunerError if the study has none, being another program's, or one of a later version.
    """
    if stored is None:
        raise TunerError(
            f"study {study_name!r} has no spec: it was not created by tuner;"
            f" 'tuner adopt {shlex.quote(study_name)} OBJECTIVE' lets workers go on with it, 'tuner best' and"
            " 'tuner trials' read it"
        )
    try:
        return Spec.model_validate(stored)
    except ValidationError as error:
        version = stored.get("version") if isinstance(stored, dict) else None
        raise TunerError(
            f"study {study_name!r} has a spec of version {version}, this tuner reads version 1:"
            f" {first_problem(error)}; use the version of tuner that created it"
        ) from error


def differences(stored: Spec, wanted: Spec) -> list[str]:
    """Return one line for each setting in which the study's spec and the wanted one differ; hashes by 12 digits."""
    ours, theirs = dict(_leaves(wanted.model_dump())), dict(_leaves(stored.model_dump()))
    both = ours.keys() & theirs.keys()
    return [
        f"{name}: the study has {_shown(name, theirs)}, this command says {_shown(name, ours)}"
        for name in sorted(ours.keys() | theirs.keys())
        if name != _SOURCE and (name not in both or ours[name] != theirs[name])
    ]


def _shown(name: str, leaves: dict[str, Any]) -> Any:
    value = leaves.get(name, _HOW_TO_COMPILE.get(name.removeprefix("training."), "none"))
    return value[:12] if name == CODE_HASH else value


def first_problem(error: ValidationError) -> str:
    """Return pydantic's first complaint as `name: what is wrong, got value`."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg'].lower()}, got {problem['input']!r}"


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        elif value != {}:
            yield prefix + name, value
