"""Optuna's FrozenTrials, loaded with a few set-based queries whatever their number, column by column."""

from __future__ import annotations

import copy
import datetime as dt
import gc
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from operator import itemgetter
from typing import Any, Final, TypeAlias

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Connection,
    LargeBinary,
    Select,
    String,
    Table,
    Text,
    bindparam,
    cast,
    func,
    literal,
    null,
    select,
    union_all,
)

from storage.database.columns import (
    floats,
    int_array,
    integers,
    is_among,
    local_times,
    packed,
    sent_time,
    stored_number,
)
from storage.database.foreign import BAD, BadRowError, json_value, json_values, known_json, skipped
from storage.database.tables import (
    study_directions,
    trial_intermediate_values,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    trials,
)
from storage.trials.kinds import all_stand_for_values, checked_internal
from storage.trials.params import distribution_of, external_of

_Head: TypeAlias = tuple[int, int, dt.datetime | None, dt.datetime | None, TrialState, int]
LoadReports: TypeAlias = Callable[[TrialState], None]
"""Reads the intermediate values of a study's trials of one state."""

UNFINISHED = ("RUNNING", "WAITING")

_SCALARS = (str, int, float, bool, type(None))


class LazyTrial(FrozenTrial):
    """A finished trial whose intermediate values are read when somebody first asks for one trial's.

    Most are read by nobody: a sampler looks at params and values, and 50,000 trials of 20 steps are a million rows.
    """

    _load: LoadReports

    def __getattr__(self, name: str) -> Any:
        if name == "intermediate_values" and "_load" in self.__dict__:
            self._load(self.state)  # puts them into every lazy trial of that state, this one among them
            return self.__dict__[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FrozenTrial):
            return NotImplemented
        return plain(self).__dict__ == plain(other).__dict__

    __hash__ = FrozenTrial.__hash__

    def __repr__(self) -> str:
        return repr(plain(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restored, (plain(self).__dict__,))


def plain(trial: FrozenTrial) -> FrozenTrial:
    """Return the trial as Optuna's own class, its intermediate values loaded; the attributes are shared."""
    if not isinstance(trial, LazyTrial):
        return trial
    reports = trial.intermediate_values
    attributes = {name: value for name, value in trial.__dict__.items() if name != "_load"}
    return _restored({**attributes, "intermediate_values": reports})


def copied(trial: FrozenTrial) -> FrozenTrial:
    """Return a plain copy for its receiver to change; as a deep copy but 10 times faster.

    Distributions and choices, which nobody changes, are shared.
    """
    source = plain(trial).__dict__
    values = source["_values"]
    return _restored(
        {
            **source,
            "_values": None if values is None else list(values),
            "_params": dict(source["_params"]),
            "_distributions": dict(source["_distributions"]),
            "_user_attrs": _copied_json(source["_user_attrs"]),
            "_system_attrs": _copied_json(source["_system_attrs"]),
            "intermediate_values": dict(source["intermediate_values"]),
        }
    )


def trials_where(*conditions: ColumnElement[bool]) -> Select[Any]:
    """Select, for `load_trials`, the trials that meet one of the conditions, none of them two."""
    # A lookup each, as an OR of them may become a scan of the study.
    found = union_all(*(select(trials).where(condition) for condition in conditions)).subquery()
    return select(
        cast(found.c.state, Text),
        select(func.count()).where(study_directions.c.study_id == found.c.study_id).scalar_subquery(),
        packed(func.int4send(func.coalesce(found.c.number, -1))),
        packed(func.int4send(found.c.trial_id)),
        packed(sent_time(found.c.datetime_start)),
        packed(sent_time(found.c.datetime_complete)),
    ).group_by(found.c.state, found.c.study_id)


def load_trials(
    conn: Connection, query: Select[Any], values: dict[str, Any], lazily: LoadReports | None = None
) -> list[FrozenTrial]:
    """Return the trials by number, in two or three queries whatever their number.

    `query` is made by `trials_where`, `values` are its bound parameters. With `lazily`, finished trials come without
    intermediate values, and call it when they are asked for.
    """
    heads: list[_Head] = []
    for state, n_objectives, numbers, ids, starts, ends in conn.execute(query, values):
        columns = (integers(numbers), integers(ids), local_times(starts), local_times(ends))
        heads.extend(zip(*columns, repeat(TrialState[state]), repeat(n_objectives), strict=False))
    if not heads:
        return []
    heads.sort(key=itemgetter(0))
    with _no_collection():
        found = _contents(
            conn,
            [trial_id for _, trial_id, *_ in heads],
            [trial_id for _, trial_id, *_, state, _ in heads if lazily is None or not state.is_finished()],
        )
        return [_trial(*head[:-1], found, lazily) for head in heads if _is_usable(head, found)]


_ONE_TRIAL: Final = trials_where(trials.c.trial_id == bindparam("trial_id"))


def load_trial(conn: Connection, trial_id: int) -> FrozenTrial | None:
    """Return the trial, whole; None if there is none."""
    found = load_trials(conn, _ONE_TRIAL, {"trial_id": trial_id})
    return found[0] if found else None


def load_reports(conn: Connection, trial_ids: Sequence[int]) -> dict[int, dict[int, float]]:
    """Return the intermediate values by step of each trial that has any."""
    reports: dict[int, dict[int, float]] = defaultdict(dict)
    for step, ids, numbers in conn.execute(_REPORTS, {"reporting": int_array(trial_ids)}):
        for trial_id, number in zip(integers(ids), floats(numbers), strict=True):
            reports[trial_id][step] = number
    return reports


def fill_in(lazy: Iterable[FrozenTrial], reports: dict[int, dict[int, float]]) -> None:
    """Give lazy trials their intermediate values."""
    for trial in lazy:
        trial.__dict__["intermediate_values"] = reports.get(trial._trial_id, {})


def is_bare(trial: FrozenTrial) -> bool:
    """Whether the trial is lazy and has no intermediate values yet."""
    return "intermediate_values" not in trial.__dict__


class _Contents:
    """What trials have, by trial id."""

    def __init__(self) -> None:
        self.params: dict[int, dict[str, Any]] = defaultdict(dict)
        self.distributions: dict[int, dict[str, BaseDistribution]] = defaultdict(dict)
        self.values: dict[int, list[float]] = defaultdict(list)
        self.user_attrs: dict[int, dict[str, Any]] = defaultdict(dict)
        self.system_attrs: dict[int, dict[str, Any]] = defaultdict(dict)
        self.reports: dict[int, dict[int, float]] = {}
        self.bad: dict[int, str] = {}  # what cannot be read of trials that are skipped

    def add_params(self, name: str, distribution_json: str, ids: list[int], internals: list[float]) -> None:
        try:
            distribution = distribution_of(distribution_json)
        except BadRowError as error:
            self.bad.update(dict.fromkeys(ids, f"param {name!r}: {error}"))
            return
        external = external_of(distribution)
        if not all_stand_for_values(internals, distribution_json):
            ids, internals = self._without_bad(name, distribution_json, ids, internals)
        for trial_id, internal in zip(ids, internals, strict=True):
            self.params[trial_id][name] = external(internal)
            self.distributions[trial_id][name] = distribution

    def _without_bad(
        self, name: str, distribution_json: str, ids: list[int], internals: list[float]
    ) -> tuple[list[int], list[float]]:
        usable: dict[int, float] = {}
        for trial_id, internal in zip(ids, internals, strict=True):
            try:
                usable[trial_id] = checked_internal(internal, distribution_json)
            except BadRowError as error:
                self.bad[trial_id] = f"param {name!r}: {error}"
        return list(usable), list(usable.values())

    def add_attrs(self, part: str, key: str, ids: list[int], texts: list[str | None]) -> None:
        attrs = self.user_attrs if part == "user_attr" else self.system_attrs
        for trial_id, value, text in zip(ids, json_values(texts), texts, strict=True):
            if value is BAD:
                skipped(f"the attribute {key!r} of the trial of id {trial_id}", _fault(text))
            else:
                attrs[trial_id][key] = value

    def add_values(self, ids: list[int], numbers: list[float]) -> None:
        """Add those of the next objective."""
        for trial_id, number in zip(ids, numbers, strict=True):
            self.values[trial_id].append(number)


def _contents(conn: Connection, trial_ids: list[int], reporting: list[int]) -> _Contents:
    found = _Contents()
    bound = {"trial_ids": int_array(trial_ids)}
    for part, _, name, detail, ids, numbers, texts in sorted(conn.execute(_CONTENTS, bound), key=itemgetter(0, 1)):
        match part:
            case "param":
                found.add_params(name, detail, integers(ids), floats(numbers))
            case "value":
                found.add_values(integers(ids), floats(numbers))
            case "user_attr" | "system_attr":
                found.add_attrs(part, name, integers(ids), texts)
    if reporting:
        found.reports = load_reports(conn, reporting)
    return found


def _is_usable(head: _Head, found: _Contents) -> bool:
    """Whether a trial can be handed to Optuna's code, which expects what Optuna writes."""
    number, trial_id, *_, state, n_objectives = head
    n_values = len(found.values.get(trial_id, ()))
    why = found.bad.get(trial_id)
    if number < 0:
        why = "it has no number"
    elif n_values != n_objectives and (n_values or state == TrialState.COMPLETE):
        why = f"it has {n_values} values, its study {n_objectives} directions"
    if why is not None:
        skipped(f"the trial of id {trial_id}", why)
    return why is None


def _fault(text: str | None) -> str:
    try:
        json_value(text)
    except BadRowError as error:
        return str(error)
    return ""


def _trial(
    number: int,
    trial_id: int,
    start: dt.datetime | None,
    complete: dt.datetime | None,
    state: TrialState,
    found: _Contents,
    lazily: LoadReports | None,
) -> FrozenTrial:
    is_lazy = lazily is not None and state.is_finished()
    trial = (LazyTrial if is_lazy else FrozenTrial)(
        number=number,
        state=state,
        value=None,
        datetime_start=start,
        datetime_complete=complete,
        params=found.params.get(trial_id, {}),
        distributions=found.distributions.get(trial_id, {}),
        user_attrs=found.user_attrs.get(trial_id, {}),
        system_attrs=found.system_attrs.get(trial_id, {}),
        intermediate_values=found.reports.get(trial_id, {}),
        trial_id=trial_id,
        values=found.values.get(trial_id),
    )
    if is_lazy:
        del trial.__dict__["intermediate_values"]
        trial.__dict__["_load"] = lazily
    return trial


def _ids(table: Table) -> ColumnElement[bytes]:
    return packed(func.int4send(table.c.trial_id)).label("ids")


def _part(part: str, table: Table, by: Sequence[ColumnElement[Any]], data: Sequence[Any]) -> Select[Any]:
    """Select a table's columns grouped by what has few values in a study: names, distributions, objectives."""
    name, detail = (*by, null())[:2]
    # Objectives are numbered; names come in the order in which they came up.
    order = name if table is trial_values else func.min(table.primary_key.columns[0])
    columns = (literal(part, String), order, cast(name, Text), cast(detail, Text), _ids(table), *data)
    return select(*columns).where(is_among(table.c.trial_id, "trial_ids")).group_by(*by)


def _attrs_part(part: str, table: Table) -> Select[Any]:
    return _part(
        part,
        table,
        [table.c.key],
        [cast(null(), LargeBinary), func.array_agg(known_json(table.c.value_json), type_=ARRAY(Text))],
    )


_CONTENTS: Final = union_all(
    _part(
        "param",
        trial_params,
        [trial_params.c.param_name, trial_params.c.distribution_json],
        [packed(func.float8send(func.coalesce(trial_params.c.param_value, math.nan))), cast(null(), ARRAY(Text))],
    ),
    _part(
        "value",
        trial_values,
        [trial_values.c.objective],
        [
            packed(func.float8send(stored_number(trial_values.c.value, trial_values.c.value_type))),
            cast(null(), ARRAY(Text)),
        ],
    ),
    _attrs_part("user_attr", trial_user_attributes),
    _attrs_part("system_attr", trial_system_attributes),
)
_REPORTS: Final = (
    select(
        trial_intermediate_values.c.step,
        _ids(trial_intermediate_values),
        packed(
            func.float8send(
                stored_number(
                    trial_intermediate_values.c.intermediate_value,
                    trial_intermediate_values.c.intermediate_value_type,
                )
            )
        ),
    )
    .where(is_among(trial_intermediate_values.c.trial_id, "reporting"))
    .group_by(trial_intermediate_values.c.step)
    .order_by(trial_intermediate_values.c.step)
)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector, which would go through all that is made, and find none, a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _copied_json(attrs: dict[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, _SCALARS) else copy.deepcopy(value) for key, value in attrs.items()}


def _restored(attributes: dict[str, Any]) -> FrozenTrial:
    trial = FrozenTrial.__new__(FrozenTrial)
    trial.__dict__.update(attributes)
    return trial
