"""Making a PostgreSQL cluster, with our roles and database in it."""

from __future__ import annotations

import os
import re
import shutil
import stat
from typing import TYPE_CHECKING, Final

from storage.database.errors import EmbeddedServerError

if TYPE_CHECKING:
    from pathlib import Path

    from storage.embedded.accounts import Account
    from storage.embedded.programs import Programs

DATABASE: Final = "tuner"
ADMIN_ROLE: Final = "tuner_admin"
ROLE: Final = "tuner"
READER_ROLE: Final = "tuner_reader"

# Written into postgresql.conf when the cluster is made, for its owner to change.
_SETTINGS: Final = {
    # Neither limited to a container's 64 MB of /dev/shm nor removed when systemd ends the user's last session.
    "dynamic_shared_memory_type": "mmap",
    "huge_pages": "off",
    "io_method": "sync",  # three processes fewer
    "jit": "off",
    "listen_addresses": "",
    "log_checkpoints": "off",
    "log_timezone": "UTC",
    "max_connections": "100",
    "max_parallel_workers_per_gather": "0",
    "max_wal_size": "256MB",
    "shared_buffers": "64MB",
    "timezone": "UTC",
}

# Run on template1, so that a new database inherits what the reader may do; one statement a line. Large objects and
# temporary tables would let it fill the disk, and advisory locks hold up those who write.
_ROLES_AND_DATABASE: Final = """\
CREATE ROLE tuner LOGIN
CREATE ROLE tuner_reader LOGIN CONNECTION LIMIT 20
ALTER ROLE tuner_reader SET default_transaction_read_only = on
ALTER ROLE tuner_reader SET temp_file_limit = '1GB'
GRANT USAGE ON SCHEMA public TO tuner_reader
ALTER DEFAULT PRIVILEGES FOR ROLE tuner GRANT SELECT ON TABLES TO tuner_reader
DO $$ DECLARE one regprocedure; BEGIN FOR one IN SELECT oid FROM pg_proc WHERE proname ~ '^(lo_|lowrite$|loread$)' \
LOOP EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', one); END LOOP; END $$
DO $$ DECLARE one regprocedure; BEGIN FOR one IN SELECT oid FROM pg_proc WHERE proname ~ '^pg_(try_)?advisory_' \
LOOP EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', one); \
EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO tuner', one); END LOOP; END $$
CREATE DATABASE tuner OWNER tuner
REVOKE ALL ON DATABASE tuner, postgres, template1 FROM PUBLIC
GRANT CONNECT ON DATABASE tuner TO tuner_reader
"""


def create_cluster(cluster: Path, account: Account, programs: Programs, lock: int, timeout_s: float) -> None:
    """Make a cluster aside, roles and database included, and rename it: it is whole or not there.

    For the holder of the decision lock, whose descriptor is `lock`. Raises EmbeddedServerError.
    """
    if cluster.exists() and any(cluster.iterdir()):
        raise EmbeddedServerError(f"{cluster} holds files but no PostgreSQL cluster; move it away")
    home, aside = cluster.parent, aside_of(cluster)
    if aside.exists():  # left by a process that was killed
        shutil.rmtree(aside)
    private_directory(aside, account)
    initdb: list[str | Path] = [
        programs.path("initdb"),
        f"--pgdata={aside}",
        f"--username={ADMIN_ROLE}",
        "--encoding=UTF8",
        "--no-locale",
        "--data-checksums",
        "--auth-local=peer",
        "--auth-host=scram-sha-256",
        *(f"--set={name}={value}" for name, value in _SETTINGS.items()),
    ]
    postgres: list[str | Path] = [programs.path("postgres"), "--single", "-D", aside]
    postgres += ["-c", "exit_on_error=on", "template1"]
    for command, stdin in ((initdb, ""), (postgres, _ROLES_AND_DATABASE)):
        # Inheriting the decision lock keeps it held should we be killed and leave the program running.
        done = account.run(command, cwd=home, timeout_s=2 * timeout_s, stdin=stdin, pass_fds=[lock])
        if done.returncode != 0:
            raise EmbeddedServerError(
                f"cannot create a database in {home}: {reason(done.stderr)}; mend that and try again"
            )
    aside.rename(cluster)
    _fsync_directory(home)


def aside_of(cluster: Path) -> Path:
    """Return where a cluster is made."""
    return cluster.with_name(f"{cluster.name}.new")


def cluster_major(cluster: Path) -> int | None:
    """Return the major version that made a cluster, None if there is no cluster."""
    try:
        return int((cluster / "PG_VERSION").read_text())
    except FileNotFoundError:
        return None


def private_directory(path: Path, account: Account, mode: int = 0o700) -> Path:
    """Have a directory of the account that nobody else may write; one already there is only checked."""
    try:
        path.mkdir(mode)
    except FileExistsError:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != account.uid or found.st_mode & 0o777 & ~mode:
            raise EmbeddedServerError(
                f"{path} must be a directory of {account.name} with mode {mode:04o} at most; remove it and try again"
            ) from None
    else:
        path.chmod(mode)  # past the umask
        if not account.is_us:
            os.chown(path, account.uid, account.gid)
    return path


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(output: str) -> str:
    """Pick the lines of a program's output that tell why it failed, on one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"FATAL|PANIC|ERROR|error:|could not", line)]
    return "; ".join((telling or lines)[-3:]) or "no reason given"
