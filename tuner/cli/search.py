"""`tuner run`, `create` and `worker`: making a study and running its trials."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.api.creating import outline, tell_random_start
from tuner.api.exporting import Wish, default_output, export_opened, own_reference
from tuner.api.running import import_for_slots, n_workers, prepare, run_trials, slot_config
from tuner.cli.confirming import confirm_here, runs_of, shown
from tuner.cli.model import OBJECTIVE_HELP, print_exported
from tuner.cli.options import LIMITS, RESULT, WORKERS, ObjectiveName, StudyOptions, check_positive, seconds
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.cli.workers import AllowCodeChange, Device, Threads, Workers, worker_name
from tuner.errors import StudyFailedError, UsageError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from tuner.log import Log
    from tuner.study.joining import Study, Wanted
    from tuner.study.registry import ObjectiveSource

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
    from tuner.model.output import check_output
    from tuner.study.joining import Wanted
    from tuner.study.registry import find_objective, is_objective_class
    from tuner.study.tensorboard import check_tensorboard
    from tuner.worker.processes import Slots
    from tuner.worker.slots import plan_slots

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
        # Compilers are told of slots as they are imported, and the export is to have more of them.
        with_exporting = (export or not no_preflight) and not options.compile_
        kind = import_for_slots(slots, settings, source, with_exporting=with_exporting)
        wanted = Wanted(source=source, kind=kind, settings=planned, given=options.given_settings())
        has_model = is_objective_class(kind)
        engine, (joined, created) = _make_sure(
            settings, "run", objective, options.study, wanted, allow_code_change=allow_code_change
        )
        log = settings.log(worker=worker_name(), study=joined.name)
        log.event("study", f"{'created' if created else 'joined'} study {joined.name}: {outline(joined)}")
        prepare(settings, engine, joined, log)
        if created:
            tell_random_start(log, joined)
        target = output or default_output(settings, joined)
        if export and has_model:
            check_output(target)
        if studies.count_states(engine, joined.study_id).done < joined.spec.budget.trials:
            config = slot_config(
                settings,
                joined,
                source,
                worker=worker_name(),
                allow_code_change=allow_code_change,
                preflight=not no_preflight,
                allow_leak=allow_leak,
            )
            run_trials(engine, joined, slots, config, log, tensorboard=tensorboard, is_new=created)
        found = confirm_here(settings, engine, joined, source, runs, slots.again, allow_code_change=allow_code_change)
    finally:
        slots.close()
    confirmation = shown(found, as_json=as_json)
    if export and not has_model:
        has_model = _has_kept(log, engine, joined, settings.own_data_dir())
    exported = link = None
    if export and has_model:
        wish = Wish(
            output=output,
            device=device,
            full_schedule=full_schedule and is_objective_class(kind),
            in_fresh_process=False,
        )
        exported, link = export_opened(settings, engine, joined, source, wish, log)
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
    _, (joined, created) = _make_sure(settings, "create", objective, options.study, wanted)
    if created:
        tell_random_start(settings.log(study=joined.name), joined)
    if as_json:
        print(json.dumps({"study": joined.name, "created": created, "spec": joined.spec.model_dump(mode="json")}))
        return
    say(f"{'created' if created else 'exists:'} study {joined.name}: {outline(joined)}")


@command
def worker(
    settings: Settings,
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Name of the study to join.")],
    slots: Annotated[
        str,
        typer.Option(
            metavar="auto|N|DEVICE[*N],...",
            help="Trials to run at the same time, each in a process of its own: one for each CUDA device or else for"
            " each core, up to 8 (auto), a number, or as many as named, such as cuda:0*3,cuda:1 or cpu*4.",
            rich_help_panel=WORKERS,
        ),
    ] = "auto",
    device: Device = None,
    device_share: Annotated[
        float,
        typer.Option(
            metavar="PART", help="This worker's part of each device that others use as well.", rich_help_panel=WORKERS
        ),
    ] = 1.0,
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
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Only see whether trials could run here: database, study, objective, data directory.",
            rich_help_panel=LIMITS,
        ),
    ] = False,
) -> None:
    """Run trials of STUDY until its budget is used up. Sampler, pruner and objective are the study's."""
    from tuner.study.tensorboard import check_tensorboard
    from tuner.worker.processes import Slots
    from tuner.worker.slots import plan_slots
    from tuner.worker.supervisor import Limits

    if trials is not None:
        check_positive("--trials", trials)
    limits = Limits(
        trials=trials,
        timeout_s=None if timeout is None else seconds("--timeout", timeout),
        idle_exit_s=None if idle_exit is None else seconds("--idle-exit", idle_exit),
    )
    plans = plan_slots(slots, device, at_most=trials, threads=threads, device_share=device_share)
    if tensorboard is not None:
        check_tensorboard(tensorboard)
    if check:
        settings.own_data_dir()
        joined, source, _ = _objective_here(
            settings, settings.open(), study, objective, allow_code_change=allow_code_change
        )
        source.load()
        say(f"trials of study {joined.name} can run here, on {', '.join(plan.shown for plan in plans)}")
        return
    processes = Slots(plans, None, worker_name(), settings.data_dir)
    try:
        engine = settings.open_for_work()
        joined, source, reference = _objective_here(
            settings, engine, study, objective, allow_code_change=allow_code_change
        )
        processes.load(reference)
        log = settings.log(worker=worker_name(), study=joined.name)
        log.event("study", f"joined study {joined.name}: {outline(joined)}")
        prepare(settings, engine, joined, log)
        config = slot_config(
            settings,
            joined,
            source,
            worker=worker_name(),
            allow_code_change=allow_code_change,
            preflight=not no_preflight,
            allow_leak=allow_leak,
        )
        run_trials(engine, joined, processes, config, log, limits=limits, tensorboard=tensorboard)
    finally:
        processes.close()


def _objective_here(
    settings: Settings, engine: Engine, study: str, objective: str | None, *, allow_code_change: bool
) -> tuple[Study, ObjectiveSource, str]:
    """Return the study, and where its objective lies here, with the name by which that was found."""
    from tuner.study.joining import check_code, open_study, why_failed
    from tuner.study.registry import find_objective

    joined = open_study(engine, study)
    if (why := why_failed(engine, joined)) is not None:  # whatever code is here
        raise StudyFailedError(why)
    reference = objective or own_reference(settings, joined)
    source = find_objective(reference)
    check_code(joined, source, allow_code_change=allow_code_change)
    return joined, source, reference


def _make_sure(
    settings: Settings,
    command_name: str,
    reference: str,
    name: str | None,
    wanted: Wanted,
    *,
    allow_code_change: bool | None = None,
) -> tuple[Engine, tuple[Study, bool]]:
    """Return the database, the study and whether it was created now."""
    from tuner.api.creating import make_sure

    _ = wanted.spec  # whatever is wrong with it is told without a database
    engine = settings.open() if command_name == "create" else settings.open_for_work()
    named = "" if name is None else f" --study {shlex.quote(name)}"
    return engine, make_sure(
        engine,
        settings,
        wanted.source.study_name if name is None else name,
        wanted,
        again=f"tuner {command_name} {shlex.quote(reference)}{named}{settings.options()}",
        allow_code_change=allow_code_change,
        with_direction=partial(_with_direction, settings),
    )


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
