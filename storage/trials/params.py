"""What the row of a param is to Optuna: a distribution, and a value of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution, json_to_distribution

from storage.database.foreign import BadRowError
from storage.trials.kinds import kind_of


class _List(list[Any]):
    """A choice that is a list, as stock Optuna takes them; the dashboard puts choices into sets."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(self))


class _Dict(dict[str, Any]):
    """A choice that is an object of JSON, likewise."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


@lru_cache(maxsize=1000)
def distribution_of(distribution_json: str) -> BaseDistribution:
    """Return the distribution. Raises BadRowError."""
    kind_of(distribution_json)
    try:
        return _with_hashes(json_to_distribution(distribution_json))
    except (AssertionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadRowError(f"no distribution of Optuna's: {error}") from None


def external_of(distribution: BaseDistribution) -> Callable[[float], Any]:
    """Return what makes a param's value of the number that is stored for it."""
    if isinstance(distribution, CategoricalDistribution):
        choices: Sequence[Any] = distribution.choices
        return lambda internal: choices[int(internal)]
    return int if isinstance(distribution, IntDistribution) else float


def _with_hashes(distribution: BaseDistribution) -> BaseDistribution:
    if isinstance(distribution, CategoricalDistribution):
        choices: Sequence[Any] = distribution.choices
        if any(isinstance(choice, list | dict) for choice in choices):
            distribution.choices = tuple(_with_hash(choice) for choice in choices)
    return distribution


def _with_hash(choice: Any) -> Any:
    if isinstance(choice, list):
        return _List(choice)
    return _Dict(choice) if isinstance(choice, dict) else choice
