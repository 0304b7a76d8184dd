"""optuna-dashboard behind a guard that settles who may ask, from where, and for what.

optuna-dashboard has no authentication and answers any Host header, so everything that keeps strangers and
foreign web pages out is here. It is read-only unless started otherwise, and it never gets an artifact store
or a language model.
"""

from __future__ import annotations

import csv
import errno
import gc
import hashlib
import hmac
import io
import ipaddress
import json
import os
import re
import signal
import socket
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit
from wsgiref.headers import Headers

from tuner.errors import TunerError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path
    from types import FrameType
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from optuna.storages import BaseStorage

__all__ = ["Guard", "PortInUseError", "read_token", "serve"]

MAX_BODY_BYTES = 1 << 20

# What we let through of optuna-dashboard 0.21, as lists of what is allowed: a route that a later version adds
# stays shut until somebody has looked at it. None of these pages writes (dated 2026-11).
_PAGES = re.compile(
    r"""/? | /dashboard(/.*)? | /favicon\.ico | /static/[\w.-]+ | /incompatible-rdb-schema
    | /api/meta | /api/studies | /api/studies/[0-9]+(/param_importances | /plot/[a-z_]+)?
    | /csv/[0-9]+ | /artifacts(/[0-9]+){1,2}/[0-9a-fA-F-]+""",
    re.ASCII | re.VERBOSE,
)
# Not offered even to editors: rename (copies the study without its spec, then deletes it), tell (fails a
# trial under the worker that runs it, or completes it with NaN), migration, artifacts, language models.
_EDITS = {
    "POST": re.compile(
        r"""/api/studies | /api/trials/[0-9]+/user-attrs | /api/studies/[0-9]+/[0-9]+/skip
        | /api/studies/[0-9]+/preference(/[0-9a-fA-F-]+)?""",
        re.VERBOSE,
    ),
    "PUT": re.compile(
        r"/api/studies/[0-9]+(/[0-9]+)?/note | /api/studies/[0-9]+/preference_feedback_component", re.VERBOSE
    ),
    "DELETE": re.compile(r"/api/studies/[0-9]+(/preference/[0-9a-fA-F-]+)?"),
}

_RESPONSE_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
_CSP = "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


class PortInUseError(TunerError):
    """Something else listens on the port already."""


def serve(
    storage: BaseStorage,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    allow_edit: bool = False,
    token: str | None = None,
    allowed_hosts: Iterable[str] = (),
    on_ready: Callable[[str], None],
) -> None:
    """Serve the dashboard of a storage until SIGINT or SIGTERM, then return; call it from the main thread.

    Port 0 takes a free one. `on_ready` gets the dashboard's URL, never the token, once connections are
    accepted. `allowed_hosts` are further values of the Host header, as the address bar shows them:
    `tuner.example.org:8080`.

    Raises PortInUseError, and UsageError for an address that cannot be bound or that needs a token.
    """
    from optuna_dashboard import wsgi
    from waitress.server import create_server
    from waitress.wasyncore import close_all

    with _listen(host, port, has_token=token is not None) as listener:
        address, port = listener.getsockname()[:2]
        hosts = _own_hosts(host, address, port) | {name.lower() for name in allowed_hosts}
        connections: dict[int, Any] = {}
        server = create_server(
            Guard(wsgi(storage), allow_edit=allow_edit, hosts=hosts, token=token),
            map=connections,
            sockets=[listener],
            max_request_body_size=MAX_BODY_BYTES,
            ident=None,
        )
        # waitress stops on SystemExit; one that arrives before run(), or a second one while run() waits up to
        # 5 s for its threads, comes out of it
        try:
            with _signals_as_exit(), _rare_collections(), suppress(SystemExit):
                on_ready(f"http://{_reachable(address)}:{port}/")
                server.run()
        finally:
            close_all(connections)


def read_token(path: Path | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The access token from a file that only its owner can read, or else from TUNER_DASHBOARD_TOKEN.

    None if neither is given. Raises UsageError if the file cannot be read, if others can read it too, or if
    the token could be guessed.
    """
    if path is not None:
        source, token = str(path), _read_private(path)
    elif "TUNER_DASHBOARD_TOKEN" in environ:
        source, token = "TUNER_DASHBOARD_TOKEN", environ["TUNER_DASHBOARD_TOKEN"]
    else:
        return None
    if not re.fullmatch(r"[!-~]{16,}", token.strip()):
        raise UsageError(
            "the dashboard's token must be 16 or more ASCII letters, digits and signs without a space, "
            f"what {source} holds is not; make one with 'openssl rand -hex 32'"
        )
    return token.strip()


class _Refused(Exception):  # noqa: N818 - also a redirect
    """The guard answers instead of the application."""

    def __init__(self, status: str, reason: str, *headers: tuple[str, str]) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = headers


class Guard:
    """A WSGI application: optuna-dashboard's, for those who may ask.

    `hosts` are the values of the Host header that are answered, in lower case, with the port unless it is 80.
    The limit on a request's body is the server's (see `serve`).
    """

    def __init__(self, app: WSGIApplication, *, allow_edit: bool, hosts: frozenset[str], token: str | None) -> None:
        self._app = app
        self._allow_edit = allow_edit
        self._hosts = hosts
        self._token = token

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")

        def start_hardened(
            status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
        ) -> Callable[[bytes], object]:
            return start_response(status, _harden(headers, path), exc_info)

        try:
            self._check_host(environ)
            self._check_route(environ)
            self._check_token(environ)
            self._check_origin(environ)
        except _Refused as refused:
            start_hardened(refused.status, [("Content-Type", "application/json"), *refused.headers])
            body = json.dumps({"reason": refused.reason}).encode() + b"\n"
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

        # optuna-dashboard answers 500 to a client that sends no Accept-Encoding, curl for one
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")
        if path.startswith("/csv/") and environ["REQUEST_METHOD"] == "GET":
            return _csv_without_formulas(self._app, environ, start_hardened)
        return self._app(environ, start_hardened)

    def _check_host(self, environ: WSGIEnvironment) -> None:
        """Keep out pages of a foreign site whose name resolves to this address (DNS rebinding)."""
        host = environ.get("HTTP_HOST", "")
        if host.lower() not in self._hosts:
            raise _Refused(
                "421 Misdirected Request",
                f"this dashboard does not answer to the host {host!r}; "
                "if that is its name, start it with '--allowed-host'",
            )

    def _check_route(self, environ: WSGIEnvironment) -> None:
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
        if method in ("GET", "HEAD"):
            if not _PAGES.fullmatch(path):
                raise _Refused("404 Not Found", "no such page")
        elif not self._allow_edit:
            raise _Refused(
                "405 Method Not Allowed",
                "this dashboard is read-only; start it with '--allow-edit' to change studies",
                ("Allow", "GET, HEAD"),
            )
        elif method not in _EDITS or not _EDITS[method].fullmatch(path):
            raise _Refused("403 Forbidden", "this change is not offered here; the 'tuner' command may have it")

    def _check_token(self, environ: WSGIEnvironment) -> None:
        """Ask for the token: as a bearer token, or as `?token=`, which is exchanged for a cookie."""
        if self._token is None:
            return
        scheme, _, credentials = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if scheme.lower() == "bearer" and _same(credentials.strip(), self._token):
            return
        # a browser shares cookies between the ports of a host: the name tells two dashboards apart, and the
        # value is of no use as a token
        cookie = f"tuner_dashboard_{environ['SERVER_PORT']}"
        session = hmac.new(self._token.encode(), b"cookie", hashlib.sha256).hexdigest()
        query = parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        if any(name == "token" and _same(value, self._token) for name, value in query):
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            path = quote(environ.get("PATH_INFO", ""), encoding="latin-1") or "/"
            raise _Refused(
                "303 See Other",
                "welcome",
                ("Location", f"{path}?{rest}" if rest else path),
                ("Set-Cookie", f"{cookie}={session}; Path=/; HttpOnly; SameSite=Strict"),
                ("Cache-Control", "no-store"),
            )
        if any(_same(value, session) for value in _cookies(environ, cookie)):
            return
        raise _Refused(
            "401 Unauthorized",
            "this dashboard needs its token: open it with '?token=...' or send 'Authorization: Bearer ...'",
            ("WWW-Authenticate", "Bearer"),
        )

    def _check_origin(self, environ: WSGIEnvironment) -> None:
        """Refuse a change that another site's page asks for (a POST without a body needs no preflight)."""
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return
        origin = environ.get("HTTP_ORIGIN") or environ.get("HTTP_REFERER", "")
        fetch_site = environ.get("HTTP_SEC_FETCH_SITE", "none")
        if _netloc(origin) != environ["HTTP_HOST"].lower() or fetch_site not in ("same-origin", "none"):
            raise _Refused("403 Forbidden", "changes are taken only from this dashboard's own pages")


def _same(given: str, wanted: str) -> bool:
    """Compare secrets in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())


def _cookies(environ: WSGIEnvironment, name: str) -> Iterator[str]:
    """All values of a cookie; http.cookies would stop at the first odd cookie of another program."""
    for pair in environ.get("HTTP_COOKIE", "").split(";"):
        key, _, value = pair.strip().partition("=")
        if key == name:
            yield value


def _netloc(url: str) -> str | None:
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return None


def _harden(headers: list[tuple[str, str]], path: str) -> list[tuple[str, str]]:
    hardened = Headers([(name, value) for name, value in headers if not name.lower().startswith("access-control-")])
    for name, value in _RESPONSE_HEADERS.items():
        hardened[name] = value
    policy = hardened["Content-Security-Policy"] or "default-src 'none'"
    if path.startswith("/artifacts/"):
        hardened["Content-Disposition"] = "attachment"  # an artifact is whatever somebody uploaded, a web page even
        policy = "default-src 'none'; sandbox"
    hardened["Content-Security-Policy"] = f"{policy}; {_CSP}"
    return hardened.items()


def _csv_without_formulas(
    app: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse
) -> Iterable[bytes]:
    """Pass a study's export on without a cell that a spreadsheet would run, named after the study's id."""
    started: list[tuple[str, list[tuple[str, str]]]] = []
    chunks: list[bytes] = []

    def start_later(status: str, headers: list[tuple[str, str]], _exc_info: Any = None, /) -> Callable[[bytes], object]:
        started.append((status, headers))
        return chunks.append

    chunks.extend(app(environ, start_later))
    body = b"".join(chunks)
    status, headers = started[-1]
    if status.startswith("200 "):
        output = io.StringIO(newline="")
        rows = csv.reader(io.StringIO(body.decode(), newline=""))
        csv.writer(output).writerows([_defused(cell) for cell in row] for row in rows)
        body = output.getvalue().encode()
        study_id = environ["PATH_INFO"].removeprefix("/csv/")
        headers = [
            ("Content-Type", "text/csv; charset=utf-8"),
            ("Content-Disposition", f"attachment; filename=study-{study_id}.csv"),
            ("Content-Length", str(len(body))),
        ]
    start_response(status, headers)
    return [body]


def _defused(cell: str) -> str:
    """The cell, as text if a spreadsheet would take it for a formula; numbers stay numbers.

    See https://owasp.org/www-community/attacks/CSV_Injection.
    """
    if not cell.startswith(_FORMULA_STARTS):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


@contextmanager
def _listen(host: str, port: int, *, has_token: bool) -> Iterator[socket.socket]:
    """Bind before the server starts its threads. Raises as `serve` says."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        if not (has_token or ipaddress.ip_address(address[0]).is_loopback):
            raise UsageError(
                f"a dashboard on {host} is open to other machines and needs a token; "
                "give one in TUNER_DASHBOARD_TOKEN or '--token-file', or leave out '--host'"
            )
        listener = socket.create_server(address, family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"cannot serve the dashboard on {_bracketed(host)}:{port}: something listens there already; "
                "take another port with '--port', or 0 for any free one"
            ) from error
        raise UsageError(
            f"cannot serve the dashboard on {_bracketed(host)}:{port}: {error.strerror}; "
            "give an address of this machine with '--host' and a port that you may use with '--port'"
        ) from error
    with listener:
        yield listener


def _own_hosts(host: str, address: str, port: int) -> frozenset[str]:
    """The Host headers that reach a listener directly: loopback's names, and what it was bound to."""
    names = {"127.0.0.1", "localhost", "[::1]", _bracketed(host.lower()), _bracketed(address)}
    own = {f"{name}:{port}" for name in names}
    return frozenset(own | names if port == 80 else own)


def _reachable(address: str) -> str:
    """The address for a browser on this machine; a listener on all addresses is on loopback too."""
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - read, not bound
    return _bracketed(loopback.get(address, address))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let the garbage collector look less often at the objects that a page is made of, none of which are in cycles.

    A study's page of 10,000 trials of 20 steps takes 1.9 s instead of 2.2 s (2 cores, 2026-11).
    """
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def _signals_as_exit() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into SystemExit, and put their handlers back."""

    def stop(_signum: int, _frame: FrameType | None) -> None:
        raise SystemExit

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _read_private(path: Path) -> str:
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read()
    except OSError as error:
        raise UsageError(
            f"cannot read the dashboard's token from {path}: {error.strerror}; check '--token-file'"
        ) from error
    if mode & 0o077:
        raise UsageError(f"the token file {path} can be read by others (mode {mode:04o}); run 'chmod 600 {path}'")
    return content
