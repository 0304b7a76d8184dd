from __future__ import annotations

import http.client
import socket
import sys
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tuner.dashboard import connections
from tuner.dashboard.connections import FAIR_SHARE, create_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from wsgiref.types import StartResponse, WSGIEnvironment

HALF_A_REQUEST = b"GET / HTTP/1.1\r\nHost: x"


def hello(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    start_response("200 OK" if environ["PATH_INFO"] == "/" else "401 Unauthorized", [("Content-Length", "5")])
    return [b"hello"]


@contextmanager
def serving() -> Iterator[tuple[str, int]]:
    kept: dict[int, Any] = {}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = create_server(hello, listener, kept)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            left = list(kept.values())
            kept.clear()  # the loop goes on as long as it has any
            left[0].pull_trigger()
            thread.join()
            for one in left:
                one.close()
            server.task_dispatcher.shutdown()


@contextmanager
def held(address: tuple[str, int], count: int, source: str = "127.0.0.1") -> Iterator[list[socket.socket]]:
    """Connections that have sent half a request each."""
    with ExitStack() as stack:
        sockets = []
        for _ in range(count):
            one = stack.enter_context(socket.create_connection(address, timeout=30, source_address=(source, 0)))
            one.send(HALF_A_REQUEST)
            sockets.append(one)
        yield sockets


def answer(connection: http.client.HTTPConnection, path: str = "/") -> int:
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    return response.status


def a_browser(address: tuple[str, int]) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(*address, timeout=30)


def answer_of_the_latest(address: tuple[str, int]) -> int:
    """What a new connection is answered, by when all earlier ones were accepted."""
    with closing(a_browser(address)) as one:
        return answer(one)


def is_closed(one: socket.socket) -> bool:
    """Whether the server ended a connection that it owes no answer."""
    one.settimeout(0)
    try:
        return one.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_who_asks_is_answered_however_many_connections_others_hold() -> None:
    with serving() as address, held(address, connections.CONNECTIONS + 88):
        for _ in range(5):
            assert answer_of_the_latest(address) == 200


def test_a_request_that_comes_a_byte_at_a_time_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_S", 0.5)
    with serving() as address, held(address, 2) as (first, second):
        asked = socket.create_connection(address, timeout=30)
        asked.send(b"GET / HTTP/1.1\r\n\r\n")
        assert asked.recv(4096).startswith(b"HTTP/1.1 200")
        never, deadline = threading.Event(), time.monotonic() + 30
        waiting = [first, second, asked]
        # blank lines before a request are no beginning either, and body bytes no more than a header's
        second.send(b"\r\nContent-Length: 100000\r\n\r\n")
        while waiting and time.monotonic() < deadline:
            for one in waiting:
                try:
                    one.send(b"\r\n" if one is asked else b"a")
                except ConnectionError:
                    continue
            never.wait(0.05)
            waiting = [one for one in waiting if not is_closed(one)]
        asked.close()
        assert waiting == []


@pytest.mark.skipif(sys.platform != "linux", reason="the rest of 127/8 is loopback on Linux alone")
def test_the_address_that_holds_the_most_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CONNECTIONS", 2 * FAIR_SHARE)
    with serving() as address, held(address, 3) as ours, closing(a_browser(address)) as browser:
        assert answer(browser) == 200
        with held(address, 5 * FAIR_SHARE, "127.0.0.2") as theirs:
            assert answer_of_the_latest(address) == 200
            assert [is_closed(one) for one in ours] == [False] * 3
            assert sum(is_closed(one) for one in theirs) >= 3 * FAIR_SHARE
            sock = browser.sock
            assert (answer(browser), browser.sock is sock) == (200, True)


def test_behind_one_address_those_who_were_let_in_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CONNECTIONS", 2 * FAIR_SHARE)
    with serving() as address, closing(a_browser(address)) as browser, closing(a_browser(address)) as stranger:
        assert (answer(browser), answer(stranger, "/no")) == (200, 401)
        with held(address, 5 * FAIR_SHARE):
            assert answer_of_the_latest(address) == 200
            assert is_closed(stranger.sock)
            sock = browser.sock
            assert (answer(browser), browser.sock is sock) == (200, True)
