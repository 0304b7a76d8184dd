"""A study worth looking at, and a client that can send a dashboard anything."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from storage import open_storage
from tuner.dashboard.guard import Guard

__all__ = ["STUDY_NAME", "TOKEN", "Answer", "Client", "a_study", "guarded"]

TOKEN = "0123456789abcdef0123456789abcdef"
STUDY_NAME = "digits <b>&amp;"


def a_study(database: str, **user_attrs: str) -> int:
    """A study with learning curves: two complete trials, one pruned at its second epoch, one running."""
    storage = open_storage(database)
    study = optuna.create_study(storage=storage, study_name=STUDY_NAME, direction="maximize")
    for number, (state, curve) in enumerate(
        [
            (TrialState.COMPLETE, [0.5, 0.7, 0.8]),
            (TrialState.COMPLETE, [0.6, 0.8, 0.9]),
            (TrialState.PRUNED, [0.1, 0.2]),
            (TrialState.RUNNING, [0.4]),
        ]
    ):
        trial = create_trial(
            state=state,
            value=curve[-1] if state.is_finished() else None,
            params={"lr": 0.1 / (number + 1)},
            distributions={"lr": FloatDistribution(1e-4, 1, log=True)},
            intermediate_values=dict(enumerate(curve)),
            user_attrs=user_attrs,
        )
        study.add_trial(trial)
    return study._study_id


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def reason(self) -> str:
        return str(json.loads(self.body)["reason"])


@dataclass(frozen=True)
class Client:
    """Asks a dashboard on loopback, with any header that a hostile page or program could send."""

    port: int

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def ask(
        self,
        path: str,
        method: str = "GET",
        *,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body=body, headers={"Host": self.host} | (headers or {}))
        response = connection.getresponse()
        answer = Answer(response.status, response.headers, response.read())
        connection.close()
        return answer

    def change(self, path: str, method: str, content: Any = None, **headers: str) -> Answer:
        """Ask for a change as the dashboard's own page does."""
        body = None if content is None else json.dumps(content).encode()
        ours = {
            "Origin": f"http://{self.host}",
            "Sec-Fetch-Site": "same-origin",
            "Content-Type": "application/json",
        }
        return self.ask(path, method, body=body, headers=ours | headers)


class QuietHandler(WSGIRequestHandler):
    def log_message(self, *_args: object) -> None:
        pass


class ThreadedServer(ThreadingMixIn, WSGIServer):
    daemon_threads = False


@contextmanager
def guarded(
    app: Any,
    *,
    allow_edit: bool = False,
    token: str | Callable[[], str] | None = None,
    hosts: frozenset[str] = frozenset(),
    check: Callable[[], object] | None = None,
) -> Iterator[Client]:
    """The guard and what is behind it on a port of this process."""
    with ThreadedServer(("127.0.0.1", 0), QuietHandler) as server:
        client = Client(server.server_port)
        current = (lambda: token) if isinstance(token, str) else token
        server.set_app(Guard(app, allow_edit=allow_edit, hosts=hosts | {client.host}, token=current, check=check))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield client
        finally:
            server.shutdown()
            thread.join()
