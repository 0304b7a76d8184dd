"""A study's learning curves and params as TensorBoard reads them: its Scalars page and its HParams page."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from storage import StorageError
from storage.coordination import records
from storage.trials.curves import CurvePoint, curves
from tuner.errors import TunerError
from tuner.study.curves import as_rows

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from storage.coordination.records import TrialRecord
    from tuner.study.joining import AnyStudy

_ENDED = ("COMPLETE", "PRUNED", "FAIL")
AT_MOST_EVERY_S = 1.0
"""How long what trials have told of is gathered before it is looked up and written."""
CLOSE_S = 10.0


def write_tensorboard(engine: Engine, study: AnyStudy, directory: Path) -> int:
    """Write the trials that have ended, each into a directory of its own; how many there were.

    What an earlier call wrote of a trial is replaced, so that a study may be written again as it goes on. Raises
    TunerError if TensorBoard is not installed, or nothing can be written there.
    """
    check_tensorboard(directory)
    found = [trial for trial in records.list_trials(engine, study.study_id) if trial.state in _ENDED]
    with engine.connect() as conn:
        points = curves(conn, study.study_id)
    for trial in found:
        try:
            _Run(directory, trial.number).write(study, trial, points.get(trial.number, []))
        except OSError as error:
            raise TunerError(f"cannot write to {directory}: {error.strerror or error}") from error
    return len(found)


def check_tensorboard(directory: Path) -> None:
    """Raise TunerError if TensorBoard is not installed, or the directory can be made by nobody."""
    try:
        import tensorboard.summary.writer.event_file_writer  # noqa: F401 - whether it is there
    except ImportError as error:
        raise TunerError(
            f"--tensorboard needs the package tensorboard: pip install 'tuner[tensorboard]' ({error})"
        ) from error
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TunerError(f"cannot write to {directory}: {error.strerror or error}") from error


@contextmanager
def follow(
    engine: Engine, study: AnyStudy, directory: Path | None, say: Callable[[str], None]
) -> Iterator[Callable[[int], None]]:
    """Give the block what tells of a trial by its number, that there is something new; it is written by a thread.

    What the thread cannot read it reads later; what it cannot write ends it, which is told once. Without a directory
    nothing is written.
    """
    if directory is None:
        yield lambda _: None
        return
    following = _Following(engine, study, directory, say)
    wait_s = 1.0  # for who is to end at once
    try:
        yield following.told.put
        wait_s = CLOSE_S
    finally:
        following.close(wait_s)


class _Following:
    def __init__(self, engine: Engine, study: AnyStudy, directory: Path, say: Callable[[str], None]) -> None:
        self.told: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._engine = engine
        self._study = study
        self._directory = directory
        self._say = say
        self._runs: dict[int, _Run] = {}
        self._ended: set[int] = set()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tensorboard", daemon=True)
        self._thread.start()

    def close(self, wait_s: float) -> None:
        """Write what is left, as far as that takes no longer than `wait_s`."""
        self._is_closing.set()
        self.told.put(None)
        self._thread.join(wait_s)

    def _follow(self) -> None:
        due: set[int] = set()
        is_last = False
        try:
            while not is_last:
                due |= self._gathered() - self._ended  # an end may be read before it is told of
                is_last = self._is_closing.is_set() and self.told.empty()
                if is_last:
                    due |= self._runs.keys()  # those that were killed have told of no end
                try:
                    while due:
                        self._write(min(due))
                        due.remove(min(due))
                except (StorageError, SQLAlchemyError):  # at the next word of any trial
                    pass
                self._is_closing.wait(AT_MOST_EVERY_S)
            for run in self._runs.values():
                run.close()
        except OSError as error:
            self._say(f"nothing more is written for TensorBoard: {self._directory}: {error.strerror or error}")

    def _gathered(self) -> set[int]:
        numbers = [self.told.get()]
        while not self.told.empty():
            numbers.append(self.told.get())
        return {number for number in numbers if number is not None}

    def _write(self, number: int) -> None:
        trial = records.find_trial(self._engine, self._study.study_id, number)
        if trial is None:  # deleted with its study
            return
        with self._engine.connect() as conn:
            points = curves(conn, self._study.study_id, [number]).get(number, [])
        if trial.state not in _ENDED and not points:  # its params are not all suggested
            return
        if number not in self._runs:
            self._runs[number] = _Run(self._directory, number)
        self._runs[number].write(self._study, trial, points)
        if trial.state in _ENDED:
            del self._runs[number]
            self._ended.add(number)


class _Run:
    """What TensorBoard is told of one trial, in a directory of its own, which is emptied first."""

    def __init__(self, directory: Path, number: int) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        path = directory / f"trial-{number:05}"
        for old in path.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = EventFileWriter(str(path))
        self._n_written = 0

    def write(self, study: AnyStudy, trial: TrialRecord, points: Sequence[CurvePoint]) -> None:
        """Write what is new of the trial; with its end, once it has ended, this is closed."""
        events = list(_events(study, trial, points))
        for event in events[self._n_written :]:
            self._writer.add_event(event)
        self._n_written = max(self._n_written, len(events))
        if trial.state in _ENDED:
            for event in _last_events(study, trial, points):
                self._writer.add_event(event)
            self.close()
        else:
            self._writer.flush()

    def close(self) -> None:
        """Write to the end."""
        self._writer.close()


def _times(trial: TrialRecord) -> tuple[float, float]:
    started = trial.started_at or trial.ended_at
    start_s = 0.0 if started is None else started.timestamp()
    return start_s, start_s if trial.ended_at is None else trial.ended_at.timestamp()


def _events(study: AnyStudy, trial: TrialRecord, points: Sequence[CurvePoint]) -> Iterator[Any]:
    """Yield what TensorBoard is told of a trial while it runs: its params and its curve."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import summary_v2

    start_s, _ = _times(trial)
    params = {
        name: value if isinstance(value, int | float | str) else json.dumps(value)
        for name, value in trial.params.items()
    }
    named = f"trial {trial.number}"
    yield Event(wall_time=start_s, summary=summary_v2.hparams_pb(params, trial_id=named, start_time_secs=start_s))
    at_s = start_s
    for point, row in zip(points, as_rows(points, study.metrics[0]), strict=True):
        at_s, step = at_s + (point.seconds or 0.0), row.pop("step")
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if value is not None]
        yield Event(wall_time=at_s, step=step, summary=Summary(value=values))


def _last_events(study: AnyStudy, trial: TrialRecord, points: Sequence[CurvePoint]) -> Iterator[Any]:
    """Yield what TensorBoard is told of a trial in the end: its value, and how it ended."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    _, end_s = _times(trial)
    step = points[-1].step if points else 0
    if trial.value is not None:
        value = Summary.Value(tag=f"trial/{study.metrics[0]}", simple_value=trial.value)
        yield Event(wall_time=end_s, step=step, summary=Summary(value=[value]))
    status = api_pb2.STATUS_FAILURE if trial.state == "FAIL" else api_pb2.STATUS_SUCCESS
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=end_s)
    data = plugin_data_pb2.HParamsPluginData(session_end_info=end)
    ended = Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(data),
        tensor=metadata.NULL_TENSOR,
    )
    yield Event(wall_time=end_s, summary=Summary(value=[ended]))
