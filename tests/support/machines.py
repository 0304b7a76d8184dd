"""Machines of a test's own: network namespaces around a router, and PostgreSQL in one of them, over TLS alone."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg2
from command import wait_for
from psycopg2.extensions import encrypt_password

from storage.embedded.accounts import server_account

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HOST = "db.test"
"""The name that the server's certificate has; no resolver knows it, so URLs give the address as well."""

_ACCESS = """\
local all all trust
hostssl all tuner all scram-sha-256
"""
_TIMEOUT_S = 60.0


def why_not() -> str | None:
    """Return why this system cannot have such machines, None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [program for program in ("ip", "openssl", "setpriv") if shutil.which(program) is None]:
        return f"not installed: {', '.join(missing)}"
    if _programs() is None:
        return "the PostgreSQL that comes with tuner has no TLS, and the system has none that has"
    try:
        with network(["a"]):
            return None
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


class Network:
    """Machines, each in a network of its own behind one router."""

    def __init__(self, machines: Sequence[str]) -> None:
        self._router = f"tuner-test-{secrets.token_hex(4)}"
        self._numbers = {machine: number for number, machine in enumerate(machines)}

    def within(self, machine: str) -> tuple[str, ...]:
        """Return the command that runs commands on a machine."""
        return ("ip", "netns", "exec", self._namespace(machine))

    def address(self, machine: str) -> str:
        """Return a machine's address. Other networks have the same ones: nothing leads from one to another."""
        return f"10.77.{self._numbers[machine]}.1"

    @contextmanager
    def cut_off(self, machine: str) -> Iterator[None]:
        """Have the router drop all that comes from a machine and goes to it, and tell nobody."""
        rules = [[way, self.address(machine)] for way in ("from", "to")]
        for rule in rules:
            _run("ip", "-n", self._router, "rule", "add", "blackhole", *rule)
        try:
            yield
        finally:
            for rule in rules:
                _run("ip", "-n", self._router, "rule", "del", "blackhole", *rule)

    def build(self) -> None:
        """Make the namespaces, and join them."""
        _run("ip", "netns", "add", self._router)
        for machine, number in self._numbers.items():
            namespace, port, router = self._namespace(machine), f"port{number}", f"10.77.{number}.254"
            _run("ip", "netns", "add", namespace)
            # Both ends are made where they belong, so that their names meet nobody else's.
            _run("ip", "link", "add", port, "netns", self._router, "type", "veth", "peer", "eth0", "netns", namespace)
            for where, name, address in ((self._router, port, router), (namespace, "eth0", self.address(machine))):
                _run("ip", "-n", where, "address", "add", f"{address}/24", "dev", name)
                _run("ip", "-n", where, "link", "set", name, "up")
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
            _run("ip", "-n", namespace, "route", "add", "default", "via", router)
        _run("ip", "netns", "exec", self._router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def remove(self) -> None:
        """Remove what `build` made, as far as it came; the links go with their ends."""
        made = _run("ip", "netns", "list").split()
        for namespace in (self._router, *map(self._namespace, self._numbers)):
            if namespace in made:
                _run("ip", "netns", "delete", namespace)

    def _namespace(self, machine: str) -> str:
        return f"{self._router}-{machine}"


@contextmanager
def network(machines: Sequence[str]) -> Iterator[Network]:
    """Machines for the time of the block."""
    made = Network(machines)
    try:
        made.build()
        yield made
    finally:
        made.remove()


class Authority:
    """A certificate authority with its files in a directory; its certificate is at `certificate`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self.certificate = directory / "ca.pem"
        self._make("ca", "/CN=an authority of the tests")

    def issue(self, host: str) -> tuple[Path, Path]:
        """Return the files of a certificate for a host, and of its key."""
        key = self._directory / "ca.key"
        extensions = [f"subjectAltName=DNS:{host}", "basicConstraints=critical,CA:FALSE"]
        by = ["-CA", self.certificate, "-CAkey", key, *(word for each in extensions for word in ("-addext", each))]
        return self._make(host, f"/CN={host}", *by)

    def _make(self, name: str, subject: str, *options: str | Path) -> tuple[Path, Path]:
        certificate, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(key)]
        _run("openssl", "req", "-x509", *new_key, "-subj", subject, "-days", "2", *options, "-out", certificate)
        return certificate, key


class Server:
    """PostgreSQL on a machine, which lets role `tuner` in by TLS and with its password, and nobody else."""

    def __init__(self, machines: Network, machine: str, directory: Path) -> None:
        self._within = machines.within(machine)
        self._address = machines.address(machine)
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.authority = Authority(directory / "authority")
        self.password = secrets.token_urlsafe(16)
        self.password_file = directory / "password"
        self.password_file.touch(0o600)
        self.password_file.write_text(self.password + "\n")

    @property
    def url(self) -> str:
        """The URL for everybody who may come in, without the password."""
        return self.url_as()

    def url_as(self, host: str = HOST, authority: Path | None = None, sslmode: str = "verify-full") -> str:
        """Return the URL with the server under another name, or checked against another authority."""
        tls = f"sslmode={sslmode}&sslrootcert={authority or self.authority.certificate}"
        return f"postgresql://tuner@{host}/tuner?hostaddr={self._address}&{tls}"

    @property
    def url_from_here(self) -> str:
        """The URL that leads the test to the server, by a socket, whatever befalls the network."""
        return f"postgresql://tuner@/tuner?host={self._directory}"

    def start(self) -> None:
        """Make the cluster and start the server."""
        programs, cluster, log_file = _programs(), self._directory / "postgresql", self._directory / "log"
        assert programs is not None, "there is no PostgreSQL with TLS"
        account = server_account(cluster)
        certificate, key = self.authority.issue(HOST)
        (access := self._directory / "pg_hba.conf").write_text(_ACCESS)
        for path in (self._directory, certificate.parent, certificate, key, access):
            os.chown(path, account.uid, account.gid)
        initdb = [
            programs / "initdb",
            f"--pgdata={cluster}",
            "--username=postgres",
            "--encoding=UTF8",
            "--no-locale",
            "--no-sync",
        ]
        done = account.run(initdb, cwd=self._directory, timeout_s=_TIMEOUT_S)
        assert done.returncode == 0, done.stderr
        settings = {
            "fsync": "off",
            "hba_file": access,
            "listen_addresses": "*",
            "ssl": "on",
            "ssl_cert_file": certificate,
            "ssl_key_file": key,
            "unix_socket_directories": self._directory,
        }
        become = ["setpriv", f"--reuid={account.uid}", f"--regid={account.gid}", "--clear-groups"]
        postgres = [programs / "postgres", "-D", cluster, *(f"--{name}={value}" for name, value in settings.items())]
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._within, *become, *postgres],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
                start_new_session=True,
            )
        process = self._process
        wait_for(lambda: self._is_prepared() or process.poll() is not None, "the server starts")
        assert process.poll() is None, log_file.read_text()

    def stop(self) -> None:
        """End the server, and its sessions with it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(_TIMEOUT_S)

    def _is_prepared(self) -> bool:
        """Whether the server answers; then it has role and database."""
        try:
            connection = psycopg2.connect(host=str(self._directory), user="postgres", dbname="postgres")
        except psycopg2.OperationalError:
            return False
        connection.autocommit = True
        with closing(connection), connection.cursor() as cursor:
            verifier = encrypt_password(self.password, "tuner", connection, "scram-sha-256")
            cursor.execute("CREATE ROLE tuner LOGIN PASSWORD %s", (verifier,))
            cursor.execute("CREATE DATABASE tuner OWNER tuner")
        return True


@contextmanager
def server_on(machines: Network, machine: str) -> Iterator[Server]:
    """A server on a machine for the time of the block."""
    # Not below pytest's directories, which are closed to the user that the server runs as.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="tuner-test-") as directory:
        server = Server(machines, machine, Path(directory))
        try:
            server.start()
            yield server
        finally:
            server.stop()


def _programs() -> Path | None:
    """Return the directory of the newest of the system's PostgreSQL that was built with TLS."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    on_path = shutil.which("postgres")
    if on_path is not None:
        installed.append(Path(on_path).resolve().parent)
    return next((path for path in installed if "libssl" in _run("ldd", path / "postgres")), None)


def _run(*command: str | Path) -> str:
    """Return what a command prints. Raises CalledProcessError."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout
