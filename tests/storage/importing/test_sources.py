"""What can be imported from, and what is refused: by its URL, its file or its tables."""

import importlib.util
import sqlite3
from contextlib import closing

import pytest
from optuna.trial import create_trial
from origins import an_rdb, imported, set_up_every_kind
from sqlalchemy import text

from storage import StorageError, StudyNotFoundError, open_engine, parse_url
from storage.importing.sources import open_source
from storage.importing.studies import import_studies


def test_the_database_itself_is_no_source_by_whatever_name(database, target):
    alias = parse_url(database).update_query_dict({"application_name": "other"})
    with (
        open_source(alias.render_as_string(hide_password=False)) as source,
        pytest.raises(StorageError, match="is the database to import into"),
    ):
        import_studies(source, target)


def test_no_password_is_shown_or_kept(another_database, target, tmp_path):
    with an_rdb(another_database) as origin:
        origin.study().add_trial(create_trial(value=1.0))
    url = parse_url(another_database)
    given = url if url.password else url.set(password="hunter2")  # which the server does not ask for
    with open_source(given.render_as_string(hide_password=False)) as source:
        import_studies(source, target)
        assert ":***@" in source.shown
    with target.connect() as conn:
        kept = conn.execute(text("SELECT string_agg(value_json, ' ') FROM study_system_attributes")).scalar_one()
    assert ":***@" in kept
    assert given.password not in kept


def test_a_source_is_only_read(sqlite, target, tmp_path):
    set_up_every_kind(sqlite)
    sqlite.storage.engine.dispose()
    (path,) = tmp_path.iterdir()
    path.chmod(0o400)
    before = path.read_bytes()
    imported(sqlite, target)
    with open_source(str(path)) as source:
        import_studies(source, target)
        with pytest.raises(StorageError, match="readonly"), source.connect() as conn:
            conn.execute(text("DELETE FROM trials"))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


@pytest.mark.parametrize("given", ["sqlite:///{}/no.db", "{}/no.db", "journal:{}/no.log", "{}", "sqlite://"])
def test_a_file_that_is_not_there_is_not_made(tmp_path, given):
    with pytest.raises(StorageError, match=r"no file|is not a file"), open_source(given.format(tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"hello\nworld\n", "is no Optuna journal"),
        (b'{"a": 1}\n', "is no Optuna journal"),
        (b"[1]\n", "is no Optuna journal"),
        (b"\xff\xfe\n\n", "is no Optuna journal"),
        (b"SQLite format 3\0" + b"x" * 100, "cannot read sqlite:///"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, told):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(StorageError, match=told), open_source(str(tmp_path / "file")):
        pass


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("ann:secret@host/db", "there is no file of that name to import from"),
        ("mysql+nope://ann:secret@host/db", r"tuner imports from sqlite:///FILE, .*; got 'mysql\+nope'"),
        ("redis://ann:secret@host/0", r"tuner imports from sqlite:///FILE, .*; got 'redis'"),
        ("postgresql://ann:secret@127.0.0.1:port/db", "this URL is malformed"),
        (
            "postgresql://ann:secret@127.0.0.1:1/db",
            r"cannot reach PostgreSQL at postgresql://ann:\*\*\*@127.0.0.1:1/db",
        ),
        pytest.param(
            "mysql+pymysql://ann:secret@host/db",
            r"mysql\+pymysql://ann:\*\*\*@host/db needs the Python module 'pymysql', .*: pip install pymysql",
            marks=pytest.mark.skipif(importlib.util.find_spec("pymysql") is not None, reason="pymysql is installed"),
        ),
    ],
)
def test_a_url_that_leads_nowhere_is_told_without_its_password(given, told):
    with pytest.raises(StorageError, match=told) as caught, open_source(given):
        pass
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "given", ["sqlite:///{}", "mysql+pymysql://ann:other@host/db", "postgresql://ann:other@host/db"]
)
def test_a_password_where_none_is_wanted_is_refused(tmp_path, given):
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match="password file") as caught,
        open_source(given.format(tmp_path / "file"), "secret"),
    ):
        pass
    assert "other" not in str(caught.value)


def test_an_empty_file_holds_no_studies(tmp_path, target):
    (tmp_path / "file").touch()
    with (
        open_source(str(tmp_path / "file")) as source,
        pytest.raises(StudyNotFoundError, match=r"journal:.*file holds no studies"),
    ):
        import_studies(source, target)


def test_a_database_without_optunas_tables_is_refused_and_gets_none(empty_database):
    with pytest.raises(StorageError, match="holds no Optuna studies"), open_source(empty_database):
        pass
    engine = open_engine(empty_database)
    with engine.connect() as conn:
        assert conn.execute(text("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")).scalar_one() == 0
    engine.dispose()


def test_tables_of_each_other_optuna_are_refused_with_advice(sqlite):
    sqlite.study()
    versions = sqlite.storage.get_all_versions()
    head = sqlite.storage.get_head_version()
    for revision in [*versions, "v99.0.0.a"]:
        with closing(sqlite3.connect(sqlite.storage.engine.url.database)) as conn, conn:
            conn.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        if revision == head:
            with open_source(sqlite.url) as source:
                assert [study.study_name for study in source.studies()] == ["s"]
            continue
        advice = "'optuna storage upgrade" if revision in versions else "upgrade tuner"
        with pytest.raises(StorageError, match=advice), open_source(sqlite.url):
            pass


def test_an_unknown_study_is_told_with_those_there_are(journal, target):
    journal.study("a")
    journal.study("b")
    with pytest.raises(StudyNotFoundError, match=r"no study named 'c' in journal:.*; there are: 'a', 'b'"):
        imported(journal, target, "c")
    with pytest.raises(StorageError, match="2 studies cannot all be called 'x'"):
        imported(journal, target, new_name="x")
    assert [result.study for result in imported(journal, target, "b")] == ["b"]
