"""A TCP port in front of PostgreSQL that loses connections at a chosen request, or that swallows all it is sent."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import Enum

from sqlalchemy import URL

from storage import parse_url

_QUERY, _TERMINATE = b"Q", b"X"
_READY, _AUTHENTICATION, _COPY_IN, _COPY_DATA = b"Z", b"R", b"G", b"d"
_WANTS_AN_ANSWER = {3, 5, 10, 11}  # kinds of authentication at which it is the client's turn


class Loss(Enum):
    """What is lost when a connection is cut at a request."""

    REQUEST = "request"  # the server never saw it, and loses the connection as well
    ANSWER = "answer"  # the server has done it, and then loses the connection as well
    NOTICE = "notice"  # the server never saw it, and takes the client for connected
    BOTH = "answer and notice"  # the server has done it, and takes the client for connected


class Proxy:
    """Forwards connections to the server of a URL, request by request, as libpq's simple query protocol has them.

    `queries` are those that came since the last `cut` or `forget`, lost ones included.
    """

    def __init__(self, url: str, host: str = "127.0.0.1") -> None:
        self._server = parse_url(url)
        self._listener = socket.create_server((host, 0))
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = [self._listener]
        self._cut: tuple[int | str, Loss] | None = None
        self.queries: list[str] = []
        self.is_hole = False
        self._start(self._accept)

    @property
    def url(self) -> URL:
        """The server's URL by way of this proxy, unencrypted."""
        query = {"sslmode": "disable", "gssencmode": "disable"}
        host, port = self._listener.getsockname()
        return self._server.set(host=host, port=port, query=query)

    def forget(self) -> None:
        """Count queries from here on."""
        with self._lock:
            self.queries = []

    def cut(self, at: int | str, loss: Loss) -> None:
        """Lose the connection of the query after the next `at` ones, or of the next that starts so; once."""
        with self._lock:
            self.queries = []
            self._cut = at, loss

    @property
    def has_cut(self) -> bool:
        return self._cut is None

    def close(self) -> None:
        """Close all connections, and wait for the threads."""
        with self._lock:
            for each in self._open:
                _shut(each)
        for thread in self._threads:
            thread.join(10)
        for each in self._open:
            each.close()

    def _start(self, work: Callable[..., None], *arguments: socket.socket) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            with self._lock:
                self._open.append(client)
            if not self.is_hole:
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        keeps_server = False
        server = self._connect()
        try:
            keeps_server = self._forward(client, server)
        except (ConnectionError, EOFError):
            pass  # one side is gone, and so is the other now
        finally:
            _shut(client)
            if not keeps_server:
                _shut(server)

    def _connect(self) -> socket.socket:
        directory = self._server.query.get("host")
        port = int(str(self._server.query.get("port") or self._server.port or 5432))
        if isinstance(directory, str):
            server = socket.socket(socket.AF_UNIX)
            self._open.append(server)
            server.connect(f"{directory}/.s.PGSQL.{port}")
        else:
            server = socket.create_connection((self._server.host or "127.0.0.1", port))
            self._open.append(server)
        return server

    def _forward(self, client: socket.socket, server: socket.socket) -> bool:
        """Take turns until the connection ends; return whether the server is to be left connected."""
        request = _startup(client)
        while True:
            kind = request[:1]
            loss = self._loss_at(request) if kind == _QUERY else None
            if loss in (Loss.REQUEST, Loss.NOTICE):
                return loss == Loss.NOTICE
            server.sendall(request)
            if kind == _TERMINATE:
                return False
            answer = _answer(server)
            if kind == _QUERY and not _is_ready(answer):  # COPY, which wants data now
                client.sendall(answer)
                server.sendall(_copied(client))
                answer = _answer(server)
            if loss is not None:
                return loss == Loss.BOTH
            client.sendall(answer)
            request = _message(client)

    def _loss_at(self, request: bytes) -> Loss | None:
        with self._lock:
            query = request[5:-1].decode()
            self.queries.append(query)
            if self._cut is None:
                return None
            at, loss = self._cut
            if not (query.startswith(at) if isinstance(at, str) else len(self.queries) > at):
                return None
            self._cut = None
            return loss


def _answer(server: socket.socket) -> bytes:
    """Read the server's messages up to the client's turn."""
    answer = b""
    while True:
        message = _message(server)
        answer += message
        if message[:1] in (_READY, _COPY_IN):
            return answer
        if message[:1] == _AUTHENTICATION and struct.unpack("!i", message[5:9])[0] in _WANTS_AN_ANSWER:
            return answer


def _is_ready(answer: bytes) -> bool:
    return answer[-6:-5] == _READY  # a byte, its length of four bytes, and one of state


def _copied(client: socket.socket) -> bytes:
    """Read what the client copies, to its end."""
    sent = bytearray()
    while True:
        message = _message(client)
        sent += message
        if message[:1] != _COPY_DATA:
            return bytes(sent)


def _startup(client: socket.socket) -> bytes:
    length = _exactly(client, 4)
    return length + _exactly(client, struct.unpack("!i", length)[0] - 4)


def _message(peer: socket.socket) -> bytes:
    head = _exactly(peer, 5)
    return head + _exactly(peer, struct.unpack("!i", head[1:])[0] - 4)


def _exactly(peer: socket.socket, n_bytes: int) -> bytes:
    received = b""
    while len(received) < n_bytes:
        chunk = peer.recv(n_bytes - len(received))
        if not chunk:
            raise EOFError
        received += chunk
    return received


def _shut(each: socket.socket) -> None:
    with suppress(OSError):  # was not connected any more
        each.shutdown(socket.SHUT_RDWR)
