import os
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import InvalidURLError, StorageError, mask_url, parse_url
from storage.database.url import read_password, with_password_file

SECRET = "s3cr3tWord"


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg2"])
def test_every_spelling_of_postgresql_becomes_one(scheme):
    url = parse_url(f"{scheme}://ann:{SECRET}@db:5433/tuner?sslmode=require")
    assert url.drivername == "postgresql+psycopg2"
    assert (url.username, url.password, url.host, url.port, url.database) == ("ann", SECRET, "db", 5433, "tuner")
    assert url.query == {"sslmode": "require"}
    assert parse_url(url) == url


def test_a_password_may_hold_anything_when_percent_encoded():
    assert parse_url("postgresql://ann:p%40s%2Fs%3A%20%25@db/tuner").password == "p@s/s: %"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann@%2Frun%2Fpg/tuner",
        "postgresql://ann@/tuner?host=/run/pg",
        "postgresql://ann@/tuner?host=%2Frun%2Fpg",
    ],
)
def test_a_socket_directory_may_be_the_host(url):
    parsed = parse_url(url)
    assert (parsed.host, parsed.query["host"]) in [(None, "/run/pg"), ("", "/run/pg")]
    assert mask_url(url) == "postgresql://ann@/tuner?host=/run/pg"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (
            "sqlite:///study.db",
            "tuner stores studies in PostgreSQL only: postgresql://user@host/database; got 'sqlite'",
        ),
        (f"mysql+pymysql://ann:{SECRET}@db/tuner", "got 'mysql+pymysql'"),
        ("postgresql+asyncpg://db/tuner", r"got 'postgresql+asyncpg'"),
        (f"ann:{SECRET}@db/tuner", "without '://'"),
        ("./journal.log", "without '://'"),
        ("", "without '://'"),
        (f"postgresql://ann:{SECRET}@db", "names no database"),
        ("postgresql://db/", "names no database"),
        ("postgresql://db:port/tuner", "port of this one is not a number"),
        (f"postgresql://ann:{SECRET}/tuner", "port of this one is not a number"),
        ("postgresql://db:70000/tuner", "between 1 and 65535, got 70000"),
        ("postgresql://db:0/tuner", "between 1 and 65535, got 0"),
        (f"postgresql://ann:x@{SECRET}@db/tuner", "write '@' as %40"),
        ("postgresql://db/tuner%00", "NUL"),
        ("postgresql://db/tuner\udcff", "not UTF-8"),
    ],
)
def test_a_url_that_cannot_work_is_refused_with_advice(url, told):
    with pytest.raises(InvalidURLError) as caught:
        parse_url(url)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in mask_url(url)


@given(
    st.text()
    | st.text().map("postgresql://".__add__)
    | st.from_regex(r"postgresql://[a-z:@/\[\]%?&=]*", fullmatch=True)
)
def test_any_text_is_parsed_or_refused(text):
    mask_url(text)
    try:
        url = parse_url(text)
    except InvalidURLError:
        return
    assert parse_url(url.render_as_string(hide_password=False)) == url


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=4).filter(
        lambda s: "*" not in s
    )
)
def test_a_masked_url_never_shows_its_password(password):
    secret = f"<{password}>"
    url = parse_url("postgresql://ann@db/tuner").set(password=secret)
    raw = url.render_as_string(hide_password=False)
    assert mask_url(url) == mask_url(raw) == "postgresql://ann:***@db/tuner"
    assert parse_url(raw).password == secret


@pytest.mark.parametrize("parameter", ["password", "sslpassword", "oauth_client_secret", "Password", "passwd", "token"])
def test_secrets_among_the_parameters_are_masked_too(parameter):
    assert mask_url(f"postgresql:///tuner?{parameter}={SECRET}") == f"postgresql:///tuner?{parameter}=***"


@pytest.fixture
def password_file(tmp_path):
    path = tmp_path / "password"
    path.write_text(f"{SECRET}\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_a_password_comes_from_a_private_file(password_file, mode):
    password_file.chmod(mode)
    assert read_password(password_file) == SECRET
    url = with_password_file("postgresql://ann@db/tuner?sslmode=require", password_file)
    assert SECRET not in url.render_as_string(hide_password=False)
    assert mask_url(url) == "postgresql://ann@db/tuner?sslmode=require"


@pytest.mark.parametrize("mode", [0o604, 0o660, 0o644, 0o650, 0o620])
def test_a_password_file_that_others_may_read_is_refused(password_file, mode):
    password_file.chmod(mode)
    with pytest.raises(StorageError, match=rf"has mode {mode:04o}; run: chmod 600"):
        with_password_file("postgresql://ann@db/tuner", password_file)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another group, and joins it")
def test_a_group_may_read_a_password_file_if_it_is_one_of_ours(password_file):
    """As Kubernetes has it with an fsGroup: root's file, readable by a group that the container's user is in."""
    os.chown(password_file, -1, 65533)
    password_file.chmod(0o440)
    with pytest.raises(StorageError, match=r"has mode 0440 and is its group's too, gid 65533, .*chmod 600"):
        read_password(password_file)
    groups = os.getgroups()
    os.setgroups([*groups, 65533])
    try:
        assert read_password(password_file) == SECRET
    finally:
        os.setgroups(groups)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_a_password_file_of_someone_else_is_refused(password_file):
    os.chown(password_file, 65534, 65534)
    with pytest.raises(StorageError, match=r"must belong to you or root, not to uid 65534"):
        with_password_file("postgresql://ann@db/tuner", password_file)


@pytest.mark.parametrize("content", ["", "\n", f"{SECRET}\n{SECRET}\n", "\udcff" + SECRET, SECRET * 500])
def test_a_file_that_holds_no_password_is_refused_unshown(password_file, content):
    password_file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(StorageError, match=r"must (hold|be UTF-8)") as caught:
        with_password_file("postgresql://ann@db/tuner", password_file)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_password_file_must_exist(tmp_path):
    with pytest.raises(StorageError, match=r"No such file"):
        with_password_file("postgresql://ann@db/tuner", tmp_path / "absent")


def test_a_fifo_is_refused_without_waiting_for_its_writer(tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(StorageError, match=r"must be a regular file"):
        with_password_file("postgresql://ann@db/tuner", tmp_path / "fifo")


def test_two_passwords_are_refused(password_file):
    with pytest.raises(InvalidURLError, match=r"ann:\*\*\*@db/tuner has a password already"):
        with_password_file("postgresql://ann:other@db/tuner", password_file)
