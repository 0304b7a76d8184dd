"""`tuner run`, `create` and `worker`: making a study and running its trials."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli.confirming import confirm_here, runs_of, shown
from tuner.cli.model import OBJECTIVE_HELP, default_output, installed_name, print_exported
from tuner.cli.options import LIMITS, RESULT, WORKERS, ObjectiveName, StudyOptions, check_positive, seconds
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.cli.workers import (
    AllowCodeChange,
    Device,
    Threads,
    Workers,
    import_for_slots,
    n_workers,
    slot_config,
    worker_name,
)
from tuner.errors import StudyFailedError, TunerError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from tuner.log import Log
    from tuner.study.joining import Study, Wanted

NoPreflight = Annotated[
    bool,
    typer.Option(
        "--no-preflight",
        help="Take no model through all that is needed in the end before the first trial.",
        rich_help_panel=WORKERS,
    ),
]

AllowLeak = Annotated[
    bool,
    typer.Option("--allow-leak", help="Go on although two splits have the same rows.", rich_help_panel=WORKERS),
]

TensorBoard = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Write curves and params for TensorBoard as epochs end.", rich_help_panel=WORKERS),
]


@command
def run(
    settings: Settings,
    objective: ObjectiveName,
    options: StudyOptions,
    workers: Workers = None,
    device: Device = None,
    threads: Threads = None,
    confirm: Annotated[
        str | None,
        typer.Option(
            metavar="TOPxSEEDS",
            help="Run the best trials again on fresh seeds first, and export the best on average: 3x5.",
            rich_help_panel=RESULT,
        ),
    ] = None,
    export: Annotated[
        bool, typer.Option("--export/--no-export", help="Retrain and export the best trial.", rich_help_panel=RESULT)
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Directory for the model (default: in models/ of the data directory).", rich_help_panel=RESULT
        ),
    ] = None,
    full_schedule: Annotated[
        bool,
        typer.Option(
            "--full-schedule",
            help="Retrain for all of the study's epochs, not only until the best one.",
            rich_help_panel=RESULT,
        ),
    ] = False,
    allow_code_change: AllowCodeChange = False,
    no_preflight: NoPreflight = False,
    allow_leak: AllowLeak = False,
    tensorboard: TensorBoard = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=RESULT)] = False,
) -> None:
    """Search OBJECTIVE with local workers, then retrain and export the best trial.

    Goes on with the study if it exists: what is not given is as the study has it.
    """
    from storage.coordination import studies
    from tuner.model.output import check_output, link_by_name
    from tuner.study.joining import Wanted
    from tuner.study.registry import find_objective, is_objective_class
    from tuner.study.tensorboard import check_tensorboard, follow
    from tuner.worker.processes import Slots
    from tuner.worker.slots import plan_slots
    from tuner.worker.supervisor import Worker

    settings.own_data_dir()  # before anything starts
    plans = plan_slots(str(n_workers(workers)), device, threads=threads)
    runs = runs_of(confirm)
    planned = options.plan()
    source = find_objective(objective)
    if export and output is not None:
        check_output(output)
    if tensorboard is not None:
        check_tensorboard(tensorboard)
    slots = Slots(plans, objective, worker_name(), settings.data_dir, imports_here=True)
    try:
        kind = import_for_slots(slots, settings, source)
        wanted = Wanted(source=source, kind=kind, settings=planned, given=options.given_settings())
        has_model = is_objective_class(kind)
        engine, (joined, created) = _create_or_join(
            settings, "run", objective, options.study, wanted, allow_code_change=allow_code_change
        )
        log = settings.log(worker=worker_name(), study=joined.name)
        log.event("study", f"{'created' if created else 'joined'} study {joined.name}: {_outline(joined)}")
        _tell_unwritable(log, settings, joined)
        _drop_left_checkpoints(log, settings, engine, joined)
        if created:
            _tell_random_start(log, joined)
        target = output or default_output(settings, joined)
        if export and has_model:
            check_output(target)
        if studies.count_states(engine, joined.study_id).done < joined.spec.budget.trials:
            config = slot_config(
                settings,
                joined,
                source,
                objective,
                allow_code_change=allow_code_change,
                preflight=not no_preflight,
                allow_leak=allow_leak,
            )
            try:
                with follow(engine, joined, tensorboard, lambda line: log.event("note", line)) as on_trial:
                    Worker(engine, joined, slots, config, log, on_trial=on_trial).run()
            except TunerError:
                # An objective that cannot even load is about to be corrected: its spec must not be in the way.
                if created and studies.delete_if_unused(engine, joined.study_id):
                    log.event("study_deleted", f"study {joined.name} had no trials and was deleted again")
                raise
        found = confirm_here(
            settings, engine, joined, source, objective, runs, slots.again, allow_code_change=allow_code_change
        )
    finally:
        slots.close()
    confirmation = shown(found, as_json=as_json)
    if export and not has_model:
        has_model = _has_kept(log, engine, joined, settings.own_data_dir())
    exported = link = None
    if export and has_model:
        from tuner.model.export import export_study

        exported = export_study(
            engine,
            joined,
            source,
            output=target,
            data_dir=settings.own_data_dir(),
            device=device,
            log=log,
            full_schedule=full_schedule and is_objective_class(kind),
        )
        link = link_by_name(target, joined.name) if output is None else None
    print_exported(settings, engine, joined, exported, as_json=as_json, link=link, confirmation=confirmation)


def _has_kept(log: Log, engine: Engine, study: Study, data_dir: Path) -> bool:
    """Whether a trial of a plain function has kept its model; tell it where none has."""
    from tuner.model.keeping import has_kept

    if has_kept(engine, study, data_dir):
        return True
    log.event("not_exported", f"not exported: {study.spec.objective.name} is a plain function and has no model")
    return False


@command
def create(
    settings: Settings,
    objective: ObjectiveName,
    options: StudyOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print the study as JSON.")] = False,
) -> None:
    """Create a study of OBJECTIVE for workers to join; running it again does nothing.

    What is not given is then as the study has it.
    """
    from tuner.study.joining import Wanted
    from tuner.study.registry import find_objective

    planned = options.plan()
    source = find_objective(objective)
    wanted = Wanted(source=source, kind=source.load(), settings=planned, given=options.given_settings())
    _, (joined, created) = _create_or_join(settings, "create", objective, options.study, wanted)
    if created:
        _tell_random_start(settings.log(study=joined.name), joined)
    if as_json:
        print(json.dumps({"study": joined.name, "created": created, "spec": joined.spec.model_dump(mode="json")}))
        return
    say(f"{'created' if created else 'exists:'} study {joined.name}: {_outline(joined)}")


@command
def worker(
    settings: Settings,
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Name of the study to join.")],
    slots: Annotated[
        str,
        typer.Option(
            metavar="auto|N|DEVICE[*N],...",
            help="Trials to run at the same time, each in a process of its own: one for each CUDA device or else one"
            " (auto), a number, or as many as named, such as cuda:0*3,cuda:1 or cpu*4.",
            rich_help_panel=WORKERS,
        ),
    ] = "auto",
    device: Device = None,
    threads: Threads = None,
    objective: Annotated[
        str | None,
        typer.Option(metavar="path/to/file.py:NAME", help=OBJECTIVE_HELP, rich_help_panel=WORKERS),
    ] = None,
    allow_code_change: AllowCodeChange = False,
    no_preflight: NoPreflight = False,
    allow_leak: AllowLeak = False,
    tensorboard: TensorBoard = None,
    trials: Annotated[
        int | None, typer.Option(help="Trials to run here (default: all that are left).", rich_help_panel=LIMITS)
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Claim no trial later than this after the start: 90s, 15m, 2h.", rich_help_panel=LIMITS
        ),
    ] = None,
    idle_exit: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="End after so long without a trial to claim (default: wait for one).",
            rich_help_panel=LIMITS,
        ),
    ] = None,
) -> None:
    """Run trials of STUDY until its budget is used up. Sampler, pruner and objective are the study's."""
    from tuner.study.joining import check_code, open_study, why_failed
    from tuner.study.registry import find_objective
    from tuner.study.tensorboard import check_tensorboard, follow
    from tuner.worker.processes import Slots
    from tuner.worker.slots import plan_slots
    from tuner.worker.supervisor import Limits, Worker

    if trials is not None:
        check_positive("--trials", trials)
    limits = Limits(
        trials=trials,
        timeout_s=None if timeout is None else seconds("--timeout", timeout),
        idle_exit_s=None if idle_exit is None else seconds("--idle-exit", idle_exit),
    )
    plans = plan_slots(slots, device, at_most=trials, threads=threads)
    if tensorboard is not None:
        check_tensorboard(tensorboard)
    processes = Slots(plans, None, worker_name(), settings.data_dir)
    try:
        engine = settings.open_for_work()
        joined = open_study(engine, study)
        if (why := why_failed(engine, joined)) is not None:  # whatever code is here
            raise StudyFailedError(why)
        reference = objective or installed_name(joined)
        source = find_objective(reference)
        check_code(joined, source, allow_code_change=allow_code_change)
        processes.load(reference)
        log = settings.log(worker=worker_name(), study=joined.name)
        log.event("study", f"joined study {joined.name}: {_outline(joined)}")
        _tell_unwritable(log, settings, joined)
        _drop_left_checkpoints(log, settings, engine, joined)
        config = slot_config(
            settings,
            joined,
            source,
            reference,
            allow_code_change=allow_code_change,
            preflight=not no_preflight,
            allow_leak=allow_leak,
        )
        with follow(engine, joined, tensorboard, lambda line: log.event("note", line)) as on_trial:
            Worker(engine, joined, processes, config, log, limits, on_trial).run()
    finally:
        processes.close()


def _create_or_join(
    settings: Settings,
    command_name: str,
    reference: str,
    name: str | None,
    wanted: Wanted,
    *,
    allow_code_change: bool | None = None,
) -> tuple[Engine, tuple[Study, bool]]:
    """Return the database, the study and whether it was created now; tell in a line of one that this replaced.

    A plain function's direction is asked for if the study is a new one and nothing says it.
    """
    from storage import StudyNotFoundError
    from tuner.slot.shared_checkpoints import delete_checkpoints
    from tuner.study.joining import create_or_join, find_study

    _ = wanted.spec  # whatever is wrong with it is told without a database
    engine = settings.open() if command_name == "create" else settings.open_for_work()
    study_name = wanted.source.study_name if name is None else name
    try:
        find_study(engine, study_name)
    except StudyNotFoundError:
        wanted = _with_direction(settings, wanted)
    named = "" if name is None else f" --study {shlex.quote(name)}"
    again = f"tuner {command_name} {shlex.quote(reference)}{named}{settings.options()}"
    notes: list[str] = []
    joined = create_or_join(
        engine,
        study_name,
        wanted,
        command=again,
        allow_code_change=allow_code_change,
        history=_history(engine, wanted, notes),
    )
    for note in notes if joined.created else []:
        settings.log().event("history", note)
    if joined.replaced is not None:
        why = f": {joined.why}" if joined.why else ""
        log = settings.log(study=study_name)
        log.event("replaced", f"study {study_name}, of which nothing was complete, is deleted and created anew{why}")
        for line in delete_checkpoints(joined.replaced, settings.data_dir):
            log.event("note", line)
    return engine, (joined.study, joined.created)


def _with_direction(settings: Settings, wanted: Wanted) -> Wanted:
    """Ask on a terminal for the direction of a plain function if nothing says it; elsewhere tell which is taken."""
    from tuner.study.registry import is_objective_class

    if wanted.settings["direction"] is not None or is_objective_class(wanted.kind):
        return wanted
    name = wanted.source.name
    if all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr)):
        answer = typer.prompt(f"Is what {name} returns to be minimized or maximized?", default="minimize", err=True)
        if answer not in ("minimize", "maximize"):
            raise UsageError(f"--direction needs minimize or maximize, got {answer!r}")
        return replace(wanted, settings={**wanted.settings, "direction": answer})
    settings.log().event("direction", f"minimizing what {name} returns; --direction maximize does otherwise")
    return wanted


def _history(engine: Engine, wanted: Wanted, notes: list[str]) -> Callable[[], list[dict[str, Any]] | None]:
    """Return what reads the trials that a new study is to learn from, None without any, and notes what to tell."""

    def read() -> list[dict[str, Any]] | None:
        from tuner.study.history import history_of

        name = wanted.spec.history
        if name is None:
            return None
        found = history_of(engine, name, wanted.spec, wanted.objective)
        notes[:] = found.notes
        return found.trials

    return read


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


def _tell_random_start(log: Log, study: Study) -> None:
    from tuner.study.sampling import random_start

    spec = study.spec
    if spec.sampler.name == "tpe" and (drawn := random_start(spec.sampler)) >= spec.budget.trials:
        log.event(
            "random_start",
            f"all {spec.budget.trials} trials are drawn at random, as tpe looks at others only after {drawn} of them:"
            " more --trials, or --sampler tpe:n_startup_trials=N with a smaller one, would search",
        )


def _outline(study: Study) -> str:
    spec = study.spec
    return (
        f"objective {spec.objective.name}, {spec.direction} {spec.metric}, {spec.budget.trials} trials,"
        f" sampler {spec.sampler.name}, pruner {spec.pruner.name}, seed {spec.seed}"
    )
