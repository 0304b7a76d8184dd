"""The system's user that a server's programs run as, and that owns its files."""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from storage.database.errors import EmbeddedServerError
from storage.embedded.postmaster import try_lock, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAKE_TIMEOUT_S: Final = 10.0
_ADMIN_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_NOBODY: Final = 65534
_OPTIONS: Final = (
    "--system",
    "--user-group",
    "--no-create-home",
    "--home-dir=/nonexistent",
    "--shell=/usr/sbin/nologin",
)

OWN_ACCOUNT: Final = "tuner-db"
"""The user that root's servers run as, unless TUNER_DB_USER names another."""


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

    For root: the owner of the cluster if there is one already, else the one that TUNER_DB_USER names, or one of our
    own, made if it is not there yet. Never `nobody`, whom others run their processes as. Raises EmbeddedServerError.
    """
    if os.geteuid() != 0:
        return own_account()
    if (cluster / "PG_VERSION").exists():
        uid = cluster.stat().st_uid
        entry = next((entry for entry in pwd.getpwall() if entry.pw_uid == uid), None)
        wanted = f"the owner of {cluster}, uid {uid}"
    else:
        wanted = _wanted()
        entry = _user(wanted) or (_made_user() if wanted == OWN_ACCOUNT else None)
        if entry is not None and _is_nobody(entry):
            raise EmbeddedServerError(
                f"as root, PostgreSQL needs a user of its own, and {wanted} is anybody's; name another by"
                f" TUNER_DB_USER, or unset it to have {OWN_ACCOUNT}"
            )
    if entry is None or entry.pw_uid == 0:
        raise EmbeddedServerError(
            f"as root, PostgreSQL must run as another user, and {wanted} is none; set TUNER_DB_USER to the name of one"
        )
    return Account(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid, is_us=False)


def _wanted() -> str:
    """Return the name of the user whom root's servers are to run as, who may not be there yet."""
    return os.environ.get("TUNER_DB_USER") or OWN_ACCOUNT


def _is_nobody(entry: pwd.struct_passwd) -> bool:
    """Whether this is the user that processes run as who are to be nobody."""
    return entry.pw_name == "nobody" or entry.pw_uid == _NOBODY


def owner_of(cluster: Path) -> str | None:
    """Return the name of the user whose a cluster is, None if there is no cluster."""
    try:
        uid = cluster.stat().st_uid
    except FileNotFoundError:
        return None
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def advice(cluster: Path) -> str | None:
    """Return why and how to have root's server run as another user than it does; None if it is as wanted.

    Earlier versions had it run as `postgres` or `nobody`, and their clusters go on so.
    """
    owner, wanted = owner_of(cluster), _wanted() if _wanted() != "nobody" else OWN_ACCOUNT
    if os.geteuid() != 0 or owner is None or owner == wanted:
        return None
    files = [cluster.with_name(name) for name in (cluster.name, "socket", "postgresql.log")]
    command = f"chown -hR {shlex.quote(wanted)}: {shlex.join(str(file) for file in files if file.exists())}"
    make = "" if _user(wanted) is not None else f"{shlex.join(['useradd', *_OPTIONS, wanted])}; "
    return (
        f"the embedded database runs as {owner}, whose other processes may read and change it; to have it run as"
        f" {wanted}: tuner db stop; {make}{command}"
    )


def _user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def _made_user() -> pwd.struct_passwd | None:
    """Make the user of our servers, who owns nothing else and logs in nowhere. Raises EmbeddedServerError."""
    useradd = shutil.which("useradd", path=_ADMIN_PATH)
    told = "this system has no useradd"
    # One at a time: two of useradd may make two users of one name.
    with open("/etc/passwd", "rb") as listed:
        wait_until(lambda: try_lock(listed.fileno()), _MAKE_TIMEOUT_S)
        if useradd is not None and _user(OWN_ACCOUNT) is None:
            try:
                done = subprocess.run(
                    [useradd, *_OPTIONS, OWN_ACCOUNT],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=_MAKE_TIMEOUT_S,
                    env={"PATH": _ADMIN_PATH},
                )
                told = done.stderr.strip()
            except subprocess.TimeoutExpired:  # it waits for a lock on /etc/passwd, or a directory of users
                told = f"useradd did not end within {_MAKE_TIMEOUT_S:g} seconds"
    entry = _user(OWN_ACCOUNT)
    if entry is None:
        raise EmbeddedServerError(
            f"as root, PostgreSQL runs as a user of its own, and {OWN_ACCOUNT} cannot be made ({told}); make it"
            f" (useradd --system {OWN_ACCOUNT}), or set TUNER_DB_USER to the name of another"
        )
    return entry
