"""`tuner dashboard` and `tuner doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.exits import ExitCode


@command
def dashboard(
    settings: Settings,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but a loopback one needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8080,
    allow_edit: Annotated[bool, typer.Option("--allow-edit", help="Allow the page to change studies.")] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="Answer for this Host as well; may be repeated."),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File of mode 0600 with the token (or TUNER_DASHBOARD_TOKEN).")
    ] = None,
) -> None:
    """Serve optuna-dashboard for the database, read-only unless --allow-edit, until interrupted."""
    from sqlalchemy import text

    from storage import EmbeddedServer, open_storage
    from tuner.dashboard.outages import Outages
    from tuner.dashboard.server import serve
    from tuner.dashboard.token import find_token

    settings.open().dispose()  # the schema, which a read-only connection could not make
    url = settings.storage_url()
    if settings.storage is None and not allow_edit:
        from storage import parse_url

        url = parse_url(EmbeddedServer(settings.data_dir).reader_url())
    outages = Outages(settings.log())
    shown = open_storage(url, read_only=not allow_edit, retry=outages)
    serve(
        shown,
        outages=outages,
        host=host,
        port=port,
        allow_edit=allow_edit,
        token=find_token(token_file, settings.log()),
        allowed_hosts=allowed_host or (),
        check=lambda: shown.sessions.statement(lambda conn: conn.execute(text("select 1")).scalar()),
        on_ready=lambda address: say(f"dashboard on {address}; Ctrl-C stops it", err=True),
    )


@command
def doctor(settings: Settings, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check what tuner needs on this machine; exit with 1 if anything is missing."""
    from tuner.doctor import check_all

    checks = check_all(settings.data_dir, settings.open)
    if as_json:
        print(json.dumps([{"check": check.name, "ok": check.ok, "found": check.found} for check in checks]))
    else:
        for check in checks:
            say(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<12}{check.found}")
    if not all(check.ok for check in checks):
        raise typer.Exit(ExitCode.FAILED)
