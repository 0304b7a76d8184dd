"""Where checkpoints are shared: which places there are, and that nothing is left there."""

from __future__ import annotations

import threading

import pytest
from optuna.trial import TrialState

from storage import PostgresStorage, UnreachableError
from storage.coordination import claims, control
from storage.database.sessions import Backoff, Sessions
from tuner.errors import SharedPlaceError, TunerError, UsageError
from tuner.slot.shared_checkpoints import (
    InDatabase,
    InFolder,
    checked_place,
    delete_checkpoints,
    shared_checkpoint,
    sweep,
)
from tuner.spec import Spec, parse_spec
from tuner.study.joining import checkpoint_directory, create_study

BY_HAND = claims.GivenBack(outcome="released", reason="by hand", counts=False)


@pytest.fixture
def storage(database):
    storage = PostgresStorage(database)
    yield storage
    storage.engine.dispose()


def a_spec(**changes):
    given = {
        "objective": {"name": "digits", "code_hash": "0"},
        "metric": "accuracy",
        "direction": "maximize",
        "budget": {"trials": 30},
        "epochs": 20,
    }
    return Spec.model_validate({**given, **changes})


def claim(storage, study):
    return claims.claim(storage.sessions, study.study_id, study.budget, claims.Holder(worker="test"))


def write(shared, data=b"a checkpoint"):
    shared.write(memoryview(data), threading.Event())


def names(directory):
    return sorted(path.name for path in directory.glob("*"))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("database", "database"),
        ("local", "local"),
        ("/mnt/a share/", "file:///mnt/a share"),
        ("file:///mnt/share", "file:///mnt/share"),
        ("file:///", "file:///"),
    ],
)
def test_a_place_is_kept_as_it_was_given_a_path_as_a_url(given, kept):
    assert checked_place(given) == kept
    assert checked_place(kept) == kept


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("", "needs database, local, an absolute path or a URL such as s3://bucket/folder, got ''"),
        ("Database", "needs database, local, an absolute path or a URL"),
        ("checkpoints/here", "got 'checkpoints/here'"),
        ("s3://", "needs database, local, an absolute path or a URL"),
        ("simplecache::s3://bucket", "needs database, local, an absolute path or a URL"),
        ("file://share", "needs an absolute path, as in file:///mnt/share, got 'file://share'"),
        ("memory://here", "cannot be at memory://: a process has it to itself"),
        ("https://host/folder", "cannot be at https://: it cannot be written to"),
        ("nfs4://host/folder", "knows no protocol 'nfs4'"),
        ("wandb://entity/project", "needs a package that is not installed here: Install wandbfs"),
        ("sftp://me:correct-horse@host/folder", "must hold no password, got one in sftp://***@host/folder"),
    ],
)
def test_what_is_no_place_is_refused_in_one_line(given, told):
    with pytest.raises(UsageError) as caught:
        checked_place(given)
    assert str(caught.value).startswith("--checkpoints")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "correct-horse" not in str(caught.value)


def test_a_spec_that_was_stored_before_it_had_a_place_keeps_checkpoints_in_the_database():
    stored = a_spec().model_dump(mode="json")
    del stored["checkpoints"], stored["checkpoint_every_s"]
    spec = parse_spec(stored, "digits")
    assert (spec.checkpoints, spec.checkpoint_every_s) == ("database", 30.0)


def test_the_spec_says_where(storage, tmp_path):
    kinds = {}
    for place in ("database", "local", f"file://{tmp_path}"):
        study = create_study(storage.engine, place, a_spec(checkpoints=place))
        kinds[place] = type(shared_checkpoint(study, storage, claim(storage, study)))
    assert list(kinds.values()) == [InDatabase, type(None), InFolder]


def test_studies_of_two_databases_that_share_a_folder_do_not_meet(storage, another_database, tmp_path):
    other = PostgresStorage(another_database)
    ours, theirs = (create_study(each.engine, "s", a_spec()) for each in (storage, other))
    other.engine.dispose()
    assert ours.study_id == theirs.study_id
    assert checkpoint_directory(tmp_path, ours) != checkpoint_directory(tmp_path, theirs)
    assert checkpoint_directory(tmp_path, ours).parent == tmp_path / "checkpoints"


def test_files_of_trials_that_have_ended_are_swept(storage, tmp_path):
    study = create_study(storage.engine, "s", a_spec(checkpoints=f"file://{tmp_path}/share"))
    held = [claim(storage, study) for _ in range(4)]
    here = checkpoint_directory(tmp_path / "data", study)
    here.mkdir(parents=True)
    for trial in held:
        write(shared_checkpoint(study, storage, trial))
        (here / f"trial-{trial.number}.pt").write_bytes(b"a checkpoint")
        (here / f"trial-{trial.number}.pt.host-77").write_bytes(b"of a writer that was killed")
    (here / "notes.txt").write_text("not ours")
    claims.release(storage.sessions, held[1], BY_HAND, 3)
    for trial, state in ((held[2], TrialState.COMPLETE), (held[3], TrialState.FAIL)):
        storage.hold(trial)
        storage.set_trial_state_values(trial.trial_id, state, [1.0] if state == TrialState.COMPLETE else None)
    lines = []
    for _ in range(2):
        sweep(study, tmp_path / "data", storage.sessions, lines.append)
        assert names(tmp_path / "share" / study.directory) == ["trial-0.pt", "trial-1.pt"]
        kept = [f"trial-{number}.pt{end}" for number in (0, 1) for end in ("", ".host-77")]
        assert names(here) == ["notes.txt", *kept]
    assert lines == []


def test_with_nothing_kept_there_is_nothing_to_sweep_and_no_empty_folder_stays(storage, tmp_path):
    study = create_study(storage.engine, "s", a_spec(checkpoints=f"file://{tmp_path}/share"))
    lines = []
    sweep(study, tmp_path / "data", storage.sessions, lines.append)
    trial = claim(storage, study)
    write(shared_checkpoint(study, storage, trial))
    storage.set_trial_state_values(trial.trial_id, TrialState.PRUNED, None)
    sweep(study, tmp_path / "data", storage.sessions, lines.append)
    assert names(tmp_path / "share") == []
    assert lines == []


def test_a_folder_that_cannot_be_looked_at_is_told(storage, tmp_path):
    (tmp_path / "file").write_text("in the way")
    study = create_study(storage.engine, "s", a_spec(checkpoints=f"file://{tmp_path}/file"))
    lines = []
    sweep(study, tmp_path / "data", storage.sessions, lines.append)
    assert lines == [f"cannot look for old checkpoints in file://{tmp_path}/file/{study.directory}: Not a directory"]


def test_a_worker_without_the_package_for_the_studys_bucket_is_told_which(storage, tmp_path):
    study = create_study(storage.engine, "s", a_spec(checkpoints="wandb://entity/project"))
    with pytest.raises(TunerError, match="wandb://entity/project needs a package that is not installed here: Install"):
        sweep(study, tmp_path, storage.sessions, print)
    (line,) = delete_checkpoints(study, tmp_path)
    assert line.startswith(f"the checkpoints in wandb://entity/project/{study.directory} are left, delete them by hand")


def test_a_deleted_study_leaves_no_files(storage, tmp_path):
    study = create_study(storage.engine, "s", a_spec(checkpoints=f"file://{tmp_path}/share"))
    write(shared_checkpoint(study, storage, claim(storage, study)))
    (checkpoint_directory(tmp_path / "data", study)).mkdir(parents=True)
    (checkpoint_directory(tmp_path / "data", study) / "trial-0.pt").write_bytes(b"here")
    for _ in range(2):
        assert delete_checkpoints(study, tmp_path / "data") == []
        assert names(tmp_path / "share") == names(tmp_path / "data" / "checkpoints") == []


def test_a_holder_that_lost_its_trial_does_not_copy_over_the_next_ones(storage):
    study = create_study(storage.engine, "s", a_spec())
    lost = claim(storage, study)
    claims.release(storage.sessions, lost, BY_HAND, 3)
    held = claim(storage, study)
    write(shared_checkpoint(study, storage, held), b"of the next")
    write(shared_checkpoint(study, storage, lost), b"of the one before")
    assert shared_checkpoint(study, storage, held).read() == b"of the next"


@pytest.mark.slow
def test_reading_waits_for_a_database_that_is_away_and_writing_does_not(storage):
    study = create_study(storage.engine, "s", a_spec())
    held = claim(storage, study)
    nowhere = PostgresStorage("postgresql://nobody@127.0.0.1:1/none", retry=Backoff(limit_s=1.0))
    shared = InDatabase(nowhere.sessions, Sessions(nowhere.engine), held)
    with pytest.raises(SharedPlaceError, match="cannot reach PostgreSQL"):
        write(shared)
    with pytest.raises(UnreachableError):
        shared.read()
    assert nowhere.engine.pool.checkedout() == 0
    nowhere.engine.dispose()
    control.delete_study(storage.sessions, study.study_id, force=True)
    assert shared_checkpoint(study, storage, held).read() is None
