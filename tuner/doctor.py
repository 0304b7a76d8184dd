"""What tuner needs on a machine, checked for real: each check does what a run would do."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from sqlalchemy import Engine, text

from storage.database.errors import StorageError
from storage.files import UntrustedError, own_directory
from tuner.errors import TunerError
from tuner.study.registry import installed_objectives

MIN_FREE_BYTES = 1 << 30
TORCH_TIMEOUT_S = 120
MAX_CLOCK_S = 60


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check: what was looked at, whether it will do, and what was found."""

    name: str
    ok: bool
    found: str


class CheckFailedError(TunerError):
    """What was looked at will not do; the message says why and what to do."""


def check_all(data_dir: Path, open_database: Callable[[], Engine]) -> list[Check]:
    """Run every check; `open_database` connects as any command would, starting the embedded server if need be."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", _python),
        ("torch", _torch),
        ("data", lambda: _data_dir(data_dir)),
        ("database", lambda: _database(open_database, data_dir)),
        ("clock", lambda: _clock(open_database)),
        ("records", lambda: _records(open_database)),
        ("objectives", _objectives),
    ]
    return list(_run(checks))


def _run(checks: list[tuple[str, Callable[[], str]]]) -> Iterator[Check]:
    for name, check in checks:
        try:
            yield Check(name=name, ok=True, found=check())
        except (TunerError, StorageError, OSError) as error:
            yield Check(name=name, ok=False, found=str(error))


def _python() -> str:
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return f"{platform.python_version()} on {machine}, tuner {version('tuner')}"


def _torch() -> str:
    """Import torch in a process of its own, and run something on the device that trials would use."""
    code = (
        "import torch; from tuner.training.devices import choose_device, name_of; device = choose_device();"
        "name = name_of(device) or device.type;"
        "assert float(torch.ones(2, device=device).sum()) == 2; print(torch.__version__, 'on', name)"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=TORCH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CheckFailedError(f"torch did not import within {TORCH_TIMEOUT_S} s") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CheckFailedError(f"torch does not run: {last}; install it again")
    return done.stdout.strip()


def _data_dir(data_dir: Path) -> str:
    try:
        own_directory(data_dir)
        with tempfile.TemporaryFile(dir=data_dir):
            free = shutil.disk_usage(data_dir).free
    except UntrustedError as error:
        raise CheckFailedError(str(error)) from error
    except OSError as error:
        raise CheckFailedError(f"cannot write to {data_dir}: {error.strerror}; choose another --data-dir") from error
    if free < MIN_FREE_BYTES:
        raise CheckFailedError(f"{data_dir} has {free >> 20} MB free, wanted {MIN_FREE_BYTES >> 20}: free some space")
    return f"{data_dir}, {free >> 30} GB free"


def _database(open_database: Callable[[], Engine], data_dir: Path) -> str:
    from storage import EmbeddedServer, mask_url
    from storage.database.variables import is_embedded
    from storage.embedded.accounts import advice

    engine = open_database()
    with engine.connect() as conn:
        server = conn.execute(text("show server_version")).scalar_one()
    found = f"PostgreSQL {server} at {mask_url(engine.url)}"
    if not is_embedded(engine.url.query.get("host")):
        return found
    embedded = EmbeddedServer(data_dir).status()
    if embedded.running and (why := advice(embedded.directory)) is not None:
        raise CheckFailedError(f"{found}, but {why}")
    return found if embedded.account is None else f"{found}, which runs as {embedded.account}"


def _clock(open_database: Callable[[], Engine]) -> str:
    """Compare this machine's clock with the database's, by which leases go."""
    with open_database().connect() as conn:
        before = time.time()
        theirs = float(conn.execute(text("select extract(epoch from clock_timestamp())")).scalar_one())
        after = time.time()
    off_s = (before + after) / 2 - theirs
    if abs(off_s) > MAX_CLOCK_S + (after - before) / 2:
        side = "ahead of" if off_s > 0 else "behind"
        raise CheckFailedError(
            f"this machine's clock is {abs(off_s):.0f} s {side} the database's; set both by NTP: leases go by the"
            " database's alone, but certificates are not valid by a wrong clock, and logs do not fit together"
        )
    return f"{abs(off_s):.1f} s from the database's"


def _records(open_database: Callable[[], Engine]) -> str:
    from storage.database.integrity import faults

    try:
        engine = open_database()
    except (TunerError, StorageError):
        return "not looked at, as the database is not there"
    found = faults(engine)
    if found:
        raise CheckFailedError(
            f"{'; '.join(found)}: what a dump leaves that was restored in part, or over tables; restore it into an"
            " empty database (docs/deployment.md, Backup and restore)"
        )
    return "every study has its trials, every trial its values"


def _objectives() -> str:
    names = [source.name for source in installed_objectives()]
    if not names:
        raise CheckFailedError("no objective is installed; 'pip install .' in the repository installs them")
    return ", ".join(names)
