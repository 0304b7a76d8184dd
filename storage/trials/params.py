"""What the row of a param is to Optuna: a distribution, and a value of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution, json_to_distribution

from storage.database.foreign import BadRowError
from storage.trials.kinds import kind_of


@lru_cache(maxsize=1000)
def distribution_of(distribution_json: str) -> BaseDistribution:
    """Return the distribution. Raises BadRowError."""
    kind_of(distribution_json)
    try:
        return json_to_distribution(distribution_json)
    except (AssertionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadRowError(f"no distribution of Optuna's: {error}") from None


def external_of(distribution: BaseDistribution) -> Callable[[float], Any]:
    """Return what makes a param's value of the number that is stored for it."""
    if isinstance(distribution, CategoricalDistribution):
        choices: Sequence[Any] = distribution.choices
        return lambda internal: choices[int(internal)]
    return int if isinstance(distribution, IntDistribution) else float
