"""Studies of other storages, imported and looked at from the command line."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

if TYPE_CHECKING:
    from pathlib import Path

    from command import Tuner


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal file with a study of one objective, and one of two."""
    path = tmp_path / "journal.log"
    storage = JournalStorage(JournalFileBackend(str(path)))
    one = optuna.create_study(study_name="one", storage=storage, direction="maximize")
    space = {"lr": optuna.distributions.FloatDistribution(0, 1)}
    one.add_trial(create_trial(value=0.25, params={"lr": 0.5}, distributions=space))
    one.add_trial(create_trial(value=0.75, params={"lr": 0.125}, distributions=space, user_attrs={"k\0": 1}))
    one.add_trial(create_trial(state=TrialState.FAIL))
    two = optuna.create_study(study_name="two", storage=storage, directions=["minimize", "maximize"])
    two.add_trial(create_trial(values=[1.0, 2.0]))
    return path


def test_an_imported_study_is_read_by_the_commands_and_run_by_none(tuner: Tuner, journal: Path) -> None:
    first = tuner("import", "journal.log", "--json", "--log-format", "json")
    assert first.code == 0, first.stderr
    assert [(study["study"], study["copied"], study["already_there"]) for study in first.json()] == [
        ("one", 3, 0),
        ("two", 1, 0),
    ]
    assert '"event": "progress"' in first.stderr
    again = tuner("import", TUNER_IMPORT_URL=f"journal:{journal}", TUNER_IMPORT_STUDY="one")
    assert again.stdout.splitlines()[0] == "one: 0 trials copied, 0 updated, 3 there before"

    best = tuner("best", "one", "--json").json()
    assert (best["number"], best["value"], best["metric"], best["params"]) == (1, 0.75, "value", {"lr": 0.125})
    status = tuner("status", "one", "--json").json()
    assert (status["state"], status["objective"], status["budget"], status["best"]) == ("idle", None, None, best)
    assert [row["best"] for row in tuner("studies", "--json").json()] == [0.75, None]
    refused = tuner("worker", "one")
    assert (refused.code, refused.stdout) == (1, "")
    assert "study 'one' has no spec: it was not created by tuner; 'tuner adopt one OBJECTIVE' lets" in refused.error()


def test_a_study_of_two_objectives_is_shown_and_has_no_best_trial(tuner: Tuner, journal: Path) -> None:
    assert tuner("import", journal, "--study", "two").code == 0
    done = tuner("best", "two")
    assert done.code == 1
    assert "has 2 objectives (minimize value 0, maximize value 1), and so no best trial" in done.error()
    assert "no single one" in tuner("status", "two").stdout
    assert [trial["values"] for trial in tuner("trials", "two", "--json").json()] == [[1.0, 2.0]]
    (listed,) = tuner("studies", "--json").json()
    assert (listed["direction"], listed["best"]) == ("minimize, maximize", None)


def test_what_was_left_out_is_printed(tuner: Tuner, journal: Path) -> None:
    done = tuner("import", journal, "--study", "one", "--as", "mine")
    assert done.stdout.splitlines() == [
        "mine: 3 trials copied, 0 updated, 0 there before",
        "  trial 1: left out: an attribute's key cannot hold a NUL character, got 'k\\x00'",
    ]


@pytest.mark.parametrize(
    ("url", "code", "said"),
    [
        ("nope.db", 1, "there is no file 'nope.db' to import from"),
        ("oracle://ann:secret@host/db", 2, "tuner imports from sqlite:///FILE"),
        ("postgresql://ann:secret@127.0.0.1:1/db", 3, "cannot reach PostgreSQL at postgresql://ann:***@127.0.0.1:1/db"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line_without_secrets(tuner: Tuner, url: str, code: int, said: str) -> None:
    done = tuner("import", url)
    assert said in done.error()
    assert (done.code, done.stdout) == (code, "")
    assert "secret" not in done.stderr


def test_the_password_may_come_from_a_private_file(tuner: Tuner, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter2\n")
    file.chmod(0o644)
    url = "postgresql://ann@127.0.0.1:1/db"
    assert f"chmod 600 {file}" in tuner("import", url, "--password-file", file).error()
    file.chmod(0o600)
    done = tuner("import", url, TUNER_IMPORT_PASSWORD_FILE=os.fspath(file))
    assert "postgresql://ann:***@127.0.0.1:1/db" in done.error()
    assert done.code == 3
    assert "has a password already" in tuner("import", url.replace("@", ":x@"), "--password-file", file).error()
