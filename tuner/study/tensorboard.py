"""A study's learning curves and params as TensorBoard reads them: its Scalars page and its HParams page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.coordination import records
from storage.trials.curves import CurvePoint, curves
from tuner.errors import TunerError
from tuner.study.curves import as_rows

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from storage.coordination.records import TrialRecord
    from tuner.study.joining import AnyStudy

_ENDED = ("COMPLETE", "PRUNED", "FAIL")


def write_tensorboard(engine: Engine, study: AnyStudy, directory: Path) -> int:
    """Write the trials that have ended, each into a directory of its own; how many there were.

    What an earlier call wrote of a trial is replaced, so that a study may be written again as it goes on. Raises
    TunerError if TensorBoard is not installed, or nothing can be written there.
    """
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise TunerError(
            f"--tensorboard needs the package tensorboard: pip install 'tuner[tensorboard]' ({error})"
        ) from error
    found = [trial for trial in records.list_trials(engine, study.study_id) if trial.state in _ENDED]
    with engine.connect() as conn:
        points = curves(conn, study.study_id)
    for trial in found:
        run = directory / f"trial-{trial.number:05}"
        try:
            for old in run.glob("events.out.tfevents.*"):
                old.unlink()
            writer = EventFileWriter(str(run))
            for event in _events(study, trial, points.get(trial.number, [])):
                writer.add_event(event)
            writer.close()
        except OSError as error:
            raise TunerError(f"cannot write to {run}: {error.strerror or error}") from error
    return len(found)


def _events(study: AnyStudy, trial: TrialRecord, points: Sequence[CurvePoint]) -> Iterator[Any]:
    """Yield what TensorBoard is told of a trial: its params, its curve, its value, and how it ended."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2

    started = trial.started_at or trial.ended_at
    start_s = 0.0 if started is None else started.timestamp()
    end_s = start_s if trial.ended_at is None else trial.ended_at.timestamp()
    params = {
        name: value if isinstance(value, int | float | str) else json.dumps(value)
        for name, value in trial.params.items()
    }
    named = f"trial {trial.number}"
    yield Event(wall_time=start_s, summary=summary_v2.hparams_pb(params, trial_id=named, start_time_secs=start_s))
    at_s, step = start_s, 0
    for point, row in zip(points, as_rows(points, study.metrics[0]), strict=True):
        at_s, step = at_s + (point.seconds or 0.0), row.pop("step")
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if value is not None]
        yield Event(wall_time=at_s, step=step, summary=Summary(value=values))
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
