"""`tuner status`: a study, its workers and what it cost, once or as it goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli.reading import AsJson, StudyName
from tuner.cli.settings import Settings, command
from tuner.cli.status_view import show

if TYPE_CHECKING:
    from tuner.study.status import Status


@command
def status(
    settings: Settings,
    study: StudyName,
    as_json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again and again until the study is finished, or Ctrl-C.")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How often, with --watch.")] = 2.0,
) -> None:
    """Show how far STUDY is: budget, trials, best, failures, workers and cost.

    With --watch the display stays in its place on a terminal; elsewhere each is a block of lines after the other,
    and with --json each is a line. It ends with 0 once the study is finished, and goes on while the
    database is away.
    """
    from tuner.launch.engine import Words
    from tuner.study.joining import find_study
    from tuner.study.status import look

    engine = settings.open()
    opened = find_study(engine, study)
    words = Words()

    def look_and_ask() -> Status:
        found = look(engine, opened)
        return replace(found, workers=words.added(found.workers))

    if watch:
        from tuner.cli.watching import follow

        follow(look_and_ask, settings.log(study=study), as_json=as_json, interval_s=interval)
    else:
        show(look_and_ask(), as_json=as_json)
