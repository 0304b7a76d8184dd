"""Checkpoints on a machine whose study was deleted from another one: which are dropped, and which never."""

from __future__ import annotations

import pytest

from storage import PostgresStorage
from storage.coordination import control
from storage.database.identity import identity
from tuner.slot import left_checkpoints
from tuner.slot.shared_checkpoints import delete_checkpoints
from tuner.spec import Spec
from tuner.study.joining import checkpoint_directory, create_study


@pytest.fixture
def engine(database):
    storage = PostgresStorage(database)
    yield storage.engine
    storage.engine.dispose()


@pytest.fixture
def another_engine(another_database):
    storage = PostgresStorage(another_database)
    yield storage.engine
    storage.engine.dispose()


def a_study(engine, name):
    given = {
        "objective": {"name": "digits", "code_hash": "0"},
        "metric": "accuracy",
        "direction": "maximize",
        "budget": {"trials": 30},
        "epochs": 20,
    }
    return create_study(engine, name, Spec.model_validate(given))


def with_checkpoint(study, data_dir):
    here = checkpoint_directory(data_dir, study)
    here.mkdir(parents=True)
    (here / "trial-0.pt").write_bytes(b"a checkpoint")
    return here


def delete(engine, study):
    control.delete_study(PostgresStorage(engine.url).sessions, study.study_id, force=True)


def whose(engine, data_dir):
    return {kept.path.name: kept.whose for kept in left_checkpoints.look(engine, data_dir)}


def test_a_database_is_known_by_what_no_other_one_has(engine, another_engine):
    assert identity(engine) == identity(engine) != identity(another_engine)
    assert identity(engine).rpartition("-")[0] == identity(another_engine).rpartition("-")[0]  # one server


def test_checkpoints_of_a_study_that_was_deleted_elsewhere_are_dropped_when_another_one_is_joined(engine, tmp_path):
    gone, stays = a_study(engine, "gone"), a_study(engine, "stays")
    for study in (gone, stays):
        left_checkpoints.note(engine, study, tmp_path)
        with_checkpoint(study, tmp_path)
    assert left_checkpoints.drop(engine, tmp_path) == []
    assert not [path for path in (tmp_path / "databases").rglob("*") if path.is_file()]  # a note takes no file
    delete(engine, gone)
    assert left_checkpoints.drop(engine, tmp_path) == [checkpoint_directory(tmp_path, gone)]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [stays.directory]
    assert [path.name for path in (tmp_path / "databases").glob("*/*")] == [stays.directory]
    assert left_checkpoints.drop(engine, tmp_path) == []


def test_a_machine_that_works_for_two_databases_drops_nothing_of_the_other_s(engine, another_engine, tmp_path):
    ours, theirs = a_study(engine, "s"), a_study(another_engine, "s")
    for each, study in ((engine, ours), (another_engine, theirs)):
        left_checkpoints.note(each, study, tmp_path)
        with_checkpoint(study, tmp_path)
    assert left_checkpoints.drop(engine, tmp_path) == left_checkpoints.drop(another_engine, tmp_path) == []
    assert whose(engine, tmp_path) == {ours.directory: "needed", theirs.directory: "another's"}
    delete(another_engine, theirs)
    assert left_checkpoints.drop(engine, tmp_path) == []
    assert left_checkpoints.drop(another_engine, tmp_path) == [checkpoint_directory(tmp_path, theirs)]


def test_what_two_databases_may_have_is_dropped_for_neither(engine, another_engine, tmp_path):
    """As one that was restored from the other's dump knows the same studies."""
    study = a_study(engine, "s")
    for each in (engine, another_engine):
        left_checkpoints.note(each, study, tmp_path)
    with_checkpoint(study, tmp_path)
    delete(engine, study)
    assert left_checkpoints.drop(engine, tmp_path) == []
    assert whose(engine, tmp_path) == {study.directory: "another's"}


def test_what_an_earlier_version_left_is_dropped_only_if_the_database_had_it_since(engine, another_engine, tmp_path):
    ours, theirs = a_study(engine, "s"), a_study(another_engine, "s")
    for study in (ours, theirs):
        with_checkpoint(study, tmp_path)
    assert whose(engine, tmp_path) == {ours.directory: "needed", theirs.directory: "unknown"}
    delete(engine, ours)
    assert left_checkpoints.drop(engine, tmp_path) == [checkpoint_directory(tmp_path, ours)]
    assert whose(None, tmp_path) == {theirs.directory: "unknown"}


def test_a_study_without_checkpoints_that_was_deleted_elsewhere_leaves_no_note(engine, another_engine, tmp_path):
    studies = {each: a_study(each, "s") for each in (engine, another_engine)}
    for each, study in studies.items():
        left_checkpoints.note(each, study, tmp_path)
        delete(each, study)
    assert left_checkpoints.drop(engine, tmp_path) == []
    assert [path.name for path in (tmp_path / "databases").glob("*/*")] == [studies[another_engine].directory]


def test_a_study_that_is_deleted_here_leaves_no_note(engine, tmp_path):
    study = a_study(engine, "s")
    left_checkpoints.note(engine, study, tmp_path)
    with_checkpoint(study, tmp_path)
    assert delete_checkpoints(study, tmp_path) == []
    assert list((tmp_path / "databases").iterdir()) == list((tmp_path / "checkpoints").iterdir()) == []


def test_a_directory_that_can_hold_no_notes_is_no_harm(engine, tmp_path):
    (tmp_path / "databases").write_text("in the way")
    study = a_study(engine, "s")
    with_checkpoint(study, tmp_path)
    left_checkpoints.note(engine, study, tmp_path)
    assert left_checkpoints.drop(engine, tmp_path) == []
    delete(engine, study)
    assert left_checkpoints.drop(engine, tmp_path) == []


def test_a_link_among_the_checkpoints_is_left_alone(engine, tmp_path):
    study = a_study(engine, "s")
    left_checkpoints.note(engine, study, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").mkdir()
    checkpoint_directory(tmp_path, study).symlink_to(tmp_path / "elsewhere")
    delete(engine, study)
    assert left_checkpoints.drop(engine, tmp_path) == []
    assert (tmp_path / "elsewhere").is_dir()
