"""A server as docs/server.md sets it up: its blocks, run one after the other against the servers that are here."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from storage.embedded.accounts import Account
from storage.embedded.programs import bundled_programs, reachable_by

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "server.md"
SUDO = """#!/bin/bash
[ "$1" = -u ] || exec "$@"
shift 2
exec setpriv --reuid=postgres --regid=postgres --clear-groups env HOME=/ "$@"
"""
SYSTEMCTL = """#!/bin/bash
[ "$1 $2" = "restart postgresql" ] || exit 64
cd / && sudo -u postgres pg_ctl --pgdata="$CLUSTER" --wait --silent --log="$CLUSTER/log" restart || {
    cat "$CLUSTER/log" >&2
    exit 1
}
"""

START = r"""
cd /
sudo -u postgres initdb --pgdata="$CLUSTER" --encoding=UTF8 --no-locale --no-sync --auth-local=trust \
    --auth-host=reject --username=postgres
printf "port = %s\nfsync = off\nunix_socket_directories = '%s'\n" "$PGPORT" "$CLUSTER" >> "$CLUSTER/postgresql.conf"
sed -i '/^host /d' "$CLUSTER/pg_hba.conf"
sudo -u postgres pg_ctl --pgdata="$CLUSTER" --wait --log="$CLUSTER/log" start
"""


def programs(major: str, shared: Path) -> Path | None:
    """Where the programs of a server of this version are that the account postgres may run; None if there are none."""
    (installed,) = [*Path("/usr/lib/postgresql").glob(f"{major}/bin"), None][:1]
    account = pwd.getpwnam("postgres")
    postgres = Account(name="postgres", uid=account.pw_uid, gid=account.pw_gid, is_us=False)
    bundled = [reachable_by(postgres, each, shared) for each in bundled_programs() if str(each.major) == major]
    return installed or next((each.directory / "bin" for each in bundled), None)


def blocks() -> list[str]:
    """The page's blocks, in their order."""
    return re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


@pytest.fixture(params=["15", "18"])
def environment(request: pytest.FixtureRequest, open_directory: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A fresh cluster that runs, and what the page's commands find it by."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("a server of another account needs root and setpriv")
    found = programs(request.param, open_directory)
    if found is None:
        pytest.skip(f"PostgreSQL {request.param} is not here")
    (open_directory / "bin").mkdir()
    for name, text in (("sudo", SUDO), ("systemctl", SYSTEMCTL)):
        (open_directory / "bin" / name).write_text(text)
        (open_directory / "bin" / name).chmod(0o755)
    cluster = open_directory / "cluster"
    cluster.mkdir()
    shutil.chown(cluster, "postgres", "postgres")
    places = [str(open_directory / "bin"), str(found), str(Path(sys.executable).parent), os.environ["PATH"]]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {
        "PATH": os.pathsep.join(places),
        "HOME": str(tmp_path),
        "CLUSTER": str(cluster),
        "PGPORT": port,
        "PGHOST": str(cluster),
        "PGDATABASE": "postgres",
        "PGUSER": "postgres",
        "NAME": "localhost",
        "TUNER_DATA_DIR": str(tmp_path / "data"),
    }
    run(START, environment, tmp_path)
    try:
        yield environment
    finally:
        run('cd / && sudo -u postgres pg_ctl --pgdata="$CLUSTER" --mode=immediate stop', environment, tmp_path)


def run(block: str, environment: dict[str, str], directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a block to its end, which has to be a good one."""
    done = subprocess.run(
        ["bash", "-e", "-u", "-o", "pipefail", "-c", block],
        env=environment,
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done


def query(role: str, statement: str, environment: dict[str, str], directory: Path) -> str:
    """Run a statement as a role that needs no password here, and return what psql prints of it, its error included."""
    line = f'psql --username={role} --dbname=tuner -Atc "{statement}" 2>&1 || true'
    return run(line, environment, directory).stdout.strip()


def test_its_blocks_make_a_server_that_workers_join(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "docker").symlink_to(ROOT / "docker")
    roles, tls, access, join, dashboard = blocks()
    run(roles, environment, tmp_path)
    assert query("tuner", "SELECT current_user", environment, tmp_path) == "tuner"
    assert query("tuner", "CREATE TABLE here (it integer)", environment, tmp_path) == "CREATE TABLE"
    assert query("tuner_reader", "SELECT count(*) FROM here", environment, tmp_path) == "0"
    assert "read-only" in query("tuner_reader", "INSERT INTO here VALUES (1)", environment, tmp_path)
    if query("postgres", "SHOW ssl_library", environment, tmp_path) == "":
        return  # the wheel's server, which no other machine can join
    run(tls, environment, tmp_path)
    assert run(access, environment, tmp_path).stdout == ""
    from_there = {name: environment[name] for name in ("PATH", "HOME", "NAME", "TUNER_DATA_DIR", "PGPORT")}
    joined = run(join, from_there, tmp_path)
    assert re.search(r"^ok +database +PostgreSQL 1", joined.stdout, re.M), joined.stdout
    # Without TLS, or with another password, nobody comes in.
    for change in (("verify-full", "disable"), ("secrets/postgres_password", "secrets/reader_password")):
        with pytest.raises(AssertionError, match=r"not let in|cannot reach|pg_hba|password"):
            run(join.replace(*change), from_there, tmp_path)
    reading = dashboard.replace("tuner dashboard --port 8080", "tuner studies")
    assert run(reading, from_there, tmp_path).stdout == run(join, from_there, tmp_path).stdout.splitlines(True)[-1]
