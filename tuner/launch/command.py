"""What every engine needs: a study that workers can join, a database that other machines reach, and their command."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import shlex
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from storage.coordination import standings
from storage.database.identity import identity
from storage.database.sessions import Sessions
from storage.database.url import mask_url, parse_url
from tuner.errors import StudyFailedError, TunerError, UsageError
from tuner.study.joining import Study, check_code, open_study, why_failed
from tuner.study.registry import ObjectiveSource, find_objective

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import URL, Engine

_GIVE_URL = "give the one by which they reach it: --storage postgresql://user@host/database"


def checked_study(engine: Engine, name: str) -> Study:
    """Return a study that has something left for workers to run.

    Raises StudyNotFoundError, StudyFailedError, or TunerError for one that tuner did not create or that is finished.
    """
    study = open_study(engine, name)
    if (why := why_failed(engine, study)) is not None:
        raise StudyFailedError(why)
    closed = standings.closed(standings.look(Sessions(engine), study.study_id), study.budget)
    if closed is not None and closed.final:
        more = "" if ";" in closed.reason else f"; 'tuner extend {shlex.quote(name)} --trials +20' adds to it"
        raise TunerError(f"study {name!r} has nothing for workers to run: {closed.reason}{more}")
    return study


def label(engine: Engine, study: Study) -> str:
    """Return what an engine's jobs of this study are called: its name as far as it is plain, and a number of its own.

    Lower-case letters, digits and hyphens, at most 47: what SLURM, Ray and Kubernetes take alike. Of two databases'
    studies, and of two that had one name, no two have one.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", study.name.lower())[:32].strip("-") or "study"
    of_study = f"{identity(engine)} {study.directory}"
    return f"tuner-{plain}-{hashlib.sha256(of_study.encode()).hexdigest()[:8]}"


def reachable_url(storage: str | None, environ: Mapping[str, str] | None = None) -> URL:
    """Return the database's URL if it can lead there from other machines, too.

    `storage` is what --storage says; what it leaves out libpq takes from `environ`. Raises UsageError for the private
    database, a socket or the loopback; InvalidURLError.
    """
    if storage is None:
        raise UsageError(
            "workers on other machines need a database that they reach, and the private one is reached from this"
            " machine alone: --storage postgresql://user@host/database names one (docs/deployment.md sets one up, and"
            " 'tuner import' copies studies into it)"
        )
    url = parse_url(storage)
    hosts = list(_hosts(url, os.environ if environ is None else environ))
    if sockets := [host for host in hosts if host.startswith(("/", "@")) or not host]:
        where = f"the socket {sockets[0]}" if sockets[0] else "a socket, as it names no host"
        raise UsageError(f"{mask_url(url)} leads to {where}, which other machines do not reach; {_GIVE_URL}")
    for host in hosts:
        if _is_loopback(host):
            raise UsageError(
                f"{mask_url(url)} leads from each machine to itself, as {host} is its loopback; {_GIVE_URL}"
            )
    return url


def without_password(url: URL) -> str:
    """Return the URL as text that may be shown to anybody who reads a job's script. Raises UsageError if it may not."""
    shown = mask_url(url)
    if url.password is not None or "***" in shown:
        raise UsageError(
            f"{shown} holds a password, which would lie in the job's script; put it into a file of mode 0600 that the"
            " nodes see, and give --storage-password-file FILE and the URL without it"
        )
    return shown


def variables(url: URL, settings: Mapping[str, Path | str | None], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which `tuner` reaches the database there as here, none of them a secret.

    `settings` are the other options of every command, by the names of their variables. Raises UsageError if the
    password is in the URL or in PGPASSWORD.
    """
    storage = without_password(url)
    if "PGPASSWORD" in environ and settings.get("TUNER_STORAGE_PASSWORD_FILE") is None:
        raise UsageError(
            "PGPASSWORD is not given to jobs, whose environment others keep; put the password into a file of mode 0600"
            " that the nodes see, and give --storage-password-file FILE"
        )
    of_libpq = {name: value for name, value in environ.items() if name.startswith("PG") and name != "PGPASSWORD"}
    trusted = {name: environ[name] for name in ("TUNER_TRUSTED_DIRECTORIES",) if name in environ}
    given = {name: str(value) for name, value in settings.items() if value is not None}
    return {"TUNER_STORAGE": storage, **given, **trusted, **of_libpq}


def local_objective(study: Study, reference: str, *, allow_code_change: bool) -> ObjectiveSource:
    """Return where the study's objective lies here. Raises TunerError if it is not here, or has other code."""
    source = find_objective(reference)
    check_code(study, source, allow_code_change=allow_code_change)
    return source


def worker_arguments(
    study: Study,
    *,
    objective: str | None,
    slots: str = "auto",
    device: str | None = None,
    allow_code_change: bool = False,
) -> list[str]:
    """Return the arguments of the `tuner` that runs the study's trials; where the database is it has from variables."""
    arguments = ["worker"]
    if slots != "auto":
        arguments += ["--slots", slots]
    if device is not None:
        arguments += ["--device", device]
    if objective is not None:
        arguments += ["--objective", objective]
    if allow_code_change:
        arguments += ["--allow-code-change"]
    return [*arguments, *(["--"] if study.name.startswith("-") else []), study.name]


def _hosts(url: URL, environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the hosts that libpq would try, an empty one for its own socket; none if a service says them."""
    given = [_texts(url.query.get(name)) for name in ("hostaddr", "host")]
    named = given[0] or given[1] or ([url.host] if url.host else [])
    if not named and ("service" in url.query or "PGSERVICE" in environ):
        return
    named = named or [environ.get("PGHOSTADDR") or environ.get("PGHOST") or ""]
    for text in named:
        yield from (host.strip() for host in text.split(","))


def _texts(value: str | tuple[str, ...] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _is_loopback(host: str) -> bool:
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    if name in (socket.gethostname().lower(), socket.getfqdn().lower()):
        return False  # Debian has it lead to 127.0.1.1 here; elsewhere it does not
    try:
        found = {address[4][0] for address in socket.getaddrinfo(name, None)}
    except (OSError, UnicodeError):
        return False  # a name that only the nodes know
    return all(_leads_here(ipaddress.ip_address(str(address).partition("%")[0])) for address in found)


def _leads_here(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    inner = getattr(address, "ipv4_mapped", None) or address
    return bool(inner.is_loopback or inner.is_unspecified)
