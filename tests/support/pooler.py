"""A real PgBouncer in front of a server."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from command import wait_for
from sqlalchemy import URL

from storage import EmbeddedServer

_ADMIN, _ADMINS_PASSWORD = "pooler_admin", "of the admin"


def free_port() -> int:
    """Return a port that nobody listened on just now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


class ListeningServer(EmbeddedServer):
    """An embedded server that listens on TCP whenever it is started: a pooler may not enter its socket's directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.port = free_port()

    def start(self, listen: str | None = None, *, idle_exit: str | None = None) -> str:
        """Start it as it was."""
        return super().start(listen or f"127.0.0.1:{self.port}", idle_exit=idle_exit)


class Pooler:
    """Runs PgBouncer in `directory` on TCP and on a socket there; it has the password of `tuner`.

    `users` are the lines of its users, and count from its next start.
    """

    def __init__(self, program: str, server: ListeningServer, directory: Path, settings: Mapping[str, object]) -> None:
        """`settings` are those of its file, but for where it listens, where its server and who its clients are."""
        self.port = free_port()
        self.password = server.password_file.read_text().strip()
        self.log = directory / "log"
        self.users = f'"tuner" "{self.password}"'
        self._program = program
        self._server = server
        self._directory = directory
        self._settings = settings
        self._account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        if self._account is not None:
            os.chown(directory, self._account.pw_uid, self._account.pw_gid)

    @property
    def url(self) -> URL:
        """The URL of the database `tuner` by way of this pooler."""
        return URL.create("postgresql", "tuner", self.password, "127.0.0.1", self.port, "tuner")

    @property
    def socket_url(self) -> str:
        """The same, by the socket."""
        return f"postgresql://tuner:{self.password}@/tuner?host={self._directory}&port={self.port}"

    def start(self) -> None:
        """Start it if it does not run, and wait until it lets its admin in."""
        if self._process is not None:
            return
        users = self._write("users", f'{self.users}\n"{_ADMIN}" "{_ADMINS_PASSWORD}"\n')
        settings = {
            "auth_type": "scram-sha-256",
            **self._settings,
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": self._directory,
            "auth_file": users,
            "admin_users": _ADMIN,
        }
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        head = f"[databases]\n* = host=127.0.0.1 port={self._server.port}\n[pgbouncer]\n"
        config = self._write("pgbouncer.ini", head + "".join(lines))
        account = self._account
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "--quiet", config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=account.pw_uid if account else None,
                group=account.pw_gid if account else None,
                extra_groups=[] if account else None,
            )
        wait_for(self._answers, f"PgBouncer answers: {self.log.read_text()}")

    def stop(self) -> None:
        """End it at once, with all connections."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()
            self._process = None

    def restart(self, settings: Mapping[str, object] | None = None) -> None:
        """Start it anew, with other settings if given."""
        self.stop()
        self._settings = settings or self._settings
        self.start()

    def command(self, command: str) -> list[dict[str, Any]]:
        """Give a command to its console, and return the rows that it shows."""
        console = psycopg2.connect(
            host="127.0.0.1", port=self.port, user=_ADMIN, password=_ADMINS_PASSWORD, dbname="pgbouncer"
        )
        try:
            console.autocommit = True
            with console.cursor() as cursor:
                cursor.execute(command)
                names = [column.name for column in cursor.description or ()]
                return [dict(zip(names, row, strict=True)) for row in (cursor.fetchall() if names else ())]
        finally:
            console.close()

    def _answers(self) -> bool:
        try:
            return bool(self.command("SHOW VERSION"))
        except psycopg2.OperationalError:
            return False

    def _write(self, name: str, text: str) -> Path:
        path = self._directory / name
        path.write_text(text)
        if self._account is not None:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)
        path.chmod(0o600)
        return path


@contextmanager
def a_pooler(server: ListeningServer, settings: Mapping[str, object]) -> Iterator[Pooler]:
    """A PgBouncer that runs for the time of the block; the test is skipped where there is none to run."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        pytest.skip("there is no pgbouncer here")
    # Not one of pytest's directories, which the account that it runs as may not enter.
    with tempfile.TemporaryDirectory(prefix="tuner-pooler-") as directory:
        pooler = Pooler(program, server, Path(directory), settings)
        try:
            pooler.start()
            yield pooler
        finally:
            pooler.stop()
