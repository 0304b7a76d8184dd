"""A real PgBouncer in front of a server."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psycopg2
import pytest
from command import wait_for
from sqlalchemy import URL

from storage import EmbeddedServer, parse_url

ADMIN = "pooler_admin"
_PASSWORD = "of the admin"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


class Pooler:
    """Runs PgBouncer in `directory`, which other users may enter, with these settings in its file.

    It reaches the server, an embedded one that listens on TCP, by the password of `tuner`. As root it runs as `nobody`.
    """

    def __init__(self, server: EmbeddedServer, directory: Path, settings: Mapping[str, str]) -> None:
        self.port = free_port()
        self._server = server
        self._directory = directory
        self._account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        self._users = {"tuner": server.password_file.read_text().strip(), ADMIN: _PASSWORD}
        self.log = directory / "pgbouncer.log"
        listen = server.status().listen
        assert listen is not None
        host, _, port = listen.rpartition(":")
        self._databases = {"*": f"host={host} port={port}"}
        self._settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": str(directory / "userlist.txt"),
            "admin_users": ADMIN,
            **settings,
        }

    @property
    def url(self) -> URL:
        """The URL of the database `tuner` by way of this pooler."""
        return URL.create("postgresql", "tuner", self._users["tuner"], "127.0.0.1", self.port, "tuner")

    def of(self, url: str) -> URL:
        """The URL of another database of the server by way of this pooler."""
        return self.url.set(database=parse_url(url).database)

    def start(self) -> None:
        """Start it, and wait until it lets somebody in."""
        self._write("userlist.txt", "".join(f'"{name}" "{password}"\n' for name, password in self._users.items()))
        sections = {"databases": self._databases, "pgbouncer": self._settings}
        lines = [
            line
            for section, values in sections.items()
            for line in (f"[{section}]", *(f"{name} = {value}" for name, value in values.items()))
        ]
        config = self._write("pgbouncer.ini", "\n".join(lines) + "\n")
        program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if program is None:
            pytest.skip("there is no pgbouncer here")
        account = self._account
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [program, "--quiet", config],
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

    def reconfigured(self, **settings: str) -> None:
        """Start it anew with other settings beside."""
        self.stop()
        self._settings.update(settings)
        self.start()

    def tell_it_that_the_password_is(self, password: str) -> None:
        """Have it ask its clients for this password, and give it to the server."""
        self._users["tuner"] = password
        self._write("userlist.txt", "".join(f'"{name}" "{its}"\n' for name, its in self._users.items()))
        self.admin("RELOAD")

    def admin(self, command: str) -> list[dict[str, object]]:
        """Give a command of its console, and return the rows that it shows."""
        console = psycopg2.connect(host="127.0.0.1", port=self.port, user=ADMIN, password=_PASSWORD, dbname="pgbouncer")
        console.autocommit = True
        with console.cursor() as cursor:
            cursor.execute(command)
            rows = cursor.fetchall() if cursor.description else []
            names = [column.name for column in cursor.description or ()]
        console.close()
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _answers(self) -> bool:
        try:
            self.admin("SHOW VERSION")
        except psycopg2.OperationalError:
            return False
        return True

    def _write(self, name: str, text: str) -> Path:
        path = self._directory / name
        path.write_text(text)
        if self._account is not None:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)
        path.chmod(0o600)
        return path
