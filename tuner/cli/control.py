"""`tuner enqueue`, `cancel`, `stop`, `pause`, `resume`, `release`, `delete`: what people do to a study."""

from __future__ import annotations

import difflib
import json
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli.growing import more
from tuner.cli.options import ask_first
from tuner.cli.reading import AsJson, StudyName
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.errors import TunerError, UsageError
from tuner.text import params_text

if TYPE_CHECKING:
    from pydantic import JsonValue
    from sqlalchemy import Engine

    from storage.coordination.standings import StudyState
    from tuner.study.joining import AnyStudy


@command
def enqueue(
    settings: Settings,
    study: StudyName,
    params: Annotated[list[str], typer.Argument(metavar="PARAM=VALUE...", help="Params to try: lr=0.01 units=64")],
    force: Annotated[bool, typer.Option("--force", help="Take a param that no trial has had, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Add a trial with these params to STUDY; a worker takes it before any new one.

    Params that are not given are sampled. The trial counts towards the
    study's budget like any other.
    """
    from storage.coordination import control, standings
    from storage.database.sessions import Sessions
    from tuner.study.joining import open_study

    engine = settings.open()
    opened = open_study(engine, study)
    if (confirms := opened.spec.confirms) is not None:
        raise TunerError(
            f"study {study!r} runs trials of {confirms.study!r} again, and no others;"
            f" 'tuner enqueue {shlex.quote(confirms.study)} PARAM=VALUE' adds one to be searched"
        )
    sessions = Sessions(engine)
    wanted = _checked(engine, opened, _pairs(params), force=force)
    standing = standings.look(sessions, opened.study_id)
    closed = standings.closed(standing, opened.budget)
    ended = standings.closed(replace(standing, state="open"), opened.budget)  # whether or not it was stopped as well
    if ended is not None and ended.limit is not None:
        raise TunerError(
            f"study {study!r} is finished, and would not run it: {ended.reason};"
            f" '{more(study, ended.limit)}' lets it go on"
        )
    number = control.enqueue(sessions, opened.study_id, wanted)
    if closed is not None and closed.final:
        say(f"trial {number} waits, but {closed.reason}", err=True)
    if as_json:
        print(json.dumps({"study": study, "number": number, "params": wanted}))
    else:
        say(f"enqueued trial {number}: {params_text(wanted)}")


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
        say(f"trial {number} waits; no worker of tuner ran it, and whoever did may go on writing to it")
    else:
        say(f"trial {number} waits; {worker} ran it, and drops it at its next report")


@command
def cancel(
    settings: Settings,
    study: StudyName,
    number: Annotated[int, typer.Argument(metavar="NUMBER", help="Number of a waiting trial.")],
    as_json: AsJson = False,
) -> None:
    """Take a waiting trial of STUDY back, such as one that was enqueued by mistake.

    It ends as failed, of class cancelled, and counts neither as a trial nor
    as a failure.
    """
    from storage import TrialNotWaitingError
    from storage.coordination import control
    from storage.database.sessions import Sessions
    from tuner.study.joining import find_study

    engine = settings.open()
    opened = find_study(engine, study)
    try:
        control.cancel(Sessions(engine), opened.study_id, number)
    except TrialNotWaitingError as error:
        raise TunerError(f"study {study!r}: {error}; 'tuner trials' lists them") from error
    if as_json:
        print(json.dumps({"study": study, "number": number, "cancelled": True}))
    else:
        say(f"trial {number} is cancelled")


@command
def delete(
    settings: Settings,
    study: StudyName,
    force: Annotated[
        bool, typer.Option("--force", help="Even while workers run its trials, which they then drop; asks nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete STUDY and all its trials from the database. Exported models and its confirmation stay."""
    from storage import LiveTrialsError
    from storage.coordination import control, standings
    from storage.database.sessions import Sessions
    from tuner.slot.shared_checkpoints import delete_checkpoints
    from tuner.study.confirming import find_companion
    from tuner.study.joining import find_study

    engine = settings.open()
    opened = find_study(engine, study)
    companion = find_companion(engine, opened)
    sessions = Sessions(engine)
    n_trials = standings.look(sessions, opened.study_id).n_trials
    ask_first(f"study {study} is deleted with its {n_trials} trials", yes=yes or force)
    try:
        control.delete_study(sessions, opened.study_id, force=force)
    except LiveTrialsError as error:
        raise TunerError(f"study {study!r} is not deleted: {error}, or pass --force") from error
    for line in delete_checkpoints(opened, settings.data_dir):
        say(line, err=True)
    if as_json:
        left = None if companion is None else companion.name
        print(json.dumps({"study": study, "deleted": True, "trials": n_trials, "confirmation": left}))
    else:
        say(f"deleted study {study} with {n_trials} trials")
    if companion is not None:
        name = companion.name
        say(f"its confirmation {name} stays: 'tuner delete {shlex.quote(name)}' deletes it, too", err=True)


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
    say(f"study {study} is {state}{back}")


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"enqueue needs PARAM=VALUE, got {text!r}")
        if name in pairs:
            raise UsageError(f"enqueue got {name!r} twice")
        pairs[name] = value
    return pairs


def _checked(engine: Engine, study: AnyStudy, wanted: dict[str, str], *, force: bool) -> dict[str, JsonValue]:
    """Return the params, given as text, as the study's trials have them, as far as it had any.

    Raises UsageError for a value that is none of the param's or that no study holds, and unless `force` for a param
    that no trial has had; InvalidWriteError for a name that the database cannot hold.
    """
    from storage.database.sessions import Sessions
    from storage.database.values import checked_name
    from storage.trials.creation import distributions_of, param_names
    from tuner.study.params import ParamError, as_param, check_number, parse_value

    sessions = Sessions(engine)
    known = distributions_of(sessions, study.study_id, [checked_name(name, "a param's name") for name in wanted])
    unknown = [name for name in wanted if name not in known]
    all_names = param_names(sessions, study.study_id) if unknown else []
    if all_names and not force:
        raise UsageError(_unknown(study.name, unknown[0], all_names))
    values = {name: parse_value(text) for name, text in wanted.items()}
    try:
        for name in unknown:
            check_number(name, wanted[name])
            say(f"no trial of study {study.name} has had a param {name!r} so far", err=True)
        return {name: as_param(name, known[name], value) if name in known else value for name, value in values.items()}
    except ParamError as error:
        raise UsageError(str(error)) from error


def _unknown(study: str, name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"they have had: {', '.join(names[:20])}."
    return f"no trial of study {study} has had a param {name!r}; {hint} --force enqueues it all the same"
