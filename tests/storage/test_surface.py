import pytest

import storage


def test_the_public_surface_is_what_all_says():
    assert storage.__all__ == [
        "AuthenticationError",
        "BusyError",
        "EmbeddedServer",
        "EmbeddedServerError",
        "InvalidURLError",
        "InvalidWriteError",
        "LeaseLostError",
        "LiveTrialsError",
        "NoDatabaseError",
        "NotReadyError",
        "PostgresStorage",
        "SchemaVersionError",
        "StorageError",
        "StudyExistsError",
        "StudyHaltedError",
        "StudyNotFoundError",
        "TrialNotRunningError",
        "TrialNotWaitingError",
        "UnreachableError",
        "ensure_schema",
        "mask_url",
        "open_engine",
        "open_storage",
        "parse_url",
    ]
    assert [getattr(storage, name).__name__ for name in storage.__all__] == storage.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"open_stroage"):
        storage.open_stroage  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import storage", ("optuna", "torch", "sqlalchemy", "psycopg2")),
        ("from storage import EmbeddedServer", ("optuna", "torch", "sqlalchemy", "psycopg2")),
        ("from storage import ensure_schema, open_engine", ("optuna", "torch", "alembic")),
        ("from storage import open_storage", ("torch", "alembic")),
        ("import storage.importing.studies", ("torch", "alembic")),
    ],
)
def test_importing_pulls_in_no_more_than_needed(start_python, statement, absent):
    process = start_python(f"{statement}\nimport sys\nprint(*set({absent!r}) & sys.modules.keys())")
    out, err = process.communicate(timeout=60)
    assert (out.strip(), err) == ("", "")
