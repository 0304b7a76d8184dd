"""PostgreSQL for one user and one data directory, started when first needed and shared by all processes."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import secrets
import shlex
import shutil
import signal
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from storage.database.errors import EmbeddedServerError
from storage.database.variables import MARK, hidden
from storage.embedded.accounts import Account, own_account, owner_of, server_account
from storage.embedded.addresses import loopback, shown, socket_directory, url
from storage.embedded.cluster import (
    ADMIN_ROLE,
    READER_ROLE,
    ROLE,
    aside_of,
    cluster_major,
    create_cluster,
    private_directory,
    reason,
)
from storage.embedded.postmaster import (
    Postmaster,
    exclusive,
    is_held,
    listener_pid,
    read_postmaster,
    wait_until,
)
from storage.embedded.programs import Programs, bundled_programs, reachable_by
from storage.embedded.users import (
    IDLE_EXIT,
    Use,
    alone,
    checked_idle_exit,
    have_a_watcher,
    look,
    open_session,
    read_idle_exit_s,
    register,
)
from storage.files import UntrustedError, new_file, own_directory, read_own, replace, require_own

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg2.extensions import connection as Connection  # noqa: N812 - a class

# Where root keeps clusters: a data directory is usually closed to the user that the server runs as.
SHARED_DIRECTORY = Path("/var/lib/tuner")

NOTE: Final = "postgresql.directory"
"""A file of this name in root's clusters tells their data directories."""

_DEFAULT_PORT: Final = 5432  # without TCP it is but a part of the socket's name
_FREE_BYTES_MIN: Final = 64 * 2**20
_LOG_MAX_BYTES: Final = 16 * 2**20

_ACCESS: Final = """\
# Written by tuner at each start.
local all tuner_admin,tuner,tuner_reader peer map=tuner
host all tuner 127.0.0.1/32 scram-sha-256
host all tuner ::1/128 scram-sha-256
"""


@dataclass(frozen=True, kw_only=True)
class EmbeddedStatus:
    """What is known of a data directory's server; None where it does not run, or has no cluster yet."""

    running: bool
    directory: Path  # of the cluster
    version: str | None  # PostgreSQL's major version
    account: str | None = None  # the system's user that it runs as, and whose the cluster is
    pid: int | None = None
    socket_directory: Path | None = None
    port: int | None = None
    listen: str | None = None  # host:port, None without TCP
    url: str | None = None


class EmbeddedServer:
    """The PostgreSQL server of a data directory; any number of processes and objects may stand for it.

    Only the user who owns it may connect, by the identity that the kernel tells of the socket's other end.
    It outlives the process that started it. Every method may raise EmbeddedServerError.

    Run as root, the server belongs to an unprivileged user and lives below /var/lib/tuner.
    """

    def __init__(self, data_dir: Path, *, timeout_s: float = 60.0, home: Path | None = None) -> None:
        """Stand for the server of `data_dir`; touches nothing yet. `timeout_s` bounds each start and stop.

        `home` is where its files are known to lie already.
        """
        self._given = data_dir
        self._data_dir = Path(os.path.realpath(data_dir))
        self._timeout_s = timeout_s
        self._key = hashlib.sha256(os.fsencode(self._data_dir)).hexdigest()[:12]
        if home is None:
            home = SHARED_DIRECTORY / self._key if os.geteuid() == 0 else self._data_dir
        elif home != self._data_dir:
            self._key = home.name
        self._home = home
        self._cluster = self._home / "postgresql"
        self._log = self._home / "postgresql.log"
        # Held while one process decides to create, start or stop.
        self._decision = self._home / "postgresql.lock"
        # Held by the server's processes as long as one of them lives: unlike a pid, it cannot be taken for
        # another process, and it is seen from other containers and machines that share the directory.
        self._alive = self._home / "postgresql.alive"
        # Shared by the processes that have started or joined the server, as long as they live.
        self._users = self._home / "postgresql.users"
        # Held by the process that ends the server once it is idle, after what time is in the other file.
        self._watch = self._home / "postgresql.watch"
        self._idle_exit = self._home / "postgresql.idle"
        self.password_file = self._home / "postgresql.password"

    def start(self, listen: str | None = None, *, idle_exit: str | None = None) -> str:
        """Start the server, or join the one that runs, and return its URL; makes the cluster the first time.

        `listen`, a loopback address as 127.0.0.1:5433, opens that port too, for role `tuner` with the
        password in `password_file`. Joining a running server takes a connect, and no subprocess.

        The server ends itself once no process that started or joined it lives, and nobody has been connected, for
        `idle_exit`, as 90s, 15m or never; if not given, for TUNER_DB_IDLE_EXIT or 15m where it has to be started.
        """
        address = None if listen is None else loopback(listen)
        if idle_exit is not None:
            checked_idle_exit(idle_exit)
        with self._explained():
            self._prepare_home()
            register(self._users, self._timeout_s)
            server = self._running()
            if server is None or address is not None or idle_exit is not None:
                with exclusive(self._decision, self._timeout_s) as lock:
                    server = self._running()
                    if server is None or idle_exit is not None:
                        given = idle_exit or os.environ.get("TUNER_DB_IDLE_EXIT") or IDLE_EXIT
                        self._readable_file(self._idle_exit.name, checked_idle_exit(given))
                    if server is None:
                        server = self._launch(address, lock)
                    if address is not None:
                        self._require_address(server, address)
                        self._set_password(server)
            if self.idle_exit_s() < math.inf:
                have_a_watcher(self._watch, self._data_dir, self._home)
            return url(server, ROLE)

    @property
    def key(self) -> str:
        """A name for it among the user's servers, as in that of a directory for its sockets."""
        return self._key

    def stop(self) -> None:
        """Stop the server, ending its sessions in an orderly way; does nothing if it does not run."""
        with self._explained():
            if not self._cluster.exists():
                return
            with exclusive(self._decision, self._timeout_s):
                server = self._settled()
                if server is not None:
                    self._end(server)

    def stop_if_unused(self, session: Connection, seen: Use) -> bool:
        """Stop the server if nobody has used it since `seen` and nobody can begin to; returns whether it was stopped.

        For the watcher. Who starts or joins it meanwhile waits, and then starts it.
        """
        decision = exclusive(self._decision, self._timeout_s, create=False)
        with self._explained(), decision, alone(self._users) as is_alone:
            if not is_alone or self.use(session) != seen or (server := self._running()) is None:
                return False
            self._end(server)
            return True

    def end_watch(self, lock: int) -> bool:
        """Let go of the watcher's lock if there is nothing to watch any more; returns whether it was let go.

        Whoever starts the server does so under the same lock, and either finds a watcher or starts one.
        """
        decision = exclusive(self._decision, self._timeout_s, create=False)
        with self._explained(), suppress(FileNotFoundError), decision:  # not there: the database was deleted
            if self._running() is not None and self.idle_exit_s() < math.inf:
                return False
            os.close(lock)
        return True

    def idle_exit_s(self) -> float:
        """Return for how many seconds the server goes unused before it is ended, infinity for never."""
        return read_idle_exit_s(self._idle_exit)

    def session(self) -> Connection:
        """Return a session of the superuser for looking after the server, which is no use of it."""
        return open_session(self.admin_url())

    def use(self, session: Connection) -> Use:
        """Return how the server is being used."""
        return look(session, self._users)

    def status(self) -> EmbeddedStatus:
        """Tell what runs, changing nothing."""
        with self._explained():
            server = self._running()
            major = cluster_major(self._cluster)
            cluster = EmbeddedStatus(
                running=server is not None,
                directory=self._cluster,
                version=None if major is None else str(major),
                account=owner_of(self._cluster),
            )
            if server is None:
                return cluster
            return dataclasses.replace(
                cluster,
                pid=server.pid,
                socket_directory=server.socket_directory,
                port=server.port,
                listen=shown(server.listen_address, server.port) if server.listen_address else None,
                url=url(server, ROLE),
            )

    def url(self) -> str:
        """Return the URL for everyday work: role `tuner`, who owns the database and is no superuser."""
        return self._running_url(ROLE)

    def reader_url(self) -> str:
        """Return the URL of a role that may only read."""
        return self._running_url(READER_ROLE)

    def admin_url(self) -> str:
        """Return the superuser's URL, for maintenance."""
        return self._running_url(ADMIN_ROLE)

    def delete(self) -> None:
        """Do as `destroy` does, unless somebody uses the server."""
        with self._explained():
            if not self._cluster.exists():
                raise EmbeddedServerError(f"{self._data_dir} has no database; 'tuner db list' shows those there are")
            with exclusive(self._decision, self._timeout_s), alone(self._users) as is_alone:
                server, sessions = self._settled(), 0
                if server is not None:
                    with closing(self.session()) as session:
                        sessions = self.use(session).sessions
                if sessions or not is_alone:
                    by = f"sessions that are open: {sessions}" if sessions else "other processes of tuner have it open"
                    raise EmbeddedServerError(
                        f"the database of {self._data_dir} is in use: {by}; end them, then delete it"
                    )
                if server is not None:
                    self._end(server)
                self._remove_files()

    def destroy(self) -> None:
        """Stop the server and delete its cluster, with every study in it."""
        self.stop()
        self._remove_files()

    def _remove_files(self) -> None:
        with self._explained():
            if self._home != self._data_dir:
                shutil.rmtree(self._home, ignore_errors=True)
            elif self._home.exists():
                sockets = socket_directory(self._home, self._key, own_account())
                for directory in (self._cluster, aside_of(self._cluster), sockets):
                    shutil.rmtree(directory, ignore_errors=True)
                for file in self._home.glob("postgresql.*"):
                    file.unlink()
                (notes() / self._key).unlink(missing_ok=True)

    def _end(self, server: Postmaster) -> None:
        if listener_pid(server, self._owner()) != server.pid:
            raise EmbeddedServerError(f"the server of {self._cluster} was started in another container; stop it there")
        os.kill(server.pid, signal.SIGINT)  # PostgreSQL's "fast" shutdown
        if not wait_until(self._is_gone, self._timeout_s):
            raise EmbeddedServerError(
                f"the server of {self._cluster} (pid {server.pid}) did not stop within "
                f"{self._timeout_s:.0f} seconds; see {self._log}, then try again"
            )

    def _running(self) -> Postmaster | None:
        """Return the server that runs. Raises UntrustedError, an OSError, if it could be somebody else's."""
        require_own(self._home)
        if not self._cluster.exists():
            return None
        owner = self._owner()
        server = read_postmaster(self._cluster, owner)
        if server is not None and server.ready and listener_pid(server, owner) is not None:
            return server
        return None

    def _owner(self) -> int:
        """Return the user whose the cluster's files and processes are: we, or for root the one that it was made for."""
        return os.lstat(self._cluster).st_uid if os.geteuid() == 0 else os.geteuid()

    def _running_url(self, role: str) -> str:
        with self._explained():
            server = self._running()
        if server is None:
            raise EmbeddedServerError(f"no server runs for {self._data_dir}; start it: tuner db start")
        return url(server, role)

    def _is_gone(self) -> bool:
        return not is_held(self._alive) and self._running() is None

    def _settled(self) -> Postmaster | None:
        """Wait while a server starts, recovers or ends; return it if it runs then, None if it is gone.

        For the holder of the decision lock.
        """
        if not wait_until(lambda: self._running() is not None or not is_held(self._alive), self._timeout_s):
            raise EmbeddedServerError(
                f"a server holds {self._cluster} and has not answered for {self._timeout_s:.0f} seconds: it "
                f"recovers (see {self._log}), or belongs to another machine or container; wait, or stop it "
                "there"
            )
        return self._running()

    def _launch(self, address: tuple[str, int] | None, lock: int) -> Postmaster:
        server = self._settled()
        if server is not None:
            return server
        self._require_free_space()
        account = server_account(self._cluster)
        programs = self._programs(account)
        self._note()
        if cluster_major(self._cluster) is None:
            create_cluster(self._cluster, account, programs, lock, self._timeout_s)
        return self._start_postmaster(account, programs, address)

    def _note(self) -> None:
        """Leave word of where this database is, for `tuner db list`."""
        if self._home != self._data_dir:
            self._readable_file(NOTE, str(self._data_dir))
            return
        with suppress(OSError):  # such as a home that cannot be written to: it is not listed then
            replace(notes() / self._key, os.fsencode(self._data_dir))

    def _programs(self, account: Account) -> Programs:
        bundled = bundled_programs()
        major = cluster_major(self._cluster)
        fitting = [programs for programs in bundled if major in (None, programs.major)]
        if not fitting:
            ours = " and ".join(str(programs.major) for programs in bundled)
            raise EmbeddedServerError(
                f"{self._cluster} was made by PostgreSQL {major}, and the programs here are of {ours}; "
                "install the tuner that made it and copy its studies with 'tuner import', or move the directory "
                "away"
            )
        return reachable_by(account, fitting[0], SHARED_DIRECTORY)

    def _start_postmaster(self, account: Account, programs: Programs, address: tuple[str, int] | None) -> Postmaster:
        sockets = private_directory(socket_directory(self._home, self._key, account), account)
        self._remove_leftovers(sockets)
        with suppress(FileExistsError):
            os.close(new_file(sockets / MARK))
        host, port = address or ("", _DEFAULT_PORT)
        options = {
            "hba_file": self._readable_file("postgresql.hba", _ACCESS),
            "ident_file": self._readable_file("postgresql.ident", _identity_map()),
            "listen_addresses": host,
            "port": port,
            "unix_socket_directories": sockets,
            "unix_socket_permissions": "0700",
        }
        log_size = self._prepare_log(account)
        command: list[str | Path] = [programs.path("pg_ctl"), "start", "--wait", "--silent"]
        command += [f"--timeout={self._timeout_s:.0f}", f"--pgdata={self._cluster}", f"--log={self._log}"]
        command.append(f"--options={shlex.join(f'--{name}={value}' for name, value in options.items())}")
        with exclusive(self._alive, self._timeout_s) as alive:
            # A session of its own: neither Ctrl-C nor the end of this process reaches the server.
            done = account.run(
                command,
                cwd=self._home,
                timeout_s=self._timeout_s + 10,
                pass_fds=[alive],
                new_session=True,
            )
        server = self._running()
        if server is None:
            with open(self._log, "rb") as log:
                log.seek(log_size)
                said = log.read().decode(errors="replace")
            raise EmbeddedServerError(
                f"PostgreSQL did not start in {self._cluster}: {reason(said or done.stderr)}; "
                f"nothing stored is lost, mend that and try again (log: {self._log})"
            )
        return server

    def _remove_leftovers(self, sockets: Path) -> None:
        """Remove what a killed server left, whose pid may be another process's by now.

        For the holder of the decision lock, when no process of the server lives.
        """
        (self._cluster / "postmaster.pid").unlink(missing_ok=True)
        for leftover in sockets.glob(".s.PGSQL.*"):
            leftover.unlink()

    def _prepare_home(self) -> None:
        if unsafe := set('"$`\\\n') & set(str(self._home)):
            raise EmbeddedServerError(
                f"pg_ctl cannot handle {min(unsafe)!r} in {self._home}; choose another --data-dir"
            )
        require_own(self._given)
        if self._home == self._data_dir:
            own_directory(self._home)
            return
        SHARED_DIRECTORY.parent.mkdir(parents=True, exist_ok=True)
        for directory in (SHARED_DIRECTORY, self._home):
            private_directory(directory, own_account(), mode=0o755)

    def _require_free_space(self) -> None:
        free = shutil.disk_usage(self._home).free
        if free < _FREE_BYTES_MIN:
            raise EmbeddedServerError(
                f"{free // 2**20} MB are free on the disk of {self._home}, PostgreSQL needs "
                f"{_FREE_BYTES_MIN // 2**20}; free some and start again, nothing stored is lost"
            )

    def _readable_file(self, name: str, content: str) -> Path:
        """Write a file that the server's user may read and not write."""
        path = self._home / name
        replace(path, content.encode(), mode=0o644)
        return path

    def _prepare_log(self, account: Account) -> int:
        """Have a log file that the server may write; returns its size in bytes."""
        if self._log.exists() and self._log.stat().st_size > _LOG_MAX_BYTES:
            self._log.rename(self._log.with_name(f"{self._log.name}.old"))
        if not self._log.exists():
            os.close(new_file(self._log))
            if not account.is_us:
                os.chown(self._log, account.uid, account.gid)
        return self._log.stat().st_size

    def _require_address(self, server: Postmaster, address: tuple[str, int]) -> None:
        if (server.listen_address, server.port) != address:
            found = shown(server.listen_address, server.port) if server.listen_address else "no TCP port"
            raise EmbeddedServerError(
                f"the server of {self._data_dir} runs with {found}, not {shown(*address)}; stop it "
                "(tuner db stop), then start it with that address"
            )

    def _set_password(self, server: Postmaster) -> None:
        """Give role `tuner` the password in `password_file`, made when missing."""
        import psycopg2  # only TCP needs it
        from psycopg2.extensions import encrypt_password

        with suppress(FileExistsError), open(new_file(self.password_file), "w") as file:
            file.write(secrets.token_urlsafe(32))
        password = read_own(self.password_file, is_secret=True).decode()
        with hidden():
            connection = psycopg2.connect(url(server, ADMIN_ROLE))
        try:
            with connection, connection.cursor() as cursor:
                # Its verifier, not the password, so that no log of statements can show it.
                verifier = encrypt_password(password, ROLE, connection, "scram-sha-256")
                cursor.execute(f"ALTER ROLE {ROLE} PASSWORD %s", (verifier,))
        finally:
            connection.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except UntrustedError as error:
            raise EmbeddedServerError(f"the database of {self._data_dir} is not used: {error}") from error
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            raise EmbeddedServerError(
                f"the database of {self._data_dir} cannot be used:{where}: {error.strerror or error}; "
                "mend that, or choose another --data-dir"
            ) from error


def notes() -> Path:
    """Return the directory with a file for each database of this user, who is not root, that tells where it is."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "tuner" / "databases"


def _identity_map() -> str:
    us = own_account().name
    roles = (ADMIN_ROLE, ROLE, READER_ROLE)
    return "# Written by tuner at each start.\n" + "".join(f'tuner "{us}" {role}\n' for role in roles)
