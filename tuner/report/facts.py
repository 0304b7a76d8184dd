"""The facts of a report, each a value that is drawn and that JSON has."""

from __future__ import annotations

import datetime as dt
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

from optuna.trial import FrozenTrial
from sqlalchemy import Connection, Engine

from storage.coordination import history, studies
from storage.coordination.history import Ended, Span
from storage.coordination.records import State
from storage.database.errors import StudyNotFoundError
from storage.database.sessions import Sessions
from storage.database.tables import trials as trial_rows
from storage.trials.curves import curves as curves_of
from storage.trials.frozen import load_trials, trials_where
from tuner.report.audit import Audit, Reports, audit
from tuner.report.importance import Importance, importances
from tuner.report.shown import a_study, choice_text, chosen, drawable, first_value
from tuner.study import comparison
from tuner.study.curves import as_rows
from tuner.study.joining import AnyStudy, find_study
from tuner.study.status import Status, look

if TYPE_CHECKING:
    from tuner.spec import Direction

MAX_DRAWN = 1000
"""Trials that are drawn one by one."""
MAX_CURVES = 100
MAX_SLOTS = 40
MAX_SPANS = 2000
CONFIRM_SUFFIX = "/confirm"
"""What the name of a study ends with whose trials run another study's best ones again."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What a param was in the best trials: from `low` to `high` where it is a number, else how often which choice."""

    low: float | None = None
    high: float | None = None
    choices: Mapping[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best trial, and how sure its params are: what they were in the `top` best of the complete trials.

    `runner_up` is the value of the next best trial; None without one.
    """

    number: int
    value: float
    params: Mapping[str, Any]
    epoch: Any
    runner_up: float | None
    top: int
    spread: Mapping[str, Spread]


@dataclass(frozen=True, kw_only=True)
class FrontTrial:
    """A trial of several objectives that no other is better than in all of them."""

    number: int
    values: Sequence[float]
    params: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HistoryPoint:
    """A trial that ended, in the order of the ends, with the study's `best` value then."""

    number: int
    state: State
    value: float | None
    best: float | None
    device_s: float


@dataclass(frozen=True, kw_only=True)
class CurveOf:
    """The learning curve of one trial, a row for each step; `rows` have the columns of `tuner trials --curve`."""

    number: int
    state: State
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What slots did: `spans`, those shorter than a pixel put together, of `shown` of the `slots` that there were."""

    attempts: int
    slots: int
    shown: int
    spans: Sequence[Span]


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """The same params run again: `values` of the complete trials, their mean and standard deviation (of a sample)."""

    params: Mapping[str, Any]
    values: Sequence[float]
    mean: float
    deviation: float | None


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """The companion study that ran the best trials again, the best mean first."""

    study: str
    repeated: Sequence[Repeated]


@dataclass(frozen=True, kw_only=True)
class Tested:
    """An evaluation on the test split, as `tuner export` recorded it."""

    trial: int
    weights_sha256: str
    metrics: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a report tells of a study. `trials` is how many it has; `drawn` are those that figures show.

    `best` is of a study of one objective, `front` of one of several, whose `history` is that of the first.
    """

    status: Status
    trials: int
    best: Best | None
    front: Sequence[FrontTrial]
    history: Sequence[HistoryPoint]
    curves: Sequence[CurveOf]
    n_curves: int
    importances: Sequence[Importance]
    audit: Audit | None
    timeline: Timeline | None
    confirmation: Confirmation | None
    tested: Sequence[Tested]
    drawn: Sequence[FrozenTrial]

    @property
    def study(self) -> AnyStudy:
        """The study as it stands."""
        return self.status.study

    @property
    def is_cut(self) -> bool:
        """Whether more trials ended than figures show one by one."""
        return len(self.drawn) < self.trials

    def as_json(self) -> dict[str, Any]:
        """Return the facts beyond the study's status, as JSON has them; times are ISO 8601."""
        named = {field.name: _json(getattr(self, field.name)) for field in fields(self)}
        named["drawn"] = [trial.number for trial in self.drawn]
        del named["status"], named["trials"]
        for importance, its in zip(self.importances, named["importances"], strict=True):
            its["caveat"] = importance.caveat
        return {"n_trials": self.trials, **named}


def gather(engine: Engine, study: AnyStudy) -> Facts:
    """Return the facts of a study. Raises StudyNotFoundError if it was deleted."""
    status, sessions = look(engine, study), Sessions(engine)
    study = status.study
    trials, ended, spans = sessions.snapshot(lambda conn: _read(conn, study.study_id))
    device_s = {trial.number: trial.device_s for trial in ended}
    finished = [trial for trial in trials if trial.state.is_finished()]
    direction, is_single = study.directions[0], len(study.directions) == 1
    shown = chosen(finished, direction, MAX_DRAWN)
    numbers = [trial.number for trial in chosen([t for t in finished if t.intermediate_values], direction, MAX_CURVES)]
    return Facts(
        status=status,
        trials=len(trials),
        best=_best(status, finished, direction) if is_single else None,
        front=() if is_single else _front(study, finished),
        history=_history(ended, direction, {trial.number for trial in shown}),
        curves=_curves(sessions, study, finished, numbers),
        n_curves=sum(bool(trial.intermediate_values) for trial in finished),
        importances=importances(study, finished),
        audit=_audit(finished, device_s, study) if is_single else None,
        timeline=_timeline(spans),
        confirmation=confirmation(engine, study),
        tested=tuple(
            Tested(trial=trial, weights_sha256=weights, metrics=metrics)
            for trial, weights, metrics in studies.list_exports(engine, study.study_id)
        ),
        drawn=drawable(shown),
    )


def confirmation(engine: Engine, study: AnyStudy) -> Confirmation | None:
    """Return what the study's companion of repeated trials says, None if there is none or nothing of it is complete."""
    try:
        companion = find_study(engine, study.name + CONFIRM_SUFFIX)
    except StudyNotFoundError:
        return None
    trials = Sessions(engine).snapshot(lambda conn: _read_trials(conn, companion.study_id))
    usable = [(trial, value) for trial in trials if (value := first_value(trial)) is not None]
    keyed = sorted(usable, key=lambda pair: repr(sorted(pair[0].params.items())))
    found = []
    for _, group in groupby(keyed, key=lambda pair: repr(sorted(pair[0].params.items()))):
        its = list(group)
        found.append(repeated(its[0][0].params, [value for _, value in its]))
    found.sort(key=lambda one: one.mean, reverse=companion.directions[0] == "maximize")
    return Confirmation(study=companion.name, repeated=found) if found else None


def repeated(params: Mapping[str, Any], values: Sequence[float]) -> Repeated:
    """Return what trials of the same params came to."""
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    deviation = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None
    return Repeated(params=params, values=values, mean=mean, deviation=deviation)


def trials_of(engine: Engine, study: AnyStudy) -> list[FrozenTrial]:
    """Return the study's trials."""
    return Sessions(engine).snapshot(lambda conn: _read_trials(conn, study.study_id))


def _read(conn: Connection, study_id: int) -> tuple[list[FrozenTrial], list[Ended], list[Span]]:
    return _read_trials(conn, study_id), history.ended(conn, study_id), history.spans(conn, study_id)


def _read_trials(conn: Connection, study_id: int) -> list[FrozenTrial]:
    return load_trials(conn, trials_where(trial_rows.c.study_id == study_id), {})


def _best(status: Status, finished: Sequence[FrozenTrial], direction: Direction) -> Best | None:
    best = status.best
    if best is None or best.value is None:
        return None
    ranked = [(value, trial) for trial in finished if (value := first_value(trial)) is not None]
    ranked.sort(key=lambda pair: pair[0], reverse=direction == "maximize")
    others = [value for value, trial in ranked if trial.number != best.number]
    top = ranked[: max(5, len(ranked) // 10)]
    return Best(
        number=best.number,
        value=best.value,
        params=best.params,
        epoch=best.user_attrs.get("epoch"),
        runner_up=others[0] if others else None,
        top=len(top),
        spread={name: spread([t.params[name] for _, t in top if name in t.params]) for name in best.params},
    )


def spread(values: Sequence[Any]) -> Spread:
    """Return what the values of a param have been."""
    if values and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return Spread(low=min(values), high=max(values))
    return Spread(choices=dict(Counter(str(choice_text(value)) for value in values).most_common()))


def _front(study: AnyStudy, finished: Sequence[FrozenTrial]) -> list[FrontTrial]:
    whole = [trial for trial in finished if trial.values and all(map(math.isfinite, trial.values))]
    best = a_study(drawable(whole), study).best_trials
    return [FrontTrial(number=trial.number, values=trial.values, params=trial.params) for trial in best[:MAX_CURVES]]


def _history(ended: Sequence[Ended], direction: Direction, numbers: set[int]) -> list[HistoryPoint]:
    curve = comparison.curve(ended, direction)
    return [
        HistoryPoint(
            number=trial.number,
            state=trial.state,
            value=trial.value,
            best=point.best,
            device_s=point.device_s,
        )
        for trial, point in zip(ended, curve, strict=True)
        if trial.number in numbers
    ]


def _curves(
    sessions: Sessions, study: AnyStudy, finished: Sequence[FrozenTrial], numbers: Sequence[int]
) -> list[CurveOf]:
    points = sessions.statement(lambda conn: curves_of(conn, study.study_id, numbers))
    states = {trial.number: cast(State, trial.state.name) for trial in finished}
    return [
        CurveOf(number=number, state=states[number], rows=as_rows(points[number], study.metrics[0]))
        for number in numbers
        if number in points
    ]


def _audit(finished: Sequence[FrozenTrial], device_s: Mapping[int, float], study: AnyStudy) -> Audit | None:
    reports = [
        Reports(
            number=trial.number,
            state=cast(State, trial.state.name),
            value=first_value(trial),
            by_step=trial.intermediate_values,
            device_s=device_s.get(trial.number, 0.0),
            epochs=_epochs(trial.params.get("epochs")),
        )
        for trial in finished
    ]
    return audit(reports, study.directions[0], None if study.spec is None else study.spec.epochs)


def _epochs(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _timeline(spans: Sequence[Span]) -> Timeline | None:
    """Return it; spans that follow one another on a slot and cannot be told apart by eye become one."""
    if not spans:
        return None
    busy: Counter[tuple[str, int]] = Counter()
    for span in spans:
        busy[span.worker, span.slot] += 1
    kept = {slot for slot, _ in busy.most_common(MAX_SLOTS)}
    whole = max(span.until for span in spans) - min(span.since for span in spans)
    pixel = whole * len(kept) / MAX_SPANS
    merged: dict[tuple[str, int], list[Span]] = {slot: [] for slot in kept}
    for span in spans:
        if (span.worker, span.slot) in kept:
            _add(merged[span.worker, span.slot], span, pixel)
    return Timeline(
        attempts=len(spans),
        slots=len(busy),
        shown=len(kept),
        spans=[span for slot in sorted(merged) for span in merged[slot]],
    )


def _add(earlier: list[Span], span: Span, pixel: dt.timedelta) -> None:
    last = earlier[-1] if earlier else None
    if last is None or span.until - last.since > pixel:
        earlier.append(span)
        return
    outcome = span.outcome if span.outcome == last.outcome else "several"
    earlier[-1] = Span(
        number=last.number,
        worker=last.worker,
        slot=last.slot,
        device=last.device,
        since=last.since,
        until=max(last.until, span.until),
        outcome=outcome,
    )


def _json(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return value.isoformat(timespec="milliseconds") if isinstance(value, dt.datetime) else value
