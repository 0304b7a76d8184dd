"""`tuner studies`, `trials`, `best` and `objectives`: what there is, read without importing torch."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.api.reading import best_fields, ran, trial_fields
from tuner.cli.one_trial import look
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.errors import UsageError
from tuner.text import number_text, printable, table

if TYPE_CHECKING:
    from storage.coordination.records import TrialRecord
    from tuner.study.joining import AnyStudy

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Name of the study.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# Prefixes of variables by which shells, linkers and interpreters can be told to run something.
_OF_SHELLS = ("BASH_", "DYLD_", "GIT_", "LD_", "PROMPT_")


@command
def studies(settings: Settings, as_json: AsJson = False) -> None:
    """List the studies of the database."""
    from storage.coordination import studies
    from storage.coordination.workers import Signs
    from tuner.study.status import states

    engine = settings.open()
    rows = []
    state_of, signs_of = states(engine)
    for summary in studies.summaries(engine):
        record = summary.study
        spec = record.spec or {}
        signs = signs_of.get(record.study_id, Signs())
        rows.append(
            {
                "study": record.name,
                "objective": spec.get("objective", {}).get("name"),
                "metric": ", ".join(record.metrics),
                "direction": ", ".join(record.directions),
                "budget": spec.get("budget", {}).get("trials"),
                "trials": asdict(summary.counts),
                "best": summary.best,
                "state": state_of.get(record.study_id),
                "workers_live": signs.live,
                "last_seen": None if signs.last_seen is None else signs.last_seen.isoformat(timespec="seconds"),
                "created_at": None if record.created_at is None else record.created_at.isoformat(timespec="seconds"),
            }
        )
    if as_json:
        print_json(rows)
        return
    _print_table(
        ["study", "objective", "state", "workers", "done", "running", "failed", "best", "created"],
        [
            [
                row["study"],
                row["objective"] or "-",
                row["state"] or "-",
                row["workers_live"],
                f"{row['trials']['complete'] + row['trials']['pruned']}/{row['budget'] or '-'}",
                row["trials"]["running"],
                row["trials"]["failed"],
                number_text(row["best"]),
                row["created_at"] or "-",
            ]
            for row in rows
        ],
        empty="no studies yet; 'tuner run digits' makes one",
    )


@command
def trials(
    settings: Settings,
    study: StudyName,
    sort: Annotated[
        str, typer.Option(metavar="number|value", help="By number, or by value with the best first.")
    ] = "number",
    number: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="Show all that is known of this trial instead.")
    ] = None,
    curve: Annotated[bool, typer.Option("--curve", help="With --number: its learning curve.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="With --curve: print CSV.")] = False,
    tensorboard: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the curves and params of all trials for TensorBoard instead."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the trials of STUDY, or show one of them."""
    from storage.coordination import records
    from storage.coordination.one_trial import last_attempts
    from tuner.cli import trials_view
    from tuner.study.joining import find_study

    if sort not in ("number", "value"):
        raise UsageError(f"--sort needs number or value, got {sort!r}")
    _check_together(number, curve=curve, as_csv=as_csv, as_json=as_json, tensorboard=tensorboard)
    engine = settings.open()
    opened = find_study(engine, study)
    if tensorboard is not None:
        from tuner.study.tensorboard import write_tensorboard

        n_written = write_tensorboard(engine, opened, tensorboard)
        say(f"wrote {n_written} trials; look at them by: tensorboard --logdir {shlex.quote(str(tensorboard))}")
        return
    if number is not None:
        one = look(engine, opened, number)
        if as_json:
            print_json(one.curve_fields() if curve else trial_fields(one.trial) | {"attempts": one.attempt_fields()})
            return
        shown = one.curve_csv() if as_csv else one.curve_lines() if curve else one.lines()
        say(*shown)
        return
    found = records.list_trials(engine, opened.study_id)
    values = records.all_values(engine, opened.study_id) if len(opened.directions) > 1 else {}
    if sort == "value":
        found = trials_view.best_first(found, opened.directions[0])
    if as_json:
        with engine.connect() as conn:
            attempts = last_attempts(conn, opened.study_id)
        print_json([trial_fields(trial) | ran(attempts, trial) | _all_values(opened, trial, values) for trial in found])
        return
    empty = "no trials yet" + ("" if opened.spec is None else f"; '{opened.worker_command}' runs some")
    for line in trials_view.lines(found, values) if found else [empty]:
        say(line)


@command
def best(
    settings: Settings,
    study: StudyName,
    as_json: AsJson = False,
    format_: Annotated[
        str,
        typer.Option("--format", metavar="text|json|env|flags", help="env: NAME=value lines; flags: --name value ..."),
    ] = "text",
    prefix: Annotated[
        str, typer.Option(help="What names begin with in --format env, apart from those that a shell uses.")
    ] = "TUNER_PARAM_",
) -> None:
    """Print the best params of STUDY."""
    from tuner.study.joining import find_study

    if format_ not in ("text", "json", "env", "flags"):
        raise UsageError(f"--format needs text, json, env or flags, got {format_!r}")
    if re.fullmatch(r"[A-Za-z]\w*_", prefix, re.ASCII) is None or prefix.upper() in _OF_SHELLS:
        raise UsageError(f"--prefix needs letters, digits and _, with a _ at its end, such as SEARCH_, got {prefix!r}")
    engine = settings.open()
    fields = best_fields(engine, find_study(engine, study))
    params: dict[str, Any] = fields["params"]
    if as_json or format_ == "json":
        print_json(fields)
    elif format_ == "env":
        for variable, value in _variables(params, prefix).items():
            print(_for_shell(f"{variable}={shlex.quote(_plain(value))}"))
    elif format_ == "flags":
        flags = " ".join(f"{shlex.quote('--' + name)} {shlex.quote(_plain(value))}" for name, value in params.items())
        print(_for_shell(flags))
    else:
        epoch = "" if fields["epoch"] is None else f", epoch {fields['epoch']}"
        say(f"{fields['metric']} {number_text(fields['value'])} (trial {fields['number']}{epoch})")
        for name, value in params.items():
            say(f"  {name} = {_plain(value)}")
        weights, trained = fields["parameters"], fields["trained_parameters"]
        if isinstance(weights, int) and isinstance(trained, int):  # a function may have set anything
            say(f"{weights:,} parameters{'' if trained == weights else f', {trained:,} of them trained'}")


@command
def objectives(settings: Settings, as_json: AsJson = False) -> None:  # noqa: ARG001 - every command takes them
    """List the installed objectives."""
    from tuner.study.registry import installed_objectives

    found = [{"name": source.name, "summary": source.summary()} for source in installed_objectives()]
    if as_json:
        print_json(found)
        return
    _print_table(["objective", "summary"], [list(row.values()) for row in found], empty="no objectives are installed")


def print_json(value: Any) -> None:
    """Print one line of JSON, in which a number that is not finite is null, as JSON has no such numbers."""
    print(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_together(number: int | None, *, curve: bool, as_csv: bool, as_json: bool, tensorboard: Path | None) -> None:
    """Raise UsageError for options that do not go together."""
    if number is None and (curve or as_csv):
        raise UsageError(f"--{'curve' if curve else 'csv'} needs --number N, the trial that it is of")
    if as_csv and not curve:
        raise UsageError("--csv needs --curve: a trial has other things than a table to show")
    if as_csv and as_json:
        raise UsageError("--csv and --json are two forms of the same: leave one out")
    if tensorboard is not None and (number is not None or as_json):
        raise UsageError("--tensorboard writes all trials, and prints none: leave out --number and --json")


def _all_values(study: AnyStudy, trial: TrialRecord, values: dict[int, list[float]]) -> dict[str, Any]:
    """Return the values of a trial that can have several; `value` is the first."""
    return {"values": values.get(trial.number)} if len(study.directions) > 1 else {}


def _variables(params: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the values by the names of shell variables. Raises UsageError if two params would have the same."""
    names: dict[str, str] = {}
    for name in params:
        variable = prefix + re.sub(r"\W", "_", name, flags=re.ASCII).upper()
        if variable in names:
            raise UsageError(
                f"--format env: the params {names[variable]!r} and {name!r} would both be {variable}:"
                " take --format json or flags"
            )
        names[variable] = name
    return {variable: params[name] for variable, name in names.items()}


def _plain(value: Any) -> str:
    """Return a value as JSON writes it, text without quotes: what another program reads back."""
    return value if isinstance(value, str) else json.dumps(value)


def _print_table(names: list[str], rows: list[list[Any]], *, empty: str) -> None:
    for line in table(names, rows) if rows else [empty]:
        say(line)


def _for_shell(text: str) -> str:
    """Return what a shell is to read as it is, and a terminal as what it obeys nothing of."""
    return printable(text) if sys.stdout.isatty() else text
