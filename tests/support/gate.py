"""A TCP port in front of PostgreSQL through which nothing passes while it is shut."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from sqlalchemy import URL

from storage import parse_url


class Gate:
    """Forwards bytes both ways. Shut, it takes what is sent and keeps it, for when it opens again."""

    def __init__(self, url: str, host: str = "127.0.0.1") -> None:
        self._server = parse_url(url)
        self._host = host
        self._listener = socket.create_server((host, 0))
        self._open = threading.Event()
        self._open.set()
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> URL:
        """The server's URL by way of this gate, unencrypted."""
        query = {"sslmode": "disable", "gssencmode": "disable"}
        return self._server.set(host=self._host, port=self._listener.getsockname()[1], query=query)

    def shut(self) -> None:
        """Let nothing through from now on."""
        self._open.clear()

    def open(self, *, drop: bool = False) -> None:
        """Let all through again; `drop` loses the connections that there were, with what they had sent."""
        if drop:
            self._drop()
        self._open.set()

    def close(self) -> None:
        """Close the port and all connections."""
        self._listener.close()
        self._drop()
        self._open.set()

    def _drop(self) -> None:
        with self._lock:
            for each in self._connections:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            self._connections.clear()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self._open.wait()
        with client, socket.socket(socket.AF_UNIX) as server:
            try:
                server.connect(f"{self._server.query['host']}/.s.PGSQL.{self._server.query.get('port', 5432)}")
            except OSError:  # the server is down
                return
            with self._lock:
                self._connections += [client, server]
            back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
            back.start()
            self._pump(client, server)
            back.join()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._open.wait()
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
