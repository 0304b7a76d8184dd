"""What Optuna's tables can hold: numbers as a float or a NULL with a type, names of bounded length, 32-bit steps."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping
from typing import Any, Final

from storage.database.errors import InvalidWriteError
from storage.database.foreign import json_text
from storage.database.tables import STUDY_NAME_MAX_LENGTH

MAX_STEP: Final = 2**31 - 1  # PostgreSQL's integer


def stored(value: float) -> tuple[float | None, str]:
    """Return the column's value and its type."""
    if math.isfinite(value):
        return float(value), "FINITE"
    if math.isnan(value):
        return None, "NAN"
    return None, "INF_POS" if value > 0 else "INF_NEG"


def number_of(value: float | None, kind: str) -> float:
    """Return the number that a column's value and its type stand for; NaN for what is none."""
    if kind == "FINITE" and value is not None:
        return value
    return {"INF_POS": math.inf, "INF_NEG": -math.inf}.get(kind, math.nan)


def stored_objective(value: float) -> tuple[float | None, str]:
    """Return what `stored` does, for the value of a trial. Raises InvalidWriteError for NaN, which none can have."""
    if math.isnan(value):
        raise InvalidWriteError("a trial's value cannot be NaN; tell the trial as failed instead")
    return stored(value)


def checked_step(step: int) -> int:
    """Return the step. Raises InvalidWriteError if the column cannot hold it."""
    if not -MAX_STEP - 1 <= step <= MAX_STEP:
        raise InvalidWriteError(f"a step needs to be between {-MAX_STEP - 1} and {MAX_STEP}, got {step}")
    return int(step)


def checked_name(name: str, what: str) -> str:
    """Return the name of a study, a param or an attribute. Raises InvalidWriteError if the column cannot hold it."""
    if len(name) > STUDY_NAME_MAX_LENGTH:
        raise InvalidWriteError(
            f"{what} needs at most {STUDY_NAME_MAX_LENGTH} characters, got {len(name)}: {name[:40]!r}..."
        )
    if "\0" in name:
        raise InvalidWriteError(f"{what} cannot hold a NUL character, got {name!r}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidWriteError(f"{what} needs to be Unicode text, got {name!a}") from None
    return name


def json_texts(attrs: Mapping[str, Any]) -> dict[str, str]:
    """Return the attributes as JSON by name. Raises InvalidWriteError for what the columns cannot hold."""
    return {checked_name(key, "an attribute's key"): json_text(value) for key, value in attrs.items()}


def local_time(time: dt.datetime | None) -> dt.datetime | None:
    """Return naive local time, as Optuna gives it, of the naive UTC that its tables hold."""
    return None if time is None else time.replace(tzinfo=dt.UTC).astimezone().replace(tzinfo=None)


def utc_time(time: dt.datetime | None) -> dt.datetime | None:
    """Return the naive UTC that Optuna's tables hold of a local or an aware time."""
    return None if time is None else time.astimezone(dt.UTC).replace(tzinfo=None)
