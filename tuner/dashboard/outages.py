"""What becomes of a page while the database is away: told once in the log, and to the browser as what it is."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from storage.database.engine import is_outage
from storage.database.errors import StorageError
from storage.database.outages import Told

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from tuner.log import Log

T = TypeVar("T")

RETRY_AFTER_S = 5
_READING = ("/api/", "/csv/")  # the rest is files


class Outages:
    """Makes each call of a storage once, and knows of each thread whether its page met an outage."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._of_thread = threading.local()
        self._lock = threading.Lock()
        self._told = Told()

    def __call__(self, call: Callable[[], T], /) -> T:
        """Return `call()`; an outage, as `Told` has it, and the first answer after it are told in the log."""
        try:
            result = call()
        except (StorageError, SQLAlchemyError) as error:
            if is_outage(error):
                told = self._of_thread.error = " ".join(str(error).split())
                with self._lock:
                    is_news = self._told.is_news(error)
                if is_news:
                    self._log.event("database_away", f"{told}; trying again at each request")
            raise
        if self._told:
            with self._lock:
                was_away = bool(self._told)
                self._told.over()
            if was_away:
                self._log.event("database_back", "the database is back")
        return result

    def error(self) -> str | None:
        """Return what this thread's page met, None if it met no outage."""
        error: str | None = getattr(self._of_thread, "error", None)
        return error

    def answered(self, app: WSGIApplication) -> WSGIApplication:
        """Return the application with 503 for its pages that met an outage, of which it logs nothing more."""
        logging.getLogger("optuna_dashboard._bottle_util").addFilter(lambda _: self.error() is None)

        def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            if not environ["PATH_INFO"].startswith(_READING):
                return app(environ, start_response)
            self._of_thread.error = None
            started: list[tuple[Any, ...]] = []
            chunks: list[bytes] = []
            said, environ["wsgi.errors"] = environ["wsgi.errors"], io.StringIO()

            def start_later(*arguments: Any) -> Callable[[bytes], object]:
                started.append(arguments)
                return chunks.append

            chunks.extend(app(environ, start_later))
            error = self.error()
            if error is not None and started[-1][0].startswith("500 "):
                chunks = [json.dumps({"reason": f"the database is away: {error}"}).encode() + b"\n"]
                headers = [("Content-Type", "application/json"), ("Retry-After", str(RETRY_AFTER_S))]
                started.append(("503 Service Unavailable", [*headers, ("Content-Length", str(len(chunks[0])))]))
                chunks = [] if environ["REQUEST_METHOD"] == "HEAD" else chunks
            else:
                said.write(environ["wsgi.errors"].getvalue())
            start_response(*started[-1])
            return chunks

        return answer
