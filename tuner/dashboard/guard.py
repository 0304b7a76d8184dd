"""optuna-dashboard behind a guard that settles who may ask, from where, and for what.

optuna-dashboard has no authentication and answers any Host header, so everything that keeps strangers and
foreign web pages out is here. It is read-only unless started otherwise, and it never gets an artifact store
or a language model.
"""

from __future__ import annotations

import csv
import hmac
import io
import json
import re
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit
from wsgiref.headers import Headers

from sqlalchemy.exc import SQLAlchemyError

from storage.database.errors import StorageError
from tuner.dashboard import page
from tuner.dashboard.outages import RETRY_AFTER_S
from tuner.dashboard.sessions import LIFETIME_S, Sessions
from tuner.dashboard.tries import Tries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["Guard"]

# What we let through of optuna-dashboard 0.21, as lists of what is allowed: a route that a later version adds
# stays shut until somebody has looked at it. None of these pages writes (dated 2026-11).
_PAGES = re.compile(
    r"""/? | /sign-out | /dashboard(/.*)? | /tuner\.js | /favicon\.ico | /static/[\w.-]+ | /incompatible-rdb-schema
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

SIGN_OUT = "/sign-out"
HEALTH = "/healthz"
_COOKIE = "Path=/; HttpOnly; SameSite=Strict"

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


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
    `token` tells the token as it is now: another one ends the sessions of the last. `check` asks the database, for
    `HEALTH`, and raises what came of it.
    The limit on a request's body is the server's (see `serve`).
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        allow_edit: bool,
        hosts: frozenset[str],
        token: Callable[[], str] | None,
        check: Callable[[], object] | None = None,
    ) -> None:
        self._app = app
        self._allow_edit = allow_edit
        self._hosts = hosts
        self._token = token
        self._check = check
        self._tries = Tries()
        self._of_token: tuple[str, Sessions] | None = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")

        def start_hardened(
            status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
        ) -> Callable[[bytes], object]:
            return start_response(status, _harden(headers, path), exc_info)

        if path == HEALTH and environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return self._health(environ, start_hardened)
        try:
            self._check_host(environ)
            self._check_route(environ)
            self._check_token(environ)
            self._check_sign_out(environ)
            self._check_origin(environ)
        except _Refused as refused:
            start_hardened(refused.status, [("Content-Type", "application/json"), *refused.headers])
            body = json.dumps({"reason": refused.reason}).encode() + b"\n"
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

        # optuna-dashboard would redirect to the host that they name
        for name in [name for name in environ if name.startswith(("HTTP_X_FORWARDED_", "HTTP_FORWARDED"))]:
            del environ[name]
        # optuna-dashboard answers 500 to a client that sends no Accept-Encoding, curl for one
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")
        if path.startswith("/csv/") and environ["REQUEST_METHOD"] == "GET":
            return _csv_without_formulas(self._app, environ, start_hardened)
        if path == page.SCRIPT_PATH:
            return page.script(start_hardened)
        if re.fullmatch("/dashboard(/.*)?", path):
            return page.page(self._app, environ, start_hardened, allow_edit=self._allow_edit)
        return self._app(environ, start_hardened)

    def _health(self, environ: WSGIEnvironment, start: Callable[..., object]) -> Iterable[bytes]:
        """Tell who watches over the dashboard whether it has its database: whoever asks, by whatever name."""
        status, told, headers = "200 OK", "there", [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
        try:
            if self._check is not None:
                self._check()
        except (StorageError, SQLAlchemyError):
            status, told = "503 Service Unavailable", "away"
            headers.append(("Retry-After", str(RETRY_AFTER_S)))
        start(status, headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [json.dumps({"database": told}).encode() + b"\n"]

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
        token = self._token()
        if self._of_token is None or self._of_token[0] != token:
            self._of_token = token, Sessions()
        sessions = self._of_token[1]
        cookie = _cookie_name(environ)
        query = parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        in_url = [value for name, value in query if name == "token"][:1]  # one try
        has_session = any(sessions.is_open(value) for value in _cookies(environ, cookie))
        if has_session and not in_url:
            return
        scheme, _, credentials = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        bearer = [credentials.strip()] if scheme.lower() == "bearer" else []
        if in_url or bearer:
            client = environ.get("REMOTE_ADDR", ""), environ.get("HTTP_X_FORWARDED_FOR", "")
            if (wait_s := self._tries.wait_s(*client)) and not has_session:
                raise _Refused(
                    "429 Too Many Requests",
                    f"too many wrong tokens came from your address; try again in {wait_s} s",
                    ("Retry-After", str(wait_s)),
                )
            if not wait_s and any(_same(value, token) for value in bearer):
                return
            if not wait_s and any(_same(value, token) for value in in_url):
                rest = urlencode([(name, value) for name, value in query if name != "token"])
                path = quote(environ.get("PATH_INFO", ""), encoding="latin-1") or "/"
                raise _Refused(
                    "303 See Other",
                    "welcome",
                    ("Location", f"{path}?{rest}" if rest else path),
                    ("Set-Cookie", f"{cookie}={sessions.start()}; Max-Age={LIFETIME_S}; {_COOKIE}"),
                    ("Cache-Control", "no-store"),
                )
            self._tries.was_wrong(*client)
        if has_session:
            return
        raise _Refused(
            "401 Unauthorized",
            "this dashboard needs its token: open it with '?token=...' or send 'Authorization: Bearer ...'",
            ("WWW-Authenticate", "Bearer"),
        )

    def _check_sign_out(self, environ: WSGIEnvironment) -> None:
        """End the browser's session where it asks for that."""
        if environ.get("PATH_INFO", "") != SIGN_OUT:
            return
        cookie = _cookie_name(environ)
        for value in _cookies(environ, cookie):
            if self._of_token is not None:
                self._of_token[1].end(value)
        raise _Refused("200 OK", "signed out", ("Set-Cookie", f"{cookie}=; Max-Age=0; {_COOKIE}"))

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


def _cookie_name(environ: WSGIEnvironment) -> str:
    """A browser shares cookies between the ports of a host: the name tells two dashboards apart."""
    return f"tuner_dashboard_{environ['SERVER_PORT']}"


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
        csv.field_size_limit(sys.maxsize)  # a cell is as large as an attribute, and those may have megabytes
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
