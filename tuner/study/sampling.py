"""Samplers and pruners as a spec names them: Optuna's, and a pruner of ours."""

from __future__ import annotations

import inspect
import json
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, get_args

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, GridSampler, QMCSampler, RandomSampler
from optuna.trial import FrozenTrial

from storage.optuna_storage.rule_pruning import RungsPruner
from tuner.errors import UsageError, first_line
from tuner.seeds import derive_seed
from tuner.spec import PrunerName, PrunerSpec, SamplerName, SamplerSpec
from tuner.study.cmaes import SafeCmaEsSampler
from tuner.study.params import ParamError, as_param, check_distribution, finite, parse_value
from tuner.study.settings import built, parameters_of, quiet
from tuner.study.tpe import ScipyTPESampler

if TYPE_CHECKING:
    from pydantic import JsonValue

    from tuner.objective import Objective


MAX_POINTS = 1000
"""A param's values in a grid; more is a slip of the finger."""


class _Grid(GridSampler):
    """Optuna's, whose cells are `cells` where given: those of a conditional space, which a product has several times.

    Each holds what is suggested in it.
    """

    def __init__(
        self,
        search_space: Mapping[str, Sequence[Any]],
        cells: Sequence[Mapping[str, Any]] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(search_space, seed)
        if cells is not None:
            self._all_grids = [tuple(cell.get(name) for name in self._param_names) for cell in cells]
            self._n_min_trials = len(self._all_grids)
            self._rng.rng.shuffle(self._all_grids)  # type: ignore[arg-type]

    def after_trial(self, *_: object) -> None:
        """Do nothing: the budget ends a study (Optuna's own ends the process's optimize loop, which is not run)."""

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the cell's value as the param's own type. Raises ParamError if it cannot be one."""
        grid_id = trial.system_attrs.get("grid_id")
        if grid_id is None or param_name not in self._param_names:
            return super().sample_independent(study, trial, param_name, param_distribution)  # raises
        value = self._all_grids[grid_id][self._param_names.index(param_name)]
        return as_param(param_name, param_distribution, value, within=False)


class _QMC(QMCSampler):
    """Trial `number` takes the sequence's point of that number.

    Optuna's own counts the points in the database, first reading and then writing: two workers take the same.
    """

    def __init__(self, *, number: int, qmc_type: str = "sobol", scramble: bool = False, **others: Any) -> None:
        super().__init__(qmc_type=qmc_type, scramble=scramble, **others)
        self._number = number

    def _find_sample_id(self, *_: object) -> int:
        return self._number


_SAMPLERS: dict[str, type[BaseSampler]] = {
    "tpe": ScipyTPESampler,
    "random": RandomSampler,
    "gp": optuna.samplers.GPSampler,
    "cmaes": SafeCmaEsSampler,
    "qmc": _QMC,
    "grid": _Grid,
}
_PRUNERS: dict[str, type[BasePruner]] = {
    "median": optuna.pruners.MedianPruner,
    "percentile": optuna.pruners.PercentilePruner,
    "rungs": RungsPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "asha": optuna.pruners.SuccessiveHalvingPruner,
    "none": optuna.pruners.NopPruner,
}
_PRUNER_DEFAULTS: dict[str, dict[str, Any]] = {"percentile": {"percentile": 25.0}}
_OF_EPOCHS = {"hyperband": "max_resource", "rungs": "epochs"}
"""The setting of a pruner that is how many epochs a trial has, unless it is given."""
# QMC draws one sequence and grid shuffles its cells once for the whole study: every worker the same way.
_ONE_SEQUENCE = {"qmc", "grid"}
# These draw conditional params at random, and would log a line for each such param of each trial.
MAX_CELLS = 10_000
"""A larger grid of a conditional space has its cells several times; to suggest in each would take seconds."""
_WARN_OF_CONDITIONAL_PARAMS = {"gp", "cmaes", "qmc"}


def parse_choice(text: str) -> tuple[str, dict[str, JsonValue]]:
    """Split `median:n_warmup_steps=3,interval_steps=2` or `grid:{"search_space": {...}}` into name and settings."""
    name, _, rest = text.partition(":")
    if not rest:
        return name, {}
    if rest.startswith("{"):
        try:
            settings = json.loads(rest, parse_constant=str, parse_float=finite)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"settings of {name!r} need to be JSON, got {rest!r}: {error}") from error
        return name, settings
    pairs = [pair.partition("=") for pair in rest.split(",")]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise UsageError(f"settings of {name!r} need to be KEY=VALUE,KEY=VALUE or JSON, got {rest!r}")
    return name, {key: parse_value(value) for key, _, value in pairs}


def check_sampler_name(text: str) -> tuple[str, dict[str, JsonValue]]:
    """Return name and settings of `--sampler TEXT`. Raises UsageError if there is no sampler of that name."""
    name, settings = parse_choice(text)
    if name not in _SAMPLERS:
        raise UsageError(f"--sampler needs one of {', '.join(get_args(SamplerName))}, got {name!r}")
    return name, settings


def sampler_spec(text: str, objective: Objective | None, points: int = 4) -> SamplerSpec:
    """Return the checked spec of `--sampler TEXT`.

    The grid is written out in the spec, so that all workers search the same one: where the text gives no
    `search_space`, it is what the objective suggests, continuous ranges cut into `points` values.
    """
    name, settings = check_sampler_name(text)
    if name == "grid":
        settings = _grid_settings(settings, objective, points)
    spec = SamplerSpec.model_validate({"name": name, "settings": settings})
    build_sampler(spec, 0, 0)
    if "x0" in settings:
        _check_start(settings["x0"], objective)
    return spec


def _check_start(start: Any, objective: Objective | None) -> None:
    """Raise UsageError if CMA-ES cannot start from these params: it wants all that are numbers, as far as known."""
    numbers = {} if objective is None else discover(objective)
    numbers = {name: its for name, its in numbers.items() if not isinstance(its, CategoricalDistribution)}
    if missing := [name for name in numbers if name not in start]:
        raise UsageError(f"--sampler cmaes: x0 needs a value for {', '.join(missing)} too")
    for name, value in start.items():
        if objective is not None and name not in numbers:
            raise UsageError(f"--sampler cmaes: x0 has {name!r}; the numbers to search are: {', '.join(numbers)}")
        try:
            as_param(name, numbers.get(name, FloatDistribution(-1e300, 1e300)), value)
        except ParamError as error:
            raise UsageError(f"--sampler cmaes: x0: {error}") from error


def _grid_settings(settings: dict[str, JsonValue], objective: Objective | None, points: int) -> dict[str, JsonValue]:
    if "cells" in settings:
        raise UsageError("--sampler grid has no setting 'cells'; it has: search_space, points")
    if objective is None:
        if "search_space" not in settings:
            raise UsageError(
                "--sampler grid needs the values of a plain function's params,"
                """ such as --sampler 'grid:{"search_space": {"lr": [0.1, 0.01]}}'"""
            )
        _check_grid(settings["search_space"])
        return settings
    given, points = settings.get("search_space"), _as_points(settings.get("points", points))
    found = discover(objective)
    if given is None:
        space: dict[str, Any] = {name: _grid_values(its, points) for name, its in found.items()}
    else:
        _check_grid(given)
        assert isinstance(given, dict)
        space = {name: _typed(name, found.get(name), values) for name, values in given.items()}
        if missing := [name for name in found if name not in space]:
            raise UsageError(f"--sampler grid needs values for {', '.join(missing)}, which the objective suggests")
    _check_grid(space)
    others = {name: value for name, value in settings.items() if given is not None or name != "points"}
    is_conditional = any(its.keys() != space.keys() for its in _explored(objective))
    if is_conditional and math.prod(len(values) for values in space.values()) <= MAX_CELLS:
        return {**others, "search_space": space, "cells": _cells(objective, space, points)}
    return {**others, "search_space": space}


def _typed(name: str, distribution: BaseDistribution | None, values: Any) -> list[Any]:
    if distribution is None:
        return list(values)
    try:
        return [as_param(name, distribution, value, within=False) for value in values]
    except ParamError as error:
        raise UsageError(f"--sampler grid: {error}") from error


def _cells(objective: Objective, space: dict[str, Any], points: int) -> list[JsonValue]:
    """Return the grid's cells, each with the params that are suggested there alone.

    A param that `discover` did not find gets values in `space` too.
    """
    cells: list[JsonValue] = []
    queue: list[dict[str, Any]] = [{}]
    while queue:
        fixed = queue.pop()
        suggested = suggested_by(objective, fixed)
        name = next((name for name in suggested if name not in fixed), None)
        if name is None:
            cells.append({name: fixed[name] for name in suggested})
            continue
        values = space.setdefault(name, _grid_values(suggested[name], points))
        queue += [{**fixed, name: value} for value in reversed(values)]
    return cells


def suited(sampler: SamplerSpec, pruner: PrunerSpec) -> SamplerSpec:
    """Return the sampler as it is chosen beside the pruner.

    Beside rungs TPE's `gamma` is `sqrt` unless it is given: a search ends better by that, as docs/search.md tells.
    """
    if sampler.name != "tpe" or pruner.name != "rungs" or "gamma" in sampler.settings:
        return sampler
    return sampler.model_copy(update={"settings": {**sampler.settings, "gamma": "sqrt"}})


def pruner_spec(text: str, epochs: int | None) -> PrunerSpec:
    """Return the checked spec of `--pruner TEXT`; hyperband and rungs go by `epochs` unless it says otherwise.

    None is for a plain function, whose steps are not known: hyperband then ends its brackets at the last step of the
    trials that complete first, and rungs needs to be told.
    """
    name, settings = parse_choice(text)
    if name not in _PRUNERS:
        raise UsageError(f"--pruner needs one of {', '.join(get_args(PrunerName))}, got {name!r}")
    defaults = dict(_PRUNER_DEFAULTS.get(name, {}))
    if (setting := _OF_EPOCHS.get(name)) is not None:
        if epochs is None and name == "rungs" and setting not in settings:
            raise UsageError("--pruner rungs needs to know how often a plain function's trial reports: rungs:epochs=20")
        defaults[setting] = epochs or "auto"
    spec = PrunerSpec.model_validate({"name": name, "settings": {**defaults, **settings}})
    build_pruner(spec)
    return spec


def build_sampler(spec: SamplerSpec, study_seed: int, number: int) -> BaseSampler:
    """Return the sampler for trial `number`.

    A new one for each trial, seeded by (study seed, number): what it suggests follows from the seed, the
    number and the study's finished trials, whichever worker runs it.
    """
    path = () if spec.name in _ONE_SEQUENCE else (number,)
    ours: dict[str, Any] = {"seed": derive_seed(study_seed, "sampler", *path)}
    if spec.name in _WARN_OF_CONDITIONAL_PARAMS:
        ours["warn_independent_sampling"] = False
    if spec.name == "qmc":
        independent = RandomSampler(derive_seed(study_seed, "sampler", number))
        ours |= {"number": number, "independent_sampler": independent}
    return built("--sampler", _SAMPLERS[spec.name], spec.name, spec.settings, **ours)


def build_pruner(spec: PrunerSpec, trials: int | None = None) -> BasePruner:
    """Return the pruner of a study of so many trials; a worker builds it once, as pruners remember what they have read.

    Without `trials` they are many.
    """
    ours = {"trials": trials} if spec.name == "rungs" else {}
    return built("--pruner", _PRUNERS[spec.name], spec.name, spec.settings, **ours)


def grid_size(spec: SamplerSpec) -> int | None:
    """Return how many trials the grid has; None for the other samplers, which do not end."""
    if spec.name != "grid":
        return None
    cells, space = spec.settings.get("cells"), spec.settings["search_space"]
    if isinstance(cells, list):
        return len(cells)
    assert isinstance(space, dict)
    return math.prod(len(values) for values in space.values() if isinstance(values, list))


def random_start(spec: SamplerSpec) -> int:
    """Return how many trials have to be done before the sampler looks at any; 0 for one that does not wait."""
    parameters = parameters_of(_SAMPLERS[spec.name])
    default = parameters["n_startup_trials"].default if "n_startup_trials" in parameters else 0
    count: Any = spec.settings.get("n_startup_trials", default)
    return int(count)


def discover(objective: Objective) -> dict[str, BaseDistribution]:
    """Return the params that the objective suggests, conditional ones included, by name.

    Each discrete param is suggested at each of its values in turn, with the values that led to it: a param that
    needs two values at once, of which neither leads to the other, is not found.

    Raises UsageError, with the line, if `suggest` fails or a study could not hold what it suggests.
    """
    found: dict[str, BaseDistribution] = {}
    for suggested in _explored(objective):
        found |= {name: its for name, its in suggested.items() if name not in found}
    return found


def _explored(objective: Objective) -> Iterator[dict[str, BaseDistribution]]:
    seen: set[str] = set()
    queue: list[dict[str, Any]] = [{}]
    while queue:
        fixed = queue.pop()
        suggested = suggested_by(objective, fixed)
        for name, distribution in suggested.items():
            if name not in seen:
                queue += [{**fixed, name: value} for value in _discrete_values(distribution)]
        seen |= suggested.keys()
        yield suggested


def common_space(objective: Objective) -> dict[str, BaseDistribution]:
    """Return the params that the objective suggests whatever the others are, each as it always is."""
    common, *others = _explored(objective)
    return {name: its for name, its in common.items() if all(other.get(name) == its for other in others)}


def most_epochs(objective: Objective, epochs: int) -> int:
    """Return how many epochs a trial may have: the most of the param of this name, `epochs` where there is none."""
    most = []
    for suggested in _explored(objective):
        its = suggested.get("epochs")
        values = its.choices if isinstance(its, CategoricalDistribution) else [getattr(its, "high", epochs)]
        most += [int(value) for value in values if isinstance(value, int | float)]
    return max(most, default=epochs)


def drawn(objective: Objective) -> dict[str, Any]:
    """Return params of the objective, the same each time, for a model to look at before there is a trial."""
    with quiet():
        trial = optuna.create_study(sampler=RandomSampler(seed=0)).ask()
        objective.suggest(trial)
    return trial.params


def suggested_by(objective: Objective, fixed: dict[str, Any]) -> dict[str, BaseDistribution]:
    """Return what the objective suggests where these params are given. Raises UsageError as `discover` does."""
    with quiet():
        study = optuna.create_study(sampler=RandomSampler(seed=0))
        study.enqueue_trial(fixed)
        trial = study.ask()
        try:
            with suppress(optuna.TrialPruned):  # of params that do not go together
                objective.suggest(trial)
            for name, distribution in trial.distributions.items():
                check_distribution(name, distribution)
        except (Exception, SystemExit) as error:
            raise UsageError(f"{type(objective).__name__}.suggest failed: {_told(error, objective)}") from error
    return dict(trial.distributions)


def _told(error: BaseException, objective: Objective) -> str:
    """Return what went wrong, with the last line of the objective's own file that it passed, if it passed any."""
    file = inspect.getfile(type(objective))
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    told = str(error) if isinstance(error, ParamError) else f"{type(error).__name__}: {first_line(error)}"
    return f"{told} ({file}, line {own[-1].lineno})" if own else told


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
    shares = [index / max(points - 1, 1) for index in range(points)]
    if distribution.log:
        values = {min(max(low * (high / low) ** share, low), high) for share in shares}
        return sorted({round(value) for value in values} if isinstance(distribution, IntDistribution) else values)
    if step is None:
        return sorted({min(low + (high - low) * share, high) for share in shares})
    last = round((high - low) / step)
    indices = range(last + 1) if last < points else sorted({round(last * share) for share in shares})
    return [min(low + step * index, high) for index in indices]


def _check_grid(space: JsonValue) -> None:
    if not isinstance(space, dict) or not space:
        raise UsageError(f'--sampler grid needs a search_space such as {{"lr": [0.1, 0.01]}}, got {space!r}')
    for name, values in space.items():
        if not isinstance(values, list) or not values or any(isinstance(value, list | dict) for value in values):
            raise UsageError(f"--sampler grid needs a list of values for {name!r}, got {values!r}")


def _as_points(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_POINTS:
        raise UsageError(f"--sampler grid needs points to be a whole number in 1..{MAX_POINTS}, got {value!r}")
    return value
