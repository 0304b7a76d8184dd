"""Optuna's samplers and pruners as a spec names them."""

from __future__ import annotations

import inspect
import json
import math
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, GridSampler

from tuner.errors import UsageError
from tuner.seeds import derive_seed
from tuner.spec import PrunerName, PrunerSpec, SamplerName, SamplerSpec

if TYPE_CHECKING:
    from pydantic import JsonValue

    from tuner.objective import Objective


T = TypeVar("T")


class _Grid(GridSampler):
    def after_trial(self, *_: object) -> None:
        """Do nothing: the budget ends a study (Optuna's own ends the process's optimize loop, which is not run)."""


_SAMPLERS: dict[str, type[BaseSampler]] = {
    "tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
    "gp": optuna.samplers.GPSampler,
    "cmaes": optuna.samplers.CmaEsSampler,
    "qmc": optuna.samplers.QMCSampler,
    "grid": _Grid,
}
_PRUNERS: dict[str, type[BasePruner]] = {
    "median": optuna.pruners.MedianPruner,
    "percentile": optuna.pruners.PercentilePruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "asha": optuna.pruners.SuccessiveHalvingPruner,
    "none": optuna.pruners.NopPruner,
}
_PRUNER_DEFAULTS: dict[str, dict[str, Any]] = {"percentile": {"percentile": 25.0}}
# Callables and samplers cannot be written into a spec; the seed is the study's.
_NOT_SETTABLE = {
    "self",
    "seed",
    "gamma",
    "weights",
    "constraints_func",
    "independent_sampler",
    "source_trials",
}
# QMC draws one sequence and grid shuffles its cells once for the whole study: every worker the same way.
_ONE_SEQUENCE = {"qmc", "grid"}


def parse_choice(text: str) -> tuple[str, dict[str, JsonValue]]:
    """Split `median:n_warmup_steps=3,interval_steps=2` or `grid:{"search_space": {...}}` into name and settings."""
    name, _, rest = text.partition(":")
    if not rest:
        return name, {}
    if rest.startswith("{"):
        try:
            settings = json.loads(rest)
        except json.JSONDecodeError as error:
            raise UsageError(f"settings of {name!r} need to be JSON, got {rest!r}: {error}") from error
        return name, settings
    pairs = dict(pair.partition("=")[::2] for pair in rest.split(","))
    return name, {key: parse_value(value) for key, value in pairs.items()}


def parse_value(text: str) -> JsonValue:
    """Read a number, a boolean or any JSON as such, and everything else as the text it is."""
    try:
        value: JsonValue = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value


def sampler_spec(text: str, objective: Objective | None, points: int = 4) -> SamplerSpec:
    """Return the checked spec of `--sampler TEXT`.

    The grid is written out in the spec, so that all workers search the same one: where the text gives no
    `search_space`, it is what the objective suggests, continuous ranges cut into `points` values.
    """
    name, settings = parse_choice(text)
    if name not in _SAMPLERS:
        raise UsageError(f"--sampler needs one of {', '.join(get_args(SamplerName))}, got {name!r}")
    if name == "grid" and "search_space" not in settings:
        points = _as_points(settings.pop("points", points))
        if objective is None:
            raise UsageError(
                "--sampler grid needs the values of a plain function's params,"
                """ such as --sampler 'grid:{"search_space": {"lr": [0.1, 0.01]}}'"""
            )
        space: dict[str, JsonValue] = {key: _grid_values(value, points) for key, value in discover(objective).items()}
        settings = {**settings, "search_space": space}
    spec = SamplerSpec.model_validate({"name": name, "settings": settings})
    _build("--sampler", _SAMPLERS[name], name, {**settings, "seed": 0})
    return spec


def pruner_spec(text: str, epochs: int) -> PrunerSpec:
    """Return the checked spec of `--pruner TEXT`; hyperband's brackets end at `epochs` unless it says otherwise."""
    name, settings = parse_choice(text)
    if name not in _PRUNERS:
        raise UsageError(f"--pruner needs one of {', '.join(get_args(PrunerName))}, got {name!r}")
    defaults = {"max_resource": epochs} if name == "hyperband" else _PRUNER_DEFAULTS.get(name, {})
    spec = PrunerSpec.model_validate({"name": name, "settings": {**defaults, **settings}})
    build_pruner(spec)
    return spec


def build_sampler(spec: SamplerSpec, study_seed: int, number: int) -> BaseSampler:
    """Return the sampler for trial `number`.

    A new one for each trial, seeded by (study seed, number): what it suggests follows from the seed, the
    number and the study's finished trials, whichever worker runs it.
    """
    path = () if spec.name in _ONE_SEQUENCE else (number,)
    seed = derive_seed(study_seed, "sampler", *path)
    return _build("sampler", _SAMPLERS[spec.name], spec.name, {**spec.settings, "seed": seed})


def build_pruner(spec: PrunerSpec) -> BasePruner:
    """Return the study's pruner; a worker builds it once, as pruners remember what they have read."""
    return _build("--pruner", _PRUNERS[spec.name], spec.name, dict(spec.settings))


def grid_size(spec: SamplerSpec) -> int | None:
    """Return how many trials the grid has; None for the other samplers, which do not end."""
    if spec.name != "grid":
        return None
    space = spec.settings["search_space"]
    assert isinstance(space, dict)
    return math.prod(len(values) for values in space.values() if isinstance(values, list))


def discover(objective: Objective) -> dict[str, BaseDistribution]:
    """Return the params that the objective suggests, conditional ones included, by name.

    Suggests with each discrete param at each of its values in turn, the others at their first: a param that is
    asked for only under two conditions at once is not found.
    """
    found = _suggested(objective, {})
    queue = list(found.items())
    while queue:
        name, distribution = queue.pop()
        for value in _discrete_values(distribution):
            for other, its in _suggested(objective, {name: value}).items():
                if other not in found:
                    found[other] = its
                    queue.append((other, its))
    return found


def _suggested(objective: Objective, fixed: dict[str, Any]) -> dict[str, BaseDistribution]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    first = {**_first_values(objective), **fixed} if fixed else {}
    study.enqueue_trial(first)
    trial = study.ask()
    objective.suggest(trial)
    return dict(trial.distributions)


def _first_values(objective: Objective) -> dict[str, Any]:
    return {name: _discrete_values(its)[0] for name, its in _suggested(objective, {}).items() if _discrete_values(its)}


def _discrete_values(distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        values = range(distribution.low, distribution.high + 1, distribution.step)
        return list(values) if len(values) <= 64 else [distribution.low]
    return []


def _grid_values(distribution: BaseDistribution, points: int) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is not None and not distribution.log and (high - low) / step < points:
        return [low + step * index for index in range(int((high - low) / step) + 1)]
    shares = [index / max(points - 1, 1) for index in range(points)]
    if distribution.log:
        values = [low * (high / low) ** share for share in shares]
    else:
        values = [low + (high - low) * share for share in shares]
    if isinstance(distribution, IntDistribution):
        steps = sorted({round((value - low) / distribution.step) for value in values})
        return [distribution.low + index * distribution.step for index in steps]
    return [min(max(value, low), high) for value in values]


def _as_points(value: object) -> int:
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"--sampler grid needs points to be a whole number above 0, got {value!r}")
    return value


def _build(option: str, kind: type[T], name: str, settings: dict[str, Any]) -> T:
    known = [key for key in inspect.signature(kind.__init__).parameters if key not in _NOT_SETTABLE]
    for key in settings:
        if key not in known and key != "seed":
            listed = ", ".join(known) or "none"
            raise UsageError(f"{option} {name} has no setting {key!r}; it has: {listed}")
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{option} {name} does not take these settings: {error}") from error
