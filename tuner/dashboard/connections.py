"""waitress's server, with bounds on what a client may hold that neither asks nor reads.

As it is, waitress stops accepting at its hundredth connection, and a byte from time to time keeps each of them open.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.server import TcpWSGIServer
from waitress.task import ThreadedTaskDispatcher, WSGITask

from tuner.dashboard.tries import neighbourhood

if TYPE_CHECKING:
    import socket
    from wsgiref.types import WSGIApplication

__all__ = ["create_server"]

CONNECTIONS = 512
# An address may hold as many as there is room for, until others want in: a proxy is one address for many people.
FAIR_SHARE = 32
ACCEPTED_AT_ONCE = 32
REQUEST_S = 30.0  # a request is whole this long after its connection or its first byte
IDLE_S = 120.0
ANSWER_S = 600.0  # an answer is read
MAX_HEADER_BYTES = 64 << 10
MAX_BODY_BYTES = 1 << 20


def create_server(app: WSGIApplication, listener: socket.socket, connections: dict[int, Any]) -> Any:
    """Serve an application to the connections of a listener, all kept in the dict, once `run()` is called.

    X-Forwarded-For reaches the application as the client or a proxy sent it.
    """
    adjustments = Adjustments(
        sockets=[listener],
        ident=None,
        max_request_body_size=MAX_BODY_BYTES,
        max_request_header_size=MAX_HEADER_BYTES,
        clear_untrusted_proxy_headers=False,
        connection_limit=sys.maxsize,  # ours is below
        asyncore_use_poll=True,  # select() knows no descriptor from 1024 on
        cleanup_interval=1,
    )
    dispatcher = ThreadedTaskDispatcher()
    dispatcher.set_thread_count(adjustments.threads)
    return _Server(
        app,
        connections,
        _sock=listener,
        dispatcher=dispatcher,
        adj=adjustments,
        sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()),
        bind_socket=False,
    )


class _Task(WSGITask):  # type: ignore[misc]
    def finish(self) -> None:
        super().finish()
        self.channel.let_in |= self.status[:1] in ("2", "3")


class _Channel(HTTPChannel):  # type: ignore[misc]
    """A connection, and since when it waits for its client."""

    task_class = _Task

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.since = time.monotonic()
        self.asking = True  # the client's turn is to send a request, whole
        self.let_in = False  # a request was answered, and not by a refusal
        super().__init__(*args, **kwargs)
        self.neighbourhood = neighbourhood(self.addr[0])

    # poll would be given the descriptor of one that was closed, and then the next connection that has its number
    def readable(self) -> bool:
        return self.connected and bool(super().readable())

    def writable(self) -> bool:
        return self.connected and bool(super().writable())

    def received(self, data: bytes) -> bool:
        if not self.asking:
            self.asking, self.since = True, time.monotonic()
        return bool(super().received(data))

    def service(self) -> None:
        with self.requests_lock:
            self.asking = self.request is not None  # the next one came along in part
        super().service()
        self.since = time.monotonic()

    def waits(self) -> bool:
        """Whether it is the client's turn: no request is queued or served."""
        return not self.requests

    def is_overdue(self, now: float) -> bool:
        limit_s = ANSWER_S if self.total_outbufs_len else REQUEST_S if self.asking else IDLE_S
        return self.waits() and now - self.since >= limit_s


class _Server(TcpWSGIServer):  # type: ignore[misc]
    """Accepts as long as there is a connection to close for a new one.

    Connections are closed before or after all of a round's are accepted, never between: poll's answer is by number.
    """

    channel_class = _Channel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = CONNECTIONS if descriptors == resource.RLIM_INFINITY else min(CONNECTIONS, descriptors // 2)
        super().__init__(*args, **kwargs)

    def maintenance(self, _now: float) -> None:
        now = time.monotonic()
        for channel in list(self.active_channels.values()):
            if channel.is_overdue(now):
                # not `will_close`: that waits until the client reads
                channel.handle_close()

    def readable(self) -> bool:
        return bool(super().readable()) and (len(self.active_channels) < self._limit or bool(self._waiting()))

    def handle_accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            before = len(self.active_channels)
            super().handle_accept()
            if len(self.active_channels) == before:
                break
        while len(self.active_channels) > self._limit and (waiting := self._waiting()):
            _to_close(waiting).handle_close()

    def _waiting(self) -> list[_Channel]:
        return [channel for channel in self.active_channels.values() if channel.waits()]


def _to_close(waiting: list[_Channel]) -> _Channel:
    """The one whose client had longest for its turn, of the busiest address, and rather one that was never let in."""
    busiest, count = Counter(channel.neighbourhood for channel in waiting).most_common(1)[0]
    if count > FAIR_SHARE:
        waiting = [channel for channel in waiting if channel.neighbourhood == busiest]
    return min(waiting, key=lambda channel: (channel.let_in, channel.since))
