"""`tuner import`: studies of other Optuna storages, copied into the database."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer

from tuner.cli.reading import print_json
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.log import PLAIN_INTERVAL_S
from tuner.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from storage.importing.studies import Imported
    from tuner.log import Log

_SHOWN_CHANGES = 10


@command
def import_(
    settings: Settings,
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            envvar="TUNER_IMPORT_URL",
            show_envvar=False,
            help="sqlite:///FILE, mysql+pymysql://user@host/database, postgresql://user@host/database, or the path of"
            " a SQLite or journal file (TUNER_IMPORT_URL).",
        ),
    ],
    study: Annotated[
        list[str] | None, typer.Option(help="Import this study only; may be repeated (default: all).")
    ] = None,
    new_name: Annotated[str | None, typer.Option("--as", metavar="NEWNAME", help="Name of the study here.")] = None,
    password_file: Annotated[
        Path | None, typer.Option(help="File of mode 0600 that holds the password for URL.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Copy studies from another Optuna storage, which is only read.

    Numbers, params, values, reports, attributes and times stay. Run it again
    after a crash, or for what is new: finished trials stay as they are here.

    A trial that is running there is waiting here, with its params and without
    reports, until an import finds it finished. A complete one whose value is
    NaN is failed here.

    'tuner best', 'status', 'trials' and the dashboard show imported studies.
    Workers go on only with those that tuner created in another PostgreSQL.
    """
    from storage.database.url import read_password
    from storage.importing.sources import open_source
    from storage.importing.studies import import_studies

    log = settings.log()
    password = None if password_file is None else read_password(password_file)
    with open_source(url, password) as source, _Progress(log) as progress:
        log.event("import", f"reading {source.shown}", source=source.shown)
        done = import_studies(source, settings.open(), names=study or (), new_name=new_name, progress=progress.show)
    if as_json:
        print_json([asdict(imported) for imported in done])
        return
    for imported in done:
        _print(imported)


def _print(imported: Imported) -> None:
    counts = f"{imported.copied} trials copied, {imported.updated} updated, {imported.already_there} there before"
    unfinished = f"; {imported.unfinished} are unfinished there and wait here" if imported.unfinished else ""
    say(f"{imported.study}: {counts}{unfinished}")
    for change in imported.changes[:_SHOWN_CHANGES]:
        about = "the study" if change.trial is None else f"trial {change.trial}"
        say(f"  {about}: {change.what}")
    if len(imported.changes) > _SHOWN_CHANGES:
        say(f"  and {len(imported.changes) - _SHOWN_CHANGES} more; --json lists them all")


class _Progress:
    """Shows how many trials are done: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._shown_at = time.monotonic()
        if log.format == "text" and log.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bars = Bars(*columns, console=log.console)

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, study: str, done: int, total: int) -> None:
        """Show that so many trials of a study are done."""
        if self._bars is not None:
            if study not in self._tasks:
                from rich.markup import escape

                # Its name is data, and no markup of rich.
                self._tasks[study] = self._bars.add_task(escape(printable(study)), total=total)
            self._bars.update(self._tasks[study], completed=done)
            return
        now = time.monotonic()
        if (total > 0 and done == total) or now - self._shown_at >= PLAIN_INTERVAL_S:
            self._shown_at = now
            text = f"{printable(study)}: {done} of {total} trials done"
            self._log.event("progress", text, study=study, done=done, trials=total)
