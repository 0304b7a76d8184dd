"""`tuner confirm`: the best trials of a study run again on fresh seeds, here and by whoever joins."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tuner.api.exporting import own_reference
from tuner.api.running import n_workers, slot_config
from tuner.cli.model import OBJECTIVE_HELP
from tuner.cli.options import WORKERS
from tuner.cli.reading import AsJson, StudyName, print_json
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.cli.workers import AllowCodeChange, Device, Workers, worker_name
from tuner.errors import TunerError, UsageError
from tuner.text import number_text, params_text, table

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from storage.coordination.records import TrialRecord
    from tuner.study.confirmation import Candidate, Confirmation
    from tuner.study.joining import Study
    from tuner.study.registry import ObjectiveSource
    from tuner.worker.processes import Slots

MOST_RUNS: Final = 1000
"""More are a slip of the finger."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """How many of the best trials are run again, and on how many seeds each."""

    top: int
    seeds: int


@command
def confirm(
    settings: Settings,
    study: StudyName,
    top: Annotated[int, typer.Option(help="How many of the best trials are run again.")] = 3,
    seeds: Annotated[int, typer.Option(help="On how many seeds each is run, with those that it was run on.")] = 5,
    workers: Workers = None,
    device: Device = None,
    objective: Annotated[
        str | None,
        typer.Option(metavar="path/to/file.py:NAME", help=OBJECTIVE_HELP, rich_help_panel=WORKERS),
    ] = None,
    allow_code_change: AllowCodeChange = False,
    as_json: AsJson = False,
) -> None:
    """Run the best trials of STUDY again on fresh seeds, and choose the best on average.

    The runs are trials of the study STUDY/confirm, which workers on other
    machines may join. Again it goes on where it was; more seeds add runs.
    """
    from tuner.study.confirming import open_confirmable
    from tuner.study.joining import check_code
    from tuner.study.registry import find_objective
    from tuner.worker.processes import Slots
    from tuner.worker.slots import plan_slots

    runs = _checked(top, seeds)
    plans = plan_slots(str(n_workers(workers)), device)
    engine = settings.open_for_work()
    opened = open_confirmable(engine, study)
    reference = objective or own_reference(settings, opened)
    source = find_objective(reference)
    check_code(opened, source, allow_code_change=allow_code_change)
    start = partial(Slots, plans, reference, worker_name(), settings.data_dir)
    found = confirm_here(settings, engine, opened, source, runs, start, allow_code_change=allow_code_change)
    if (fields := shown(found, as_json=as_json)) is not None:
        print_json(fields)


def runs_of(text: str | None) -> Runs | None:
    """Return what `--confirm 3x5` asks for, None without one. Raises UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if match is None:
        raise UsageError(f"--confirm needs how many trials and on how many seeds each, as 3x5, got {text!r}")
    return _checked(int(match[1]), int(match[2]), "--confirm")


def confirm_here(
    settings: Settings,
    engine: Engine,
    study: Study,
    source: ObjectiveSource,
    runs: Runs | None,
    start: Callable[[], Slots],
    *,
    allow_code_change: bool,
) -> Confirmation | None:
    """Have the best trials run on so many seeds, by workers here, whose slots `start` starts, and wherever else.

    None without `runs`. Raises TunerError if none is complete then.
    """
    from tuner.study.confirming import candidates_of, confirmation_of, enqueue_runs, is_anything_due
    from tuner.worker.supervisor import Worker

    if runs is None:
        return None
    trials = candidates_of(engine, study, runs.top)
    if is_anything_due(engine, study, trials, runs.seeds):
        slots = start()  # they import torch and the objective while this process does
        try:
            _check_params(study, source, trials)
            companion = enqueue_runs(engine, study, trials, runs.seeds, source.code_hash())
            log = settings.log(worker=worker_name(), study=companion.name)
            numbers = ", ".join(str(trial.number) for trial in trials)
            log.event(
                "confirming",
                f"trials {numbers} of study {study.name} are run on {runs.seeds} fresh seeds each;"
                f" '{companion.worker_command}' on another machine takes part",
            )
            config = slot_config(
                settings,
                companion,
                source,
                worker=worker_name(),
                allow_code_change=allow_code_change,
                preflight=False,
                allow_leak=True,
            )
            Worker(engine, companion, slots, config, log).run()
        finally:
            slots.close()
    found = confirmation_of(engine, study)
    if found is None or not any(its.values for its in found.candidates):
        raise TunerError(
            f"no run of study {study.name!r} on another seed is complete:"
            f" 'tuner trials {shlex.quote(f'{study.name}/confirm')}' tells why"
        )
    return found


def shown(found: Confirmation | None, *, as_json: bool) -> dict[str, Any] | None:
    """Return a confirmation as JSON has it, if so it is wanted; else print it for people. None does neither."""
    if found is None or as_json:
        return None if found is None else confirmation_fields(found)
    say(*confirmation_lines(found))
    return None


def confirmation_lines(found: Confirmation) -> Iterator[str]:
    """Yield a table of the trials, and what there is to say of them."""
    names = ["trial", "in the search", "mean", "spread", "runs", "parameters", "params"]
    yield from table(names, [_cells(its) for its in found.ranked])
    yield from found.sentences()


def confirmation_fields(found: Confirmation) -> dict[str, Any]:
    """Return it as `tuner confirm --json` prints it."""
    choice = found.choice
    return {
        "study": found.study,
        "confirmation": found.name,
        "metric": found.metric,
        "direction": found.direction,
        "choice": None if choice is None else choice.number,
        "alike": [its.number for its in found.alike],
        "runs": found.runs,
        "unfinished": found.unfinished,
        "search_best": found.search_best,
        "search_trials": found.n_complete,
        "regression": found.regression,
        "trials": [_fields(found, its) for its in found.ranked],
    }


def _checked(top: int, seeds: int, option: str | None = None) -> Runs:
    if top < 1:
        raise UsageError(f"{option or '--top'} needs 1 trial or more, got {top}")
    if seeds < 2:
        raise UsageError(f"{option or '--seeds'} needs 2 seeds or more, as one has no spread, got {seeds}")
    if top * seeds > MOST_RUNS:
        raise UsageError(f"{option or '--top and --seeds'}: at most {MOST_RUNS} runs are made, got {top} x {seeds}")
    return Runs(top=top, seeds=seeds)


def _check_params(study: Study, source: ObjectiveSource, trials: Sequence[TrialRecord]) -> None:
    """Raise TunerError if the params of one are none of the objective's any more; a function's are not known."""
    from tuner.study.registry import build_objective, is_objective_class

    kind = source.load()
    if not is_objective_class(kind):
        return
    from tuner.slot.rebuilding import check_params

    objective = build_objective(kind, study.spec.objective.options, study.spec.seed)
    for trial in trials:
        check_params(objective, trial.params, f"trial {trial.number} of study {study.name!r}")


def _cells(its: Candidate) -> list[Any]:
    spread = "-" if its.std is None else f"{its.std:.2g}"
    parameters = "-" if its.parameters is None else f"{its.parameters:,}"
    shown = params_text(dict(its.params))
    return [its.number, number_text(its.searched), number_text(its.mean), spread, len(its.values), parameters, shown]


def _fields(found: Confirmation, its: Candidate) -> dict[str, Any]:
    gap = found.gaps.get(its.number)
    return {
        "number": its.number,
        "searched": its.searched,
        "mean": its.mean,
        "std": its.std,
        "values": its.values,
        "failed": dict(its.failed),
        "unfinished": its.unfinished,
        "parameters": its.parameters,
        "params": dict(its.params),
        "gap": None if gap is None else asdict(gap),
    }
