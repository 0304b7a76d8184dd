"""What the benchmarks share: a database for the time of a run, the stock side, timing, and both sides in a table and
as ratios."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from optuna.storages import BaseStorage, RDBStorage, get_storage
from sqlalchemy import text

from storage import EmbeddedServer, ensure_schema, open_engine, parse_url
from storage.database.engine import engine_options

Times = dict[str, list[float]]
Ratios = dict[str, list[float]]
"""How one thing stood to another that was measured in turns with it, a value for each turn: the more the better."""


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of what each benchmark is told."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--ratios", type=Path, metavar="FILE", help="write the ratios of all turns there, as JSON")
    return parser


def write_ratios(file: Path | None, ratios: Ratios) -> None:
    """Write what was measured for whoever asked for it."""
    if file is not None:
        file.write_text(json.dumps(ratios))


def paired(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Return how many times as long one side took as the other, for each turn that both had."""
    return [one / other for one, other in zip(slow, fast, strict=False)]


def ratios_of_sides(stock: Times, ours: Times, turns: int, suffix: str) -> Ratios:
    """Return stock's times over ours, where the calls of one turn count as their median."""

    def by_turn(values: list[float]) -> list[float]:
        calls = math.ceil(len(values) / turns)
        return [statistics.median(values[start : start + calls]) for start in range(0, len(values), calls)]

    return {f"{what}, {suffix}": paired(by_turn(stock[what]), by_turn(values)) for what, values in ours.items()}


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
