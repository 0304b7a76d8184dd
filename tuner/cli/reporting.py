"""`tuner report` and `tuner importance`: a study on a page of its own, and which of its params matter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli.reading import AsJson, StudyName, print_json
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.errors import TunerError, UsageError
from tuner.text import table

if TYPE_CHECKING:
    from tuner.report.importance import Importance

DEFAULT_OUTPUT = "report.html"


@command
def report(
    settings: Settings,
    study: StudyName,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=f"File of the page (default: {DEFAULT_OUTPUT}).")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIRECTORY", help="An export of the study, for its figures on test.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the facts as JSON; a page is written with --output only.")
    ] = False,
) -> None:
    """Write all that there is to say of STUDY on one page of HTML, which needs no network."""
    from tuner.cli.status_view import fields
    from tuner.model.directory import current
    from tuner.model.manifest import read_manifest
    from tuner.study.joining import find_study

    engine = settings.open()
    found = find_study(engine, study)
    manifest = None if model is None else read_manifest(current(model))
    if manifest is not None and manifest.study != found.name:
        raise UsageError(f"--model needs an export of {found.name!r}, got one of {manifest.study!r} in {model}")
    from tuner.report.facts import gather

    facts = gather(engine, found)
    if output is not None or not as_json:
        from tuner.report.page import page, write_page

        place = output or Path(DEFAULT_OUTPUT).absolute()
        write_page(place, page(facts, manifest))
        if not as_json:
            say(f"wrote {place}")
    if as_json:
        exported = None if manifest is None else manifest.model_dump(mode="json")
        print_json({**fields(facts.status), **facts.as_json(), "model": exported})


@command
def importance(settings: Settings, study: StudyName, as_json: AsJson = False) -> None:
    """Show how much each param of STUDY has to do with its value, by fANOVA."""
    from tuner.study.joining import find_study

    engine = settings.open()
    found = find_study(engine, study)
    from tuner.report.facts import trials_of
    from tuner.report.importance import importances

    judged = importances(found, trials_of(engine, found))
    if as_json:
        print_json([_fields(its) for its in judged])
        return
    if not any(its.params for its in judged):
        raise TunerError(
            f"study {found.name!r} has no importances: {judged[0].problem};"
            " they take complete trials that differ in a param and in value"
        )
    for its in judged:
        for line in _lines(its):
            say(line)


def _fields(its: Importance) -> dict[str, Any]:
    return {**vars(its), "caveat": its.caveat}


def _lines(its: Importance) -> list[str]:
    if its.problem is not None:
        return [f"{its.metric}: {its.problem}"]
    of_all = "" if its.trials == its.complete else f" of {its.complete}"
    lines = [f"{its.metric}, by fANOVA over {its.trials}{of_all} complete trials"]
    most = max(its.params.values()) or 1.0
    rows = [[name, f"{share:6.1%}", "█" * round(30 * share / most)] for name, share in its.params.items()]
    lines += [f"  {line}" for line in list(table(["param", "share", ""], rows))[1:]]
    if its.left_out:
        lines.append(f"  not judged, as not every complete trial has them alike: {', '.join(its.left_out)}")
    if its.caveat is not None:
        lines.append(f"  with care: {its.caveat}")
    return lines
