"""A study's trials as `tuner trials` shows them: their order, and a line for each."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tuner.text import number_text, params_text, table

if TYPE_CHECKING:
    from storage.coordination.records import TrialRecord
    from storage.coordination.studies import Direction

_BY_STATE = ("COMPLETE", "PRUNED", "RUNNING", "WAITING", "FAIL")
_NAMES = ("number", "state", "value", "step", "seconds")


def best_first(trials: Sequence[TrialRecord], direction: Direction) -> list[TrialRecord]:
    """Return the trials sorted by value, the best first: complete ones, pruned ones, and those without a value."""
    sign = 1 if direction == "minimize" else -1

    def rank(trial: TrialRecord) -> tuple[int, bool, float, int]:
        value = math.nan if trial.value is None else trial.value
        is_none = math.isnan(value)
        return _BY_STATE.index(trial.state), is_none, 0.0 if is_none else sign * value, trial.number

    return sorted(trials, key=rank)


def lines(trials: Sequence[TrialRecord], values: Mapping[int, Sequence[float]]) -> Iterator[str]:
    """Yield the table. `values` are those of trials of several objectives, by number.

    Params are told as `lr=0.1 units=64`, which a line is found by. On a terminal too narrow for that their names stand
    above, once. What a trial failed by comes last, and may be as long as it is.
    """
    first = [[*_fields(trial, values), params_text(trial.params)] for trial in trials]
    wide = list(table([*_NAMES, "params"], first))
    width = _width()
    if width is None or max(map(len, wide)) <= width:
        yield from table([*_NAMES, "params"], [_with_failure(*pair) for pair in zip(first, trials, strict=True)])
        return
    params = list(dict.fromkeys(name for trial in trials for name in trial.params))
    rows = [
        [*_fields(trial, values), *(_cell(trial.params, name) for name in params), _failure(trial)] for trial in trials
    ]
    yield from table([*_NAMES, *params, "failure" if any(row[-1] for row in rows) else ""], rows)


def step(trial: TrialRecord) -> int | None:
    """Return the step of a trial's value: the epoch that was its best, or else the last it reported."""
    best = trial.user_attrs.get("epoch")
    return best if isinstance(best, int) and trial.value is not None else trial.last_step


def _fields(trial: TrialRecord, values: Mapping[int, Sequence[float]]) -> list[Any]:
    at = step(trial)
    return [
        trial.number,
        trial.state.lower(),
        " ".join(map(number_text, values.get(trial.number, [trial.value]))),
        "-" if at is None else at,
        trial.user_attrs.get("seconds", "-"),
    ]


def _with_failure(row: list[Any], trial: TrialRecord) -> list[Any]:
    failure = _failure(trial)
    if not failure:
        return row
    return [*row[:-1], f"{row[-1]}: {failure}" if trial.params else failure]


def _failure(trial: TrialRecord) -> str:
    return str(trial.user_attrs.get("failure_message") or "")


def _cell(params: Mapping[str, Any], name: str) -> Any:
    if name not in params:
        return "-"
    value = params[name]
    return number_text(value) if isinstance(value, float) else value


def _width() -> int | None:
    """Return how wide the terminal is, None where there is none."""
    if (said := os.environ.get("COLUMNS", "")).isdecimal():
        return int(said)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return None
