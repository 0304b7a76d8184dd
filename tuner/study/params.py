"""Params as a study holds them: which spaces it can hold, values of the right type, ranges as people write them."""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

if TYPE_CHECKING:
    from pydantic import JsonValue

MAX_INT = 2**53
"""Optuna's tables hold numbers as floats, which hold each whole number up to here."""
# What JSON does not take: a plus, no digit before the point or none behind it. 007 is no number.
_NUMBER = re.compile(r"[+-]?(?=\.?\d)(0|[1-9]\d*)?(\.\d*)?([eE][+-]?\d+)?", re.ASCII)


class ParamError(ValueError):
    """A param's space cannot be held, or a value is none of its own; the message begins with the param's name."""


def parse_value(text: str) -> JsonValue:
    """Read a number, a boolean or any JSON as such, and everything else - NaN and 1e999 too - as the text it is."""
    try:
        value: JsonValue = json.loads(text, parse_constant=str, parse_float=finite)
    except (ValueError, RecursionError):  # the second for thousands of brackets
        if len(text) > 40 or _NUMBER.fullmatch(text) is None:
            return text
        return int(text) if text[0] == "+" and text[1:].isdecimal() else finite(text)
    return value


def finite(text: str) -> float | str:
    """Read a number; one beyond floats, which JSON in a database cannot hold, stays text."""
    return number if math.isfinite(number := float(text)) else text


def check_number(name: str, text: str) -> None:
    """Raise ParamError for the text of a number that no study holds: not finite, or whole and one that floats round."""
    value = parse_value(text)
    try:
        number = float(text)
    except ValueError:
        return
    if number != value if isinstance(value, int) else not math.isfinite(number):
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise ParamError(
            f"{name}: a study holds finite numbers, and whole ones as far as floats hold each (2^53), got {shown};"
            f" if it is text, quote it as JSON: {name}='\"{shown}\"'"
        )


def check_distribution(name: str, distribution: BaseDistribution) -> None:
    """Raise ParamError if a study would not give back the values that this param was searched with."""
    if isinstance(distribution, CategoricalDistribution):
        for choice in distribution.choices:
            if not isinstance(choice, str | int | float | None) or isinstance(choice, enum.Enum):
                raise ParamError(
                    f"{name}: choices need to be text, numbers, True, False or None, got {choice!r}, which would come"
                    " back from the database as something else: suggest a name for each, and look the value up in a"
                    f" dict, as TABLE[trial.suggest_categorical({name!r}, list(TABLE))]"
                )
    elif isinstance(distribution, IntDistribution) and max(-distribution.low, distribution.high) > MAX_INT:
        raise ParamError(
            f"{name}: whole numbers need to be within 2^53 ({MAX_INT}) of 0, as a study keeps them as floats, got"
            f" {distribution.low} to {distribution.high}: end the range there, or suggest an exponent"
        )


def as_param(name: str, distribution: BaseDistribution, value: object, *, within: bool = True) -> Any:
    """Return a value from anywhere - JSON, a command line, a grid - as the param's own type.

    Raises ParamError if it cannot be one of the param's values; with `within` off, numbers beyond the range may.
    """
    if isinstance(distribution, CategoricalDistribution):
        found = _choice(distribution.choices, value)
        if found is None:
            raise _refusal(name, distribution, value)
        return found[0]
    number = parse_value(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise _refusal(name, distribution, value)
    if isinstance(distribution, IntDistribution):
        if isinstance(number, float) and not number.is_integer():
            raise _refusal(name, distribution, value)
        number = int(number)
        is_held = abs(number) <= MAX_INT
    else:
        number = float(number) if abs(number) < 2**1023 else math.inf
        is_held = math.isfinite(number)
    if not is_held or (within and not distribution._contains(number)):
        raise _refusal(name, distribution, value)
    return number


def range_text(distribution: BaseDistribution) -> str:
    """Return a param's values as people write them: `0.0001 to 0.03, log`, `8 to 64 in steps of 8`, `adam or sgd`."""
    if isinstance(distribution, CategoricalDistribution):
        *others, last = [str(choice) for choice in distribution.choices]
        return f"{', '.join(others)} or {last}" if others else last
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    text = f"{_number(distribution.low)} to {_number(distribution.high)}"
    is_plain = distribution.step is None or (isinstance(distribution, IntDistribution) and distribution.step == 1)
    text += "" if is_plain else f" in steps of {_number(distribution.step or 0)}"
    text += ", log" if distribution.log else ""
    return f"{text}, whole numbers" if isinstance(distribution, IntDistribution) else text


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _refusal(name: str, distribution: BaseDistribution, value: object) -> ParamError:
    return ParamError(f"{name}: {range_text(distribution)}; got {value!r}")


def _choice(choices: Sequence[Any], value: object) -> tuple[Any] | None:
    """Return the choice that is meant, None if it is none of them: first the same, then what reads the same."""
    rules: tuple[Callable[[Any], bool], ...] = (
        lambda choice: type(choice) is type(value) and (choice == value or choice is value),
        lambda choice: _plain(choice) == _plain(value),
        lambda choice: str(choice) == str(value) or parse_value(str(choice)) == parse_value(str(value)),
    )
    for is_meant in rules:
        for choice in choices:
            if is_meant(choice):
                return (choice,)
    return None


def _plain(value: object) -> object:
    """Return what tells 1 and 1.0 alike, and 1 and True apart."""
    return (isinstance(value, bool), value) if isinstance(value, int | float) else repr(value)
