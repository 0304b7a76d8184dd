"""What people may set of a sampler or a pruner of Optuna: which settings, of what type, in which range."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import optuna

from tuner.errors import UsageError
from tuner.study.params import MAX_INT

T = TypeVar("T")

_PLAIN_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
    "dict[str, Any]": (dict,),
}

# Callables and samplers cannot be written into a spec; the seed and the trials are the study's; the last two do nothing
# any more.
NOT_SETTABLE = {
    "seed",
    "number",
    "trials",
    "weights",
    "constraints_func",
    "independent_sampler",
    "source_trials",
    "restart_strategy",
    "inc_popsize",
}
# From where to where a setting works, both included: Optuna takes most of them as they are, and fails in a trial.
# The upper ends are where a trial's memory or time would go into the setting alone.
RANGES: dict[str, tuple[float, float]] = {
    "n_startup_trials": (0, MAX_INT),
    "n_ei_candidates": (1, 10**6),
    "prior_weight": (1e-10, 10**10),
    "sigma0": (1e-10, 10**10),
    "popsize": (3, 10**6),
    "percentile": (0, 100),
    "n_warmup_steps": (0, MAX_INT),
    "interval_steps": (1, MAX_INT),
    "n_min_trials": (1, MAX_INT),
    "min_resource": (1, MAX_INT),
    "max_resource": (1, MAX_INT),
    "reduction_factor": (2, MAX_INT),
    "min_early_stopping_rate": (0, 1000),
    "bootstrap_count": (0, MAX_INT),
    "epochs": (1, MAX_INT),
    "eta": (1.1, MAX_INT),
}


def _check_setting(what: str, key: str, annotation: object, value: Any) -> None:
    """Raise UsageError if a setting is of none of the types that Optuna's annotation names, or out of its range.

    Annotations that name other types are not checked.
    """
    wanted = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    names = {name.strip() for name in wanted.split("|")}
    if names <= _PLAIN_TYPES.keys() and not any(type(value) in _PLAIN_TYPES[name] for name in names):
        raise UsageError(f"{what}: {key} needs to be {wanted}, got {value!r}")
    if key in RANGES and isinstance(value, int | float):
        low, high = RANGES[key]
        if not low <= value <= high:
            end = f"at least {low}" if high == MAX_INT and value < low else f"within {low} to {high}"
            raise UsageError(f"{what}: {key} needs to be {end}, got {value!r}")


def parameters_of(kind: type[object]) -> dict[str, inspect.Parameter]:
    """Return what the class takes; where it hands others on, what the class that it is made from takes as well."""
    found: dict[str, inspect.Parameter] = {}
    for its in kind.__mro__:
        if "__init__" in vars(its):
            own = inspect.signature(its).parameters.values()
            found |= {one.name: one for one in own if one.kind is not one.VAR_KEYWORD and one.name not in found}
            if all(one.kind is not one.VAR_KEYWORD for one in own):
                break
    return found


def built(option: str, kind: type[T], name: str, settings: Mapping[str, Any], **ours: Any) -> T:
    """Return `kind(**settings, **ours)`, once it is sure that people may make these settings."""
    parameters = parameters_of(kind)
    known = [key for key in parameters if key not in NOT_SETTABLE]
    for key, value in settings.items():
        if key not in known:
            raise UsageError(f"{option} {name} has no setting {key!r}; it has: {', '.join(known) or 'none'}")
        _check_setting(f"{option} {name}", key, parameters[key].annotation, value)
    least, most = settings.get("min_resource"), settings.get("max_resource")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        raise UsageError(f"{option} {name}: min_resource needs to be at most max_resource, {most}, got {least}")
    try:
        with quiet():
            return kind(**{**ours, **settings})
    except (TypeError, ValueError) as error:
        raise UsageError(f"{option} {name} does not take these settings: {error}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna from saying that a sampler is experimental, that a setting goes in its next version, that it made a
    study in memory, or what we refuse.
    """
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "Fixed parameter|Choices for a categorical", UserWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
