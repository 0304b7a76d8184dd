"""`tuner enqueue`, `stop`, `pause`, `resume`, `release` and `delete`: what people do to a study from any machine."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli.reading import AsJson, StudyName
from tuner.cli.settings import Settings, command
from tuner.errors import TunerError, UsageError
from tuner.text import params_text, printable

if TYPE_CHECKING:
    from pydantic import JsonValue
    from sqlalchemy import Engine

    from storage.coordination.claims import StudyState
    from tuner.study.joining import AnyStudy


@command
def enqueue(
    settings: Settings,
    study: StudyName,
    params: Annotated[list[str], typer.Argument(metavar="PARAM=VALUE...", help="Params to try: lr=0.01 units=64")],
    as_json: AsJson = False,
) -> None:
    """Add a trial with these params to STUDY; a worker takes it before any new one.

    Params that are not given are sampled. The trial counts towards the
    study's budget like any other.
    """
    from storage import InvalidWriteError
    from storage.coordination import claims, control
    from storage.database.sessions import Sessions
    from tuner.study.joining import open_study

    engine = settings.open()
    opened = open_study(engine, study)
    wanted = _pairs(params)
    _check_params(engine, opened, wanted)
    sessions = Sessions(engine)
    closed = claims.closed(claims.look(sessions, opened.study_id), opened.budget)
    try:
        number = control.enqueue(sessions, opened.study_id, wanted)
    except InvalidWriteError as error:
        raise UsageError(str(error)) from error
    if closed is not None and closed.final:
        print(f"trial {number} waits, but {closed.reason}", file=sys.stderr)
    if as_json:
        print(json.dumps({"study": study, "number": number, "params": wanted}))
    else:
        print(f"enqueued trial {number}: {params_text(wanted)}")


@command
def stop(settings: Settings, study: StudyName, as_json: AsJson = False) -> None:
    """Stop STUDY: its workers give their trials back at the next report, and end."""
    _set_state(settings, study, "stopped", as_json=as_json)


@command
def pause(settings: Settings, study: StudyName, as_json: AsJson = False) -> None:
    """Pause STUDY: its workers give their trials back at the next report, and wait."""
    _set_state(settings, study, "paused", as_json=as_json)


@command
def resume(settings: Settings, study: StudyName, as_json: AsJson = False) -> None:
    """Let STUDY go on: workers that wait claim again, new ones may join."""
    _set_state(settings, study, "open", as_json=as_json)


@command
def release(
    settings: Settings,
    study: StudyName,
    number: Annotated[int, typer.Argument(metavar="NUMBER", help="Number of a running trial.")],
    as_json: AsJson = False,
) -> None:
    """Put a running trial of STUDY back to waiting, for any worker to go on with.

    It keeps its number, params and checkpoint, and loses no attempt. Whoever
    runs it now drops it at the next report.
    """
    from storage import TrialNotRunningError
    from storage.coordination import claims
    from storage.database.sessions import Sessions
    from tuner.study.joining import find_study

    engine = settings.open()
    opened = find_study(engine, study)
    try:
        worker = claims.release_by_number(Sessions(engine), opened.study_id, number)
    except TrialNotRunningError as error:
        raise TunerError(f"study {study!r}: {error}; 'tuner trials' lists them") from error
    if as_json:
        print(json.dumps({"study": study, "number": number, "released": True, "worker": worker}))
    elif worker is None:
        print(f"trial {number} waits; no worker of tuner ran it, and whoever did may go on writing to it")
    else:
        print(f"trial {number} waits; {printable(worker)} ran it, and drops it at its next report")


@command
def delete(
    settings: Settings,
    study: StudyName,
    force: Annotated[
        bool, typer.Option("--force", help="Even while workers run its trials, which they then drop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete STUDY and all its trials from the database. Exported models stay."""
    from storage import LiveTrialsError
    from storage.coordination import claims, control
    from storage.database.sessions import Sessions
    from tuner.slot.shared_checkpoints import delete_checkpoints
    from tuner.study.joining import find_study

    engine = settings.open()
    opened = find_study(engine, study)
    sessions = Sessions(engine)
    n_trials = claims.look(sessions, opened.study_id).n_trials
    try:
        control.delete_study(sessions, opened.study_id, force=force)
    except LiveTrialsError as error:
        raise TunerError(f"study {study!r} is not deleted: {error}, or pass --force") from error
    for line in delete_checkpoints(opened, settings.data_dir):
        print(line, file=sys.stderr)
    if as_json:
        print(json.dumps({"study": study, "deleted": True, "trials": n_trials}))
    else:
        print(f"deleted study {study} with {n_trials} trials")


def _set_state(settings: Settings, study: str, state: StudyState, *, as_json: bool) -> None:
    from storage.coordination import control
    from storage.database.sessions import Sessions
    from tuner.study.joining import open_study

    engine = settings.open()
    opened = open_study(engine, study)
    running = control.set_state(Sessions(engine), opened.study_id, state)
    if as_json:
        print(json.dumps({"study": study, "state": state, "running": running}))
        return
    back = f"; workers give {running} running trials back at their next report" if running and state != "open" else ""
    print(f"study {study} is {state}{back}")


def _pairs(texts: list[str]) -> dict[str, JsonValue]:
    from tuner.study.sampling import parse_value

    pairs: dict[str, JsonValue] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"enqueue needs PARAM=VALUE, got {text!r}")
        if name in pairs:
            raise UsageError(f"enqueue got {name!r} twice")
        pairs[name] = parse_value(value)
    return pairs


def _check_params(engine: Engine, study: AnyStudy, wanted: dict[str, Any]) -> None:
    """Raise UsageError for a value that the study's trials do not have the param from; warn of a param they lack.

    A study knows its params by the trials that it has had, and a param may be one that few of them have.
    """
    from storage.database.sessions import Sessions
    from storage.trials.creation import distributions_of

    known = distributions_of(Sessions(engine), study.study_id, list(wanted))
    for name, value in wanted.items():
        if name not in known:
            print(f"no trial of study {study.name} has had a param {name!r} so far", file=sys.stderr)
            continue
        try:
            is_inside = known[name]._contains(known[name].to_internal_repr(value))
        except (ValueError, TypeError):
            is_inside = False
        if not is_inside:
            raise UsageError(f"{name} needs a value of {known[name]}, got {value!r}")
