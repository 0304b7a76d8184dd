"""What the benchmarks share: a database for the time of a run, the stock side, timing, and a table of both sides."""

from __future__ import annotations

import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optuna.storages import BaseStorage, RDBStorage, get_storage
from sqlalchemy import text

from storage import EmbeddedServer, ensure_schema, open_engine, parse_url
from storage.database.engine import engine_options

Times = dict[str, list[float]]


@contextmanager
def database(url: str | None, max_connections: int | None = None) -> Iterator[str]:
    """The URL of a database with its tables: the one given, or an embedded server's that ends with the block.

    An embedded server lets in `max_connections`, if given.
    """
    if url is not None:
        _prepare(url)
        yield url
        return
    with tempfile.TemporaryDirectory() as directory:
        server = EmbeddedServer(Path(directory) / "data")
        try:
            server.start()
            if max_connections is not None:
                _let_in(server, max_connections)
            _prepare(server.url())
            yield server.url()
        finally:
            server.destroy()


def stock(url: str) -> BaseStorage:
    """Return Optuna's own storage as it opens a URL, with our settings of the session."""
    parsed = parse_url(url)
    return get_storage(
        RDBStorage(
            parsed.render_as_string(hide_password=False),
            engine_kwargs=engine_options(parsed, read_only=False, application_name="stock"),
            skip_table_creation=True,
        )
    )


@contextmanager
def timed(times: Times, name: str) -> Iterator[None]:
    """Add the milliseconds that the block takes."""
    start = time.perf_counter()
    yield
    times[name].append(1000 * (time.perf_counter() - start))


def print_machine(url: str) -> None:
    """Say what the figures were measured on."""
    engine = open_engine(url)
    with engine.connect() as conn:
        version = conn.scalar(text("SHOW server_version"))
    engine.dispose()
    cores = os.cpu_count()
    print(f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, PostgreSQL {version}")


def print_sides(title: str, stock: Times, ours: Times) -> None:
    """Print a line for each thing measured: median, minimum and maximum of both sides, and stock's median over ours."""
    heads = "".join(f"{side + ': median':>15}{'min':>10}{'max':>10}" for side in ("stock", "ours"))
    print(f"\n  {title:<32}{heads}{'ratio':>7}")
    for what, values in ours.items():
        row = (stock[what], values)
        medians = [statistics.median(side) for side in row]
        shown = "".join(f"{statistics.median(side):>15.2f}{min(side):>10.2f}{max(side):>10.2f}" for side in row)
        ratio = medians[0] / medians[1] if medians[1] else math.inf
        print(f"  {what:<32}{shown}{ratio:>7.1f}", flush=True)


def _prepare(url: str) -> None:
    engine = open_engine(url)
    ensure_schema(engine)
    engine.dispose()


def _let_in(server: EmbeddedServer, max_connections: int) -> None:
    engine = open_engine(server.admin_url())
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(text(f"ALTER SYSTEM SET max_connections = {max_connections:d}"))
    engine.dispose()
    server.stop()
    server.start()
