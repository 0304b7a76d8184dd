"""`tuner status`, `studies`, `trials`, `best` and `objectives`: what there is, read without importing torch."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli.settings import Settings, command
from tuner.errors import UsageError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from storage.claims import NothingToClaim, Standing
    from storage.studies import StateCounts, TrialRecord
    from tuner.study import AnyStudy

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Name of the study.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@command
def status(settings: Settings, study: StudyName, as_json: AsJson = False) -> None:
    """Show how far STUDY is: its budget, its trials by state, its best and its failures."""
    from storage import claims, studies
    from storage.sessions import Sessions
    from tuner.study import Study, find_study

    engine = settings.open()
    opened = find_study(engine, study)
    spec = opened.spec
    counts = studies.count_states(engine, opened.study_id)
    best = _best_if_any(engine, opened)
    failures = studies.count_failures(engine, opened.study_id)
    standing = claims.look(Sessions(engine), opened.study_id)
    lost = standing.expired
    closed = claims.closed(standing, opened.budget) if isinstance(opened, Study) else None
    state, end = _state(standing, closed)
    if as_json:
        fields = {
            "study": opened.name,
            "state": state,
            "reason": end,
            "objective": None if spec is None else spec.objective.name,
            "metric": ", ".join(opened.metrics),
            "direction": ", ".join(opened.directions),
            "budget": None if spec is None else spec.budget.model_dump(mode="json"),
            "trials": asdict(counts),
            "lost": lost,
            "best": None if best is None else _best_fields(opened, best),
            "failures": failures,
        }
        print_json(fields)
        return
    rows = [
        ("study", f"{opened.name}: {'not of tuner' if spec is None else spec.objective.name}, {opened.goal}"),
        ("state", state if end is None else f"{state}: {end}"),
        ("trials", _counts_text(counts, None if spec is None else spec.budget.trials, lost)),
        ("best", "none yet" if best is None else f"{number_text(best.value)} (trial {best.number})"),
    ]
    if len(opened.directions) > 1:
        rows[-1] = ("best", f"no single one with {len(opened.directions)} objectives")
    if best is not None:
        rows.append(("params", params_text(best.params)))
    rows += [("failures", f"{count} {kind}: {message}") for kind, (count, message) in failures.items()]
    for name, text in rows:
        print(f"{name:<10}{printable(text)}")


@command
def studies(settings: Settings, as_json: AsJson = False) -> None:
    """List the studies of the database."""
    from storage import studies

    engine = settings.open()
    rows = []
    for summary in studies.summaries(engine):
        record = summary.study
        spec = record.spec or {}
        rows.append(
            {
                "study": record.name,
                "objective": spec.get("objective", {}).get("name"),
                "metric": ", ".join(record.metrics),
                "direction": ", ".join(record.directions),
                "budget": spec.get("budget", {}).get("trials"),
                "trials": asdict(summary.counts),
                "best": summary.best,
                "created_at": None if record.created_at is None else record.created_at.isoformat(timespec="seconds"),
            }
        )
    if as_json:
        print_json(rows)
        return
    _print_table(
        ["study", "objective", "done", "running", "failed", "best", "created"],
        [
            [
                row["study"],
                row["objective"] or "-",
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
def trials(settings: Settings, study: StudyName, as_json: AsJson = False) -> None:
    """List the trials of STUDY."""
    from storage import studies
    from tuner.study import find_study

    engine = settings.open()
    opened = find_study(engine, study)
    found = studies.list_trials(engine, opened.study_id)
    values = studies.all_values(engine, opened.study_id) if len(opened.directions) > 1 else {}
    if as_json:
        print_json([_trial_fields(trial) | _all_values(opened, trial, values) for trial in found])
        return
    _print_table(
        ["number", "state", "value", "step", "seconds", "params"],
        [
            [
                trial.number,
                trial.state.lower(),
                " ".join(map(number_text, values.get(trial.number, [trial.value]))),
                "-" if trial.last_step is None else trial.last_step,
                trial.user_attrs.get("seconds", "-"),
                trial.user_attrs.get("failure_message") or params_text(trial.params),
            ]
            for trial in found
        ],
        empty=f"no trials yet; 'tuner worker {opened.name}' runs some",
    )


@command
def best(
    settings: Settings,
    study: StudyName,
    as_json: AsJson = False,
    format_: Annotated[
        str,
        typer.Option("--format", metavar="text|json|env|flags", help="env: NAME=value lines; flags: --name value ..."),
    ] = "text",
) -> None:
    """Print the best params of STUDY."""
    from tuner.study import find_study

    if format_ not in ("text", "json", "env", "flags"):
        raise UsageError(f"--format needs text, json, env or flags, got {format_!r}")
    engine = settings.open()
    fields = best_fields(engine, find_study(engine, study))
    params: dict[str, Any] = fields["params"]
    if as_json or format_ == "json":
        print_json(fields)
    elif format_ == "env":
        for name, value in params.items():
            print(f"{_variable(name)}={shlex.quote(_plain(value))}")
    elif format_ == "flags":
        print(" ".join(f"{shlex.quote('--' + name)} {shlex.quote(_plain(value))}" for name, value in params.items()))
    else:
        epoch = "" if fields["epoch"] is None else f", epoch {fields['epoch']}"
        print(f"{fields['metric']} {number_text(fields['value'])} (trial {fields['number']}{epoch})")
        for name, value in params.items():
            print(f"  {name} = {_plain(value)}")


@command
def objectives(settings: Settings, as_json: AsJson = False) -> None:  # noqa: ARG001 - every command takes them
    """List the installed objectives."""
    from tuner.registry import installed_objectives

    found = [{"name": source.name, "summary": source.summary()} for source in installed_objectives()]
    if as_json:
        print_json(found)
        return
    _print_table(["objective", "summary"], [list(row.values()) for row in found], empty="no objectives are installed")


commands = {"status": status, "studies": studies, "trials": trials, "best": best, "objectives": objectives}


def best_fields(engine: Engine, study: AnyStudy) -> dict[str, Any]:
    """Return the best trial as `tuner best --json` prints it. Raises TunerError if none is complete."""
    from tuner.study import best_of

    return _best_fields(study, best_of(engine, study))


def number_text(value: float | None) -> str:
    """Return a number in at most six digits, `-` for none."""
    return "-" if value is None else f"{value:.6g}"


def params_text(params: dict[str, Any]) -> str:
    """Return params in one line, for people."""
    return " ".join(f"{name}={number_text(v) if isinstance(v, float) else v}" for name, v in params.items()) or "-"


def printable(text: str) -> str:
    """Return text of the database without characters that would move the cursor or forge a line."""
    if text.isprintable():  # a call for nearly all of 50,000 lines, not one for each of their characters
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def print_json(value: Any) -> None:
    """Print one line of JSON, in which a number that is not finite is null, as JSON has no such numbers."""
    print(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _best_if_any(engine: Engine, study: AnyStudy) -> TrialRecord | None:
    from storage import studies

    if len(study.directions) > 1:
        return None
    return studies.best_trial(engine, study.study_id, study.directions[0])


def _all_values(study: AnyStudy, trial: TrialRecord, values: dict[int, list[float]]) -> dict[str, Any]:
    """Return the values of a trial that can have several; `value` is the first."""
    return {"values": values.get(trial.number)} if len(study.directions) > 1 else {}


def _best_fields(study: AnyStudy, best: TrialRecord) -> dict[str, Any]:
    return {
        "study": study.name,
        "number": best.number,
        "value": best.value,
        "metric": study.metrics[0],
        "direction": study.directions[0],
        "params": best.params,
        "epoch": best.user_attrs.get("epoch"),
        "state": best.state,
        "seed": best.user_attrs.get("seed"),
    }


def _trial_fields(trial: TrialRecord) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state,
        "value": trial.value,
        "params": trial.params,
        "last_step": trial.last_step,
        "last_value": trial.last_value,
        "started_at": None if trial.started_at is None else trial.started_at.isoformat(),
        "ended_at": None if trial.ended_at is None else trial.ended_at.isoformat(),
        "user_attrs": trial.user_attrs,
    }


def _state(standing: Standing, closed: NothingToClaim | None) -> tuple[str, str | None]:
    """Return the study's state in a word, and the reason for it where workers can do nothing about it."""
    if standing.state != "open":
        return standing.state, None if closed is None else closed.reason
    if closed is not None and closed.final:
        return "finished", closed.reason
    return ("running" if standing.running > standing.expired else "idle"), None


def _counts_text(counts: StateCounts, budget: int | None, lost: int) -> str:
    again = f" ({lost} of them lost their worker and will run again)" if lost else ""
    of_budget = "" if budget is None else f"/{budget}"
    return (
        f"{counts.done}{of_budget} done ({counts.complete} complete, {counts.pruned} pruned),"
        f" {counts.running} running{again}, {counts.waiting} waiting, {counts.failed} failed"
    )


def _variable(name: str) -> str:
    """Return the param's name as one of a shell variable."""
    variable = re.sub(r"\W", "_", name, flags=re.ASCII).upper()
    return f"_{variable}" if variable[:1].isdigit() else variable


def _plain(value: Any) -> str:
    """Return a value as JSON writes it, text without quotes: what another program reads back."""
    return value if isinstance(value, str) else json.dumps(value)


def _print_table(names: list[str], rows: list[list[Any]], *, empty: str) -> None:
    """Print columns, the last one as wide as it is: a line a row, so that grep and awk work."""
    if not rows:
        print(empty)
        return
    texts = [names, *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(names) - 1)]
    for row in texts:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip())
