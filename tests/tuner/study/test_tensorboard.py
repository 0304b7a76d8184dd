"""What a worker writes for TensorBoard while its trials run."""

from __future__ import annotations

import optuna
import pytest
from command import wait_for
from sqlalchemy import text
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from tuner.errors import TunerError
from tuner.study.joining import find_study
from tuner.study.tensorboard import check_tensorboard, follow

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning")


@pytest.fixture
def study(storage):
    return optuna.create_study(study_name="s", storage=storage)


def written(directory, number):
    """The step and the value of each point of the trial's curve, and the tags of what is no point of it."""
    files = sorted(directory.glob(f"trial-{number:05}/events.out.tfevents.*"))
    events = [event for file in files for event in EventFileLoader(str(file)).Load()]
    values = [(event.step, value) for event in events for value in event.summary.value]
    points = [(step, round(value.tensor.float_val[0], 6)) for step, value in values if value.tag == "value"]
    return points, [value.tag for _, value in values if value.tag != "value"]


START, END = "_hparams_/session_start_info", "_hparams_/session_end_info"


@pytest.mark.slow
def test_each_epoch_is_written_as_it_ends_and_a_trial_that_was_killed_at_the_end(storage, study, tmp_path):
    said = []
    one, other, untold = (study.ask() for _ in range(3))
    with follow(storage.engine, find_study(storage.engine, "s"), tmp_path, said.append) as tell:
        for trial in (one, other):
            trial.suggest_float("lr", 0, 1)
        for step in (1, 2):
            one.report(1 / step, step)
            tell(one.number)
            wait_for(lambda step=step: len(written(tmp_path, 0)[0]) == step, "the epoch is written")
        other.report(0.5, 1)
        tell(other.number)
        wait_for(lambda: written(tmp_path, 1)[0], "the other's epoch is written")
        tell(untold.number)  # of which there is nothing to tell yet
        study.tell(one, 0.5)
        tell(one.number)
        wait_for(lambda: END in written(tmp_path, 0)[1], "its end is written")
        [file] = (tmp_path / "trial-00000").iterdir()
        tell(one.number)  # again, as after an end that was read before it was told of
        study.tell(other, state=optuna.trial.TrialState.FAIL)
    assert written(tmp_path, 0) == ([(1, 1.0), (2, 0.5)], [START, "trial/value", END])
    assert file.exists()  # and was not written anew
    assert written(tmp_path, 1) == ([(1, 0.5)], [START, END])
    assert written(tmp_path, 2) == ([], [])
    assert said == []


def test_what_cannot_be_written_or_read_is_told_once_and_ends_nothing(storage, study, tmp_path):
    said = []
    trials = [study.ask() for _ in range(2)]
    for trial in trials:
        trial.report(0.5, 1)
    (tmp_path / "trial-00001").write_text("in the way")
    with follow(storage.engine, find_study(storage.engine, "s"), tmp_path, said.append) as tell:
        for _ in range(2):
            tell(1)
            wait_for(lambda: said, "it is told")
    assert len(said) == 1
    assert said[0].startswith(f"nothing more is written for TensorBoard: {tmp_path}: ")
    with follow(storage.engine, find_study(storage.engine, "s"), tmp_path, said.append) as tell:
        with storage.engine.begin() as conn:
            conn.execute(text("ALTER TABLE trial_intermediate_values RENAME TO away"))
        tell(0)
        with storage.engine.begin() as conn:
            conn.execute(text("ALTER TABLE away RENAME TO trial_intermediate_values"))
        tell(0)
        wait_for(lambda: written(tmp_path, 0)[0] == [(1, 0.5)], "it is read later")
    assert len(said) == 1


def test_a_directory_that_cannot_be_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TunerError, match=r"cannot write to .*file/here: Not a directory"):
        check_tensorboard(tmp_path / "file" / "here")
