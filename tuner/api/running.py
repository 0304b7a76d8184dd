"""Running a study's trials on this machine."""

from __future__ import annotations

import os
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner import cores
from tuner.api.planning import check_positive
from tuner.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from tuner.log import Log
    from tuner.study.joining import Study
    from tuner.study.registry import ObjectiveKind, ObjectiveSource
    from tuner.worker.processes import Slots
    from tuner.worker.progress import Progress
    from tuner.worker.supervisor import Limits


def n_workers(count: int | None) -> int:
    """Return how many processes run trials. Raises UsageError."""
    if count is None:
        return max(2, min(8, cores.count() // 2))
    check_positive("--workers", count)
    return count


def new_worker_name() -> str:
    """Return a name for a worker: containers may have one hostname, and give their first process one number."""
    return f"{socket.gethostname()}:{os.getpid()}-{secrets.token_hex(3)}"


def slot_config(
    settings: Settings,
    study: Study,
    source: ObjectiveSource,
    *,
    worker: str,
    allow_code_change: bool,
    preflight: bool,
    allow_leak: bool,
) -> dict[str, Any]:
    """Return what the slots of a worker are told alike, a `tuner.slot.slot.SlotConfig` in part."""
    # With the password, where the URL has one: it goes through a pipe, and is in no process's arguments.
    url = settings.storage_url().render_as_string(hide_password=False)
    return {
        "storage": url,
        "study": study.name,
        "worker": worker,
        "objective": source.reference,
        "data_dir": str(settings.own_data_dir()),
        "allow_code_change": allow_code_change,
        "preflight": preflight,
        "allow_leak": allow_leak,
    }


def _tell_unwritable(log: Log, settings: Settings, study: Study) -> None:
    """Tell once that nothing can be kept on this machine: trials go on, and what is lost with them is more."""
    from storage.files import refuses_writes

    why = refuses_writes(settings.data_dir)
    if why is None:
        return
    place = "the database" if study.spec.checkpoints == "database" else study.spec.checkpoints
    where = "not kept at all" if place == "local" else f"kept in {place} alone"
    log.event(
        "note",
        f"cannot write to {settings.data_dir}: {why}; checkpoints are {where}, and a result that the database does not"
        " take is lost: mend that, or choose another --data-dir",
    )


def _drop_left_checkpoints(log: Log, settings: Settings, engine: Engine, study: Study) -> None:
    """Delete checkpoints that lie here of studies that were deleted elsewhere; later, if the database is away now."""
    from sqlalchemy.exc import SQLAlchemyError

    from storage import StorageError
    from storage.database.engine import is_outage
    from tuner.slot import left_checkpoints

    data_dir = settings.own_data_dir()
    try:
        left_checkpoints.note(engine, study, data_dir)
        dropped = left_checkpoints.drop(engine, data_dir)
    except (StorageError, SQLAlchemyError) as error:
        if not is_outage(error):
            raise
        return
    for path in dropped:
        log.event("note", f"deleted {path}: checkpoints of a study that was deleted")


def run_trials(
    engine: Engine,
    study: Study,
    slots: Slots,
    config: dict[str, Any],
    log: Log,
    *,
    limits: Limits | None = None,
    tensorboard: Path | None = None,
    is_new: bool = False,
    progress: Progress | None = None,
) -> None:
    """Run trials of the study until nothing is left to do, as `tuner.worker.supervisor.Worker.run` does.

    `config` is what `slot_config` returns. A study that `is_new` is deleted again if none of its trials began:
    an objective that cannot even load is about to be corrected, and its spec must not be in the way.
    """
    from storage.coordination import studies
    from tuner.errors import TunerError
    from tuner.study.tensorboard import follow
    from tuner.worker.supervisor import Limits, Worker

    try:
        with follow(engine, study, tensorboard, lambda line: log.event("note", line)) as on_trial:
            Worker(engine, study, slots, config, log, limits or Limits(), on_trial, progress).run()
    except TunerError:
        if is_new and studies.delete_if_unused(engine, study.study_id):
            log.event("study_deleted", f"study {study.name} had no trials and was deleted again")
        raise


def prepare(settings: Settings, engine: Engine, study: Study, log: Log) -> None:
    """Tell what cannot be kept on this machine, and delete what was left on it of studies that are gone."""
    _tell_unwritable(log, settings, study)
    _drop_left_checkpoints(log, settings, engine, study)


def import_for_slots(
    slots: Slots, settings: Settings, source: ObjectiveSource, *, with_exporting: bool
) -> ObjectiveKind:
    """Import the objective, with all that slots need, and have them forked from here; start the database meanwhile.

    `with_exporting`: what torch.export imports as it is first called is imported as well. It takes a third as long as
    all the rest, and would be imported twice: by the check before the first trial, in a slot, and by the export. What
    is wrong with the database is told when it is opened.
    """
    import storage  # noqa: F401 - no two threads shall import it at once
    from tuner.imports import quick_imports
    from tuner.study.registry import is_objective_class

    changed = {name: value for name, value in slots.environment().items() if os.environ.get(name) != value}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)  # torch and numpy look at it as they are imported
    with ThreadPoolExecutor(1) as pool:
        pool.submit(settings.start_database)
        with quick_imports():
            import torch

            import tuner.slot.slot  # noqa: F401 - before the objective, as in slots: it may set the number of threads
        kind = source.load()
        with quick_imports():
            if is_objective_class(kind):
                import torchmetrics  # noqa: F401

                if with_exporting:
                    with suppress(ImportError):  # another version of torch, which has it elsewhere
                        import torch.export._trace
    slots.has_imported()
    for name, value in before.items():
        if os.environ.get(name) != changed[name]:
            continue  # the objective had its own idea
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    if any(name in changed for name in cores.VARIABLES):
        torch.set_num_threads(cores.named() or cores.count())  # the export has them to itself
    return kind
