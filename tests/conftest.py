"""A PostgreSQL server for the session, and for each test a database of its own.

`TUNER_TEST_STORAGE` names a server to use instead of the embedded one; its role must be allowed to create
databases.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command import Tuner
from hypothesis import HealthCheck, settings
from sqlalchemy import URL, create_engine, text

from storage import EmbeddedServer, ensure_schema, open_engine, parse_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[1]

# How long an example takes is the machine's doing, which may be busy.
settings.register_profile("tuner", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tuner")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/acceptance/test_contract.py."""
    parser.addoption("--soak", metavar="TIME", help="inject faults for so long (30m), with longer partitions")
    parser.addoption("--soak-seed", default="0", help="which faults are injected")


def pytest_xdist_auto_num_workers() -> int:
    """Return one process more than there are cores: many tests wait, for a lease or for a server that is away."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_finish() -> None:
    """Have autograd look for devices now, where a test module imports torch.

    After a test that makes fake tensors it finds one of CUDA, and starts a thread for it, which no fork goes on with.
    """
    if torch := sys.modules.get("torch"):
        torch.zeros(1, requires_grad=True).sum().backward()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a CUDA device where torch has none."""
    if item.get_closest_marker("cuda") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@contextmanager
def _in_memory() -> Iterator[Path]:
    """A directory that other users may enter, in memory where there is enough.

    Each test has a database of its own, and to make its some 400 files takes a disk with ext4 up to 20 times as long.
    """
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > 4 * 2**30
    with tempfile.TemporaryDirectory(prefix="tuner-test-", dir=memory if has_room else None) as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    """An embedded server, running, shared by the session's tests: leave it as you found it."""
    with _in_memory() as directory:
        home = directory / "home" if os.geteuid() == 0 else None
        yield from _running(EmbeddedServer(directory / "data", home=home))


def _running(embedded: EmbeddedServer) -> Iterator[EmbeddedServer]:
    try:
        embedded.start()
        yield embedded
    finally:
        embedded.destroy()


@pytest.fixture(scope="session")
def server_url(request: pytest.FixtureRequest) -> str:
    """A database on the server that the tests run against; make no tables in it."""
    external = os.environ.get("TUNER_TEST_STORAGE")
    if external:
        return external
    embedded: EmbeddedServer = request.getfixturevalue("server")
    return embedded.url()


@pytest.fixture(scope="session")
def maintenance_url(request: pytest.FixtureRequest, server_url: str) -> str:
    """The URL of a role on the same server that may create databases."""
    if os.environ.get("TUNER_TEST_STORAGE"):
        return server_url
    embedded: EmbeddedServer = request.getfixturevalue("server")
    return embedded.admin_url()


@contextmanager
def _a_database(server_url: str, maintenance_url: str, template: str = "template1") -> Iterator[URL]:
    name = f"tuner_test_{secrets.token_hex(6)}"
    owned = parse_url(server_url).set(database=name)
    engine = create_engine(parse_url(maintenance_url), isolation_level="AUTOCOMMIT")
    with engine.connect() as conn:
        owner = f'OWNER "{owned.username}"' if owned.username else ""
        conn.execute(text(f'CREATE DATABASE "{name}" TEMPLATE "{template}" {owner}'))
    try:
        yield owned
    finally:
        with engine.connect() as conn:
            conn.execute(text(f'DROP DATABASE "{name}" WITH (FORCE)'))
        engine.dispose()


@pytest.fixture(scope="session")
def migrated_template(server_url: str, maintenance_url: str) -> Iterator[str]:
    """The name of a database with all tables and no rows; nobody is connected to it."""
    with _a_database(server_url, maintenance_url) as url:
        engine = open_engine(url)
        ensure_schema(engine)
        engine.dispose()
        assert url.database
        yield url.database


@pytest.fixture
def database(server_url: str, maintenance_url: str, migrated_template: str) -> Iterator[str]:
    """The URL of a database with all tables and no rows, dropped after the test."""
    with _a_database(server_url, maintenance_url, migrated_template) as url:
        yield url.render_as_string(hide_password=False)


@pytest.fixture(scope="module")
def module_database(server_url: str, maintenance_url: str, migrated_template: str) -> Iterator[str]:
    """The URL of a database like `database`, which the tests of a module share."""
    with _a_database(server_url, maintenance_url, migrated_template) as url:
        yield url.render_as_string(hide_password=False)


@pytest.fixture
def another_database(server_url: str, maintenance_url: str, migrated_template: str) -> Iterator[str]:
    """The URL of a database like `database`, for a test that needs two."""
    with _a_database(server_url, maintenance_url, migrated_template) as url:
        yield url.render_as_string(hide_password=False)


@pytest.fixture
def empty_database(server_url: str, maintenance_url: str) -> Iterator[str]:
    """The URL of a database without tables, dropped after the test."""
    with _a_database(server_url, maintenance_url) as url:
        yield url.render_as_string(hide_password=False)


@pytest.fixture
def start_python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python processes that run some code; each in a session of its own, killed with the test."""
    started: list[subprocess.Popen[str]] = []

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

    def start(code: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, *arguments],
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def tuner(database: str, tmp_path: Path) -> Tuner:
    """The command line against a database of the test's own, with a data directory of its own."""
    return Tuner({"TUNER_STORAGE": database, "TUNER_DATA_DIR": str(tmp_path / "data")}, tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k,mode=700", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount program here")
    if done.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that other users may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="tuner-test-") as name:
        Path(name).chmod(0o711)
        yield Path(name)
