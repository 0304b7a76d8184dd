"""Outages that the server or this machine has a cause for: the cause is named, not its consequence."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg2
import pytest
from sqlalchemy import text

from storage import AuthenticationError, UnreachableError, open_engine
from storage.database.engine import is_outage
from storage.database.sessions import Sessions


@pytest.fixture
def small_disk(killable):
    """A file system of 2 MB that a server may write to."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    directory = Path(tempfile.mkdtemp())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory], check=False)
    if mounted.returncode != 0:
        directory.rmdir()
        pytest.skip("nothing can be mounted here")
    try:
        its = killable.password_file.with_name("postgresql").stat()
        os.chown(directory, its.st_uid, its.st_gid)
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)
        directory.rmdir()


@contextmanager
def as_admin(server):
    connection = psycopg2.connect(server.admin_url())
    connection.autocommit = True
    with connection.cursor() as cursor:
        yield cursor.execute
    connection.close()


@pytest.mark.slow
def test_a_servers_full_disk_is_named_and_waited_for(killable, small_disk):
    engine = open_engine(killable.url())
    with as_admin(killable) as execute:
        execute(f"CREATE TABLESPACE small LOCATION '{small_disk}'")
        execute("GRANT CREATE ON TABLESPACE small TO tuner")
    sessions = Sessions(engine)
    fill = "CREATE TABLE filler TABLESPACE small AS SELECT md5(n::text) FROM generate_series(1, 100000) n"
    try:
        with pytest.raises(UnreachableError, match=r"the server's disk is full at .*; free space there") as caught:
            sessions.statement(lambda conn: conn.execute(text(fill)))
        assert "lost the connection" not in str(caught.value)
        assert is_outage(caught.value)
    finally:
        engine.dispose()
        with as_admin(killable) as execute:
            execute("DROP TABLESPACE small")


@pytest.fixture
def expired(tmp_path):
    """Files of a certificate that has expired, and of its key."""
    certificate, key, request = tmp_path / "certificate.pem", tmp_path / "key.pem", tmp_path / "request.pem"
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key]
    for command in (
        ["req", "-new", *new_key, "-subj", "/CN=localhost", "-out", request],
        ["x509", "-req", "-in", request, "-signkey", key, "-days", "-1", "-out", certificate],
    ):
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    return certificate, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_that_is_refused_by_the_clock_is_told_with_it(expired):
    """So does one that is not valid yet: for either a clock that is wrong is as likely as the certificate."""
    certificate, key = expired
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def offer():
        for _ in range(2):  # to libpq, and to who asks why
            client, _ = listener.accept()
            with client:
                client.recv(8)
                client.sendall(b"S")
                with suppress(OSError):  # the client has refused it
                    context.wrap_socket(client, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=offer)
        server.start()
        port = listener.getsockname()[1]
        url = f"postgresql://ann:s3cret@127.0.0.1:{port}/tuner?sslmode=verify-ca&sslrootcert={certificate}"
        engine = open_engine(url)
        with pytest.raises(AuthenticationError, match=r"expired by this machine's clock, which .* UTC") as caught:
            engine.connect()
        server.join()
    assert "set the clock if it is wrong" in str(caught.value)
    assert not is_outage(caught.value)
