from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import chromium
import optuna
import pytest
from dashboards import STUDY_NAME, TOKEN, Client, a_study
from playwright.sync_api import expect

from tuner.dashboard.server import PortInUseError, serve
from tuner.dashboard.token import find_token, read_token
from tuner.errors import UsageError
from tuner.exits import exit_code
from tuner.log import Log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from optuna.storages import BaseStorage


SERVER = """
import json, os, signal, sys
from storage import open_storage
from tuner.dashboard.server import serve
assert "torch" not in sys.modules and "optuna_dashboard" not in sys.modules
options = json.loads(sys.argv[1])
token = options.pop("token", None)
storage = open_storage(os.environ["DATABASE"], read_only=not options.get("allow_edit", False))
serve(storage, on_ready=lambda url: print(url, flush=True), token=token and (lambda: token), **options)
os.kill(os.getpid(), signal.SIGINT)  # the second of a pair, as `timeout` sends them
assert "torch" not in sys.modules
print("returned")
"""


@contextmanager
def served(database: str, **options: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`serve` in a process of its own, and the URL that it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, json.dumps({"port": 0} | options)],
        env=os.environ | {"DATABASE": database},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url, f"the server ended with {process.wait()}"
        yield process, url
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def port_of(url: str) -> int:
    return int(url.rstrip("/").rpartition(":")[2])


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_cleanly(database: str, stop: signal.Signals) -> None:
    with served(database) as (process, url):
        held = http.client.HTTPConnection("127.0.0.1", port_of(url))
        held.request("GET", "/api/studies")
        assert held.getresponse().read()
        process.send_signal(stop)
        assert process.stdout is not None
        assert process.stdout.read() == "returned\n"
        assert process.wait() == 0
        held.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port_of(url)))


@pytest.mark.slow
def test_the_server_answers_to_loopback_names_with_its_own_port(database: str) -> None:
    with served(database) as (_, url):
        client = Client(port_of(url))
        for host, status in {
            f"127.0.0.1:{client.port}": 200,
            f"LOCALHOST:{client.port}": 200,
            f"[::1]:{client.port}": 200,
            "localhost": 421,
            f"localhost:{client.port + 1}": 421,
            f"tuner.example:{client.port}": 421,
        }.items():
            assert client.ask("/api/studies", headers={"Host": host}).status == status, host


ALL_ADDRESSES = {"host": "0.0.0.0", "token": TOKEN, "allowed_hosts": ["Tuner.example"]}


@pytest.mark.slow
def test_a_server_on_all_addresses_asks_for_its_token(database: str) -> None:
    with served(database, **ALL_ADDRESSES) as (_, url):
        assert url.startswith("http://127.0.0.1:")
        client = Client(port_of(url))
        assert client.ask("/api/studies").status == 401
        headers = {"Authorization": f"Bearer {TOKEN}", "Host": "tuner.example"}
        assert client.ask("/api/studies", headers=headers).status == 200


@pytest.mark.slow
def test_a_big_body_is_refused_before_it_is_read(database: str) -> None:
    with served(database, allow_edit=True) as (_, url):
        client = Client(port_of(url))
        request = f"POST /api/studies HTTP/1.1\r\nHost: {client.host}\r\n"
        with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
            connection.sendall(f"{request}Content-Length: 1048577\r\n\r\n".encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
        with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
            connection.sendall(f"{request}Transfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(16):
                connection.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def never(_url: str) -> None:
    pytest.fail("the server started")


@pytest.fixture
def no_studies() -> BaseStorage:
    return optuna.storages.InMemoryStorage()


def test_a_port_in_use_is_named_with_the_way_out(no_studies: BaseStorage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=rf"127\.0\.0\.1:{port}.*--port") as caught:
            serve(no_studies, port=port, on_ready=never)
    assert "\n" not in str(caught.value)
    assert exit_code(caught.value) == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_server_for_other_machines_needs_a_token(no_studies: BaseStorage, host: str) -> None:
    with pytest.raises(UsageError, match=r"needs a token.*TUNER_DASHBOARD_TOKEN"):
        serve(no_studies, host=host, port=0, on_ready=never)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-name.invalid"])
def test_an_address_of_another_machine_is_refused(no_studies: BaseStorage, host: str) -> None:
    with pytest.raises(UsageError, match=rf"cannot serve the dashboard on {host}.*--host"):
        serve(no_studies, host=host, port=0, token=lambda: TOKEN, on_ready=never)


# --- the token's source


def test_the_token_is_read_from_a_private_file_or_the_environment(tmp_path: Any) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    assert read_token(path, {"TUNER_DASHBOARD_TOKEN": "another-token-of-enough-length"}) == TOKEN
    assert read_token(None, {"TUNER_DASHBOARD_TOKEN": TOKEN}) == TOKEN
    assert read_token(None, {}) is None


def test_a_token_file_that_others_can_read_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o644)
    with pytest.raises(UsageError, match=r"mode 0644.*chmod 600.*--token-file") as caught:
        read_token(path, {})
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"short", b"sixteen and more, but with spaces", b"\xff" * 20])
def test_a_weak_token_is_refused_and_not_shown(tmp_path: Any, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(UsageError, match=r"openssl rand|UTF-8") as caught:
        read_token(path, {})
    assert "spaces" not in str(caught.value)


def test_a_token_is_read_again_and_kept_while_its_file_holds_none(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o600)
    token = find_token(path, Log("json"))
    assert token is not None
    path.write_text("")
    assert (token(), token()) == (TOKEN, TOKEN)
    path.write_text(TOKEN[::-1])
    assert token() == TOKEN[::-1]
    (told,) = capsys.readouterr().err.splitlines()
    assert "until then the token is what it was" in told


def test_a_token_file_that_is_not_there_is_named(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match=r"missing: No such file.*--token-file"):
        read_token(tmp_path / "missing", {})


# --- in a browser


@pytest.mark.slow
@pytest.mark.skipif(chromium.executable() is None, reason="no Chromium or Chrome is installed")
def test_the_study_page_shows_its_name_and_learning_curves_and_asks_nobody_else(database: str) -> None:
    study_id = a_study(database)
    asked: list[str] = []
    errors: list[str] = []
    with served(database, token=TOKEN) as (_, url), chromium.a_page() as page:
        page.context.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        body = page.locator("body")

        page.goto(f"{url}dashboard?token={TOKEN}")
        expect(body).to_contain_text(STUDY_NAME, use_inner_text=True)
        assert "token" not in page.evaluate("location.href")

        page.goto(f"{url}dashboard/studies/{study_id}")
        expect(page.locator("#graph-intermediate-values .scatterlayer .trace")).to_have_count(4)
        assert STUDY_NAME in body.inner_text()
        assert page.evaluate("document.cookie") == ""

        page.goto(f"{url}dashboard/studies/{study_id}/trials")
        expect(body).to_contain_text("Pruned", use_inner_text=True)
        assert f"{url}api/studies" in asked
        assert all(address.startswith((url, "data:", "blob:")) for address in asked)
        assert errors == []


@pytest.mark.slow
@pytest.mark.skipif(chromium.executable() is None, reason="no Chromium or Chrome is installed")
def test_a_read_only_page_hides_what_it_would_refuse_and_says_why(database: str) -> None:
    study_id = a_study(database)
    with served(database) as (_, url), chromium.a_page() as page:
        page.goto(f"{url}dashboard")
        expect(page.get_by_role("link", name=STUDY_NAME)).to_be_visible()
        expect(page.get_by_role("button", name="Reload")).to_be_visible()
        for name in ("Create", "rename study", "delete study"):
            expect(page.get_by_role("button", name=name)).to_have_count(0)
        expect(page.locator("#tuner-read-only")).to_contain_text("--allow-edit")
        expect(page.get_by_role("link", name="Compare")).to_be_visible()
        page.evaluate("id => { fetch(`/api/studies/${id}`, { method: 'DELETE' }) }", study_id)
        expect(page.get_by_role("alert")).to_contain_text("this dashboard is read-only; start it with '--allow-edit'")
    with served(database, allow_edit=True) as (_, url), chromium.a_page() as page:
        page.goto(f"{url}dashboard")
        for name in ("Create", "delete study"):
            expect(page.get_by_role("button", name=name)).to_be_visible()
        expect(page.get_by_role("button", name="rename study")).to_have_count(0)
        expect(page.locator("#tuner-read-only")).to_have_count(0)
