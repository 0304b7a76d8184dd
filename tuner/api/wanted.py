"""The settings of a study as Python's arguments."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypedDict, get_type_hints

from pydantic import TypeAdapter, ValidationError

from tuner.api.planning import StudyPlan
from tuner.errors import UsageError
from tuner.spec import CompileBackend, CompileMode, DataPlace, Direction, Precision


class StudySettings(TypedDict, total=False):
    """What may be said of a study beside its objective, name, trials, epochs and options; None stands for the default.

    The times `timeout`, `trial_timeout` and `checkpoint_every` are in seconds, or text such as "90s", "15m", "2h".
    docs/command-line.md tells what each means, under the option of its name; `from_study` is `--from`.
    """

    sampler: str | None
    pruner: str | None
    audit: float | None
    direction: Direction | None
    seed: int | None
    from_study: str | None
    timeout: float | str | None
    max_failures: int | None
    trial_timeout: float | str | None
    watchdog: bool | None
    patience: int | None
    precision: Precision | None
    compile: bool | None
    compile_mode: CompileMode | None
    compile_backend: CompileBackend | None
    cuda_graphs: bool | None
    deterministic: bool | None
    train_metrics: bool | None
    data: DataPlace | None
    readers: int | None
    prefetch: int | None
    checkpoints: Literal["database", "local"] | str | None
    checkpoint_every: float | str | None


_FIELDS = {"compile": "compile_", "from_study": "from_"}
_TIMES = ("timeout", "trial_timeout", "checkpoint_every")


def study_plan(settings: Mapping[str, Any]) -> StudyPlan:
    """Return the plan of a study with these settings. Raises UsageError, naming the one that is wrong."""
    kinds = _kinds()
    given: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(kinds))}"
            raise UsageError(f"a study has no setting {name!r}; {hint}")
        if value is None:
            continue
        try:
            kinds[name].validate_python(value, strict=True)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"]
            raise UsageError(f"{name}: {problem[0].lower()}{problem[1:]}, got {value!r}") from error
        is_time = name in _TIMES and not isinstance(value, str)
        given[_FIELDS.get(name, name)] = f"{value:f}" if is_time else value
    return StudyPlan(given=frozenset(given), **given)


@cache
def _kinds() -> dict[str, TypeAdapter[Any]]:
    kinds = {"trials": int | None, "epochs": int | None, **get_type_hints(StudySettings)}
    return {name: TypeAdapter(kind) for name, kind in kinds.items()}
