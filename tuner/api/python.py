"""What people call from Python, in scripts and notebooks: the functions that the commands call, with their checks.

They print nothing but progress: what happens goes to the logger `tuner` of Python's `logging`, what needs a look as a
warning, which Python shows on stderr. They raise what `tuner.errors` and `storage.database.errors` define, and never
exit. A study is given by its name, or as `create_study`, `run` and `load_study` return it, which know its database and
data directory; `storage` and `data_dir` say where a name is looked for: else `TUNER_STORAGE` and `TUNER_DATA_DIR` do,
or it is the embedded PostgreSQL of the user's own data directory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import optuna
from typing_extensions import Unpack

from tuner.api.creating import make_sure, outline, tell_random_start
from tuner.api.exporting import Wish, export_named
from tuner.api.opened import OpenedStudy, PythonSettings, opened
from tuner.api.reading import BestTrial, best_fields, ran, trial_fields
from tuner.api.running import n_workers, new_worker_name, prepare, run_trials, slot_config
from tuner.api.wanted import StudySettings, study_plan
from tuner.api.words import said_for_python
from tuner.errors import AskedToStop, TunerError
from tuner.exits import ExitCode

if TYPE_CHECKING:
    import pandas as pd
    from pydantic import JsonValue
    from sqlalchemy import Engine

    from tuner.model.export import Exported
    from tuner.objective import Objective
    from tuner.study.joining import Study, Wanted
    from tuner.study.registry import ObjectiveSource
    from tuner.worker.progress import Progress

AnObjective: TypeAlias = "str | type[Objective] | Callable[[optuna.Trial], float]"


def create_study(
    objective: AnObjective,
    *,
    name: str | None = None,
    trials: int | None = None,
    epochs: int | None = None,
    options: Mapping[str, JsonValue] | None = None,
    storage: str | None = None,
    data_dir: str | Path | None = None,
    **settings: Unpack[StudySettings],
) -> optuna.Study:
    """Create a study for workers to join, or return the one of that name, as `tuner create` does.

        study = tuner.create_study(Mine, trials=50, options={"hidden": 256}, pruner="median:n_warmup_steps=5")

    `objective` is a subclass of `Objective`, a plain function of a trial, the name of an installed objective,
    `path/to/file.py:NAME` or `package.module:NAME`. One that was defined in a notebook or a script is written to a
    file in the data directory, with what it names of there. `name` is the objective's unless it is given, `trials` how
    many have to complete or be pruned (30), `epochs` how many each trains for (the objective's), `options` are those
    of the objective; `tuner.api.wanted.StudySettings` has all other settings. What is not given is the default for a
    new study, and what the study has for one that is there.

    Raises UsageError for what cannot be meant, TunerError if the study exists with another spec or with other code of
    the objective, or if workers could not import the objective, storage.StorageError without a database.
    """
    with said_for_python():
        its = PythonSettings.of_environment(storage, data_dir)
        wanted = _wanted(objective, its, trials=trials, epochs=epochs, options=options, settings=settings)
        engine = its.open()
        try:
            study, _ = _make_sure(engine, its, name, wanted, allow_code_change=None)
        finally:
            engine.dispose()
        return OpenedStudy(study.name, its)


def run(
    objective: AnObjective,
    *,
    name: str | None = None,
    trials: int | None = None,
    epochs: int | None = None,
    options: Mapping[str, JsonValue] | None = None,
    workers: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    progress: bool = True,
    preflight: bool = True,
    allow_leak: bool = False,
    allow_code_change: bool = False,
    tensorboard: str | Path | None = None,
    storage: str | None = None,
    data_dir: str | Path | None = None,
    **settings: Unpack[StudySettings],
) -> optuna.Study:
    """Search with local workers until the study's budget is used up, and return the study; again, it goes on.

        study = tuner.run("digits", trials=20, workers=2)
        study.best_params

    What defines the study is as `create_study` has it. `workers` is how many processes run trials (half the cores, 2
    to 8), on `device` (`cuda`, `cuda:1`, `xpu`, `mps` or `cpu`: the best there is), with so many `threads` each. They
    are started anew and import the objective's file, and nothing of the calling program: a script needs no
    `if __name__ == "__main__"`. `progress` shows how far the study is, on a terminal or below a notebook's cell.
    `preflight`, `allow_leak` and `allow_code_change` are as of `tuner run`; `tensorboard` is a directory for curves.

    A Ctrl-C, or a notebook's interrupt, has the workers give their trials back, which takes 10 seconds at most, then
    KeyboardInterrupt is raised; a second one ends them at once. SIGTERM and SIGHUP do so as well, and then what they
    would have done. Only Python's main thread is told of signals: called in another one, `run` lets them pass, and
    `tuner stop STUDY` ends it. A running event loop, as a notebook's, does not go on meanwhile, unless by
    `await asyncio.to_thread(tuner.run, ...)`.

    Raises as `create_study` does, StudyFailedError if the study ended by its failures, and TunerError if no worker
    could begin.
    """
    with said_for_python():
        from tuner.study.tensorboard import check_tensorboard
        from tuner.worker.slots import plan_slots

        its = PythonSettings.of_environment(storage, data_dir)
        its.own_data_dir()  # before anything starts
        plans = plan_slots(str(n_workers(workers)), device, threads=threads)
        curves_dir = None if tensorboard is None else Path(tensorboard).absolute()
        if curves_dir is not None:
            check_tensorboard(curves_dir)
        wanted = _wanted(objective, its, trials=trials, epochs=epochs, options=options, settings=settings)
        with _drained_by_signals():
            engine = its.open_for_work()
            try:
                study, is_new = _make_sure(engine, its, name, wanted, allow_code_change=allow_code_change)
                if not _is_done(engine, study):
                    from tuner.worker.processes import Slots

                    worker, source = new_worker_name(), wanted.source
                    config = slot_config(
                        its,
                        study,
                        source,
                        worker=worker,
                        allow_code_change=allow_code_change,
                        preflight=preflight,
                        allow_leak=allow_leak,
                    )
                    log = its.log(worker=worker, study=study.name)
                    prepare(its, engine, study, log)
                    slots = Slots(plans, source.reference, worker, its.data_dir, forks=False)
                    try:
                        run_trials(
                            engine,
                            study,
                            slots,
                            config,
                            log,
                            tensorboard=curves_dir,
                            is_new=is_new,
                            progress=_progress(its, wanted=progress),
                        )
                    finally:
                        slots.close()
            finally:
                engine.dispose()
        return OpenedStudy(study.name, its)


def load_study(name: str, *, storage: str | None = None, data_dir: str | Path | None = None) -> optuna.Study:
    """Return Optuna's study of that name, with the study's sampler and pruner.

        study = tuner.load_study("digits")
        optuna.visualization.plot_optimization_history(study)

    All of `optuna.Study` works on it, also while workers run. Raises storage.StudyNotFoundError, another
    storage.StorageError without a database.
    """
    with said_for_python():
        return OpenedStudy(name, PythonSettings.of_environment(storage, data_dir))


def best(study: str | optuna.Study, *, storage: str | None = None, data_dir: str | Path | None = None) -> BestTrial:
    """Return the study's best trial, with its params: what `tuner best --json` prints.

        tuner.best("digits").params

    Raises TunerError if no trial is complete, or the study has several objectives; storage.StorageError as
    `load_study` does.
    """
    with said_for_python(), opened(study, storage, data_dir) as (_, engine, found):
        return BestTrial(**best_fields(engine, found))


def trials(
    study: str | optuna.Study, *, storage: str | None = None, data_dir: str | Path | None = None
) -> pd.DataFrame:
    """Return a row for each trial of the study, by its number: what `tuner trials --json` prints.

        frame = tuner.trials("digits")
        frame[frame.state == "COMPLETE"].sort_values("value").params_lr

    Columns are `number`, `state`, `value`, `params_NAME` for each param, `parameters` and `trained_parameters`
    (weights of the model), `last_step` and `last_value` (what was reported last), `started_at` and `ended_at` (with
    their time zone), `attempts`, `worker` and `machine`. What a trial has not is missing (NaN, None or NaT). Raises
    TunerError without pandas, which the extra `notebook` brings; storage.StorageError as `load_study` does.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise TunerError(f"tuner.trials needs the package pandas: pip install 'tuner[notebook]' ({error})") from error
    from storage.coordination import records
    from storage.coordination.one_trial import last_attempts

    with said_for_python(), opened(study, storage, data_dir) as (_, engine, found):
        of_trials = records.list_trials(engine, found.study_id)
        with engine.connect() as conn:
            attempts = last_attempts(conn, found.study_id)
    names = sorted({name for trial in of_trials for name in trial.params})
    rows = []
    for trial in of_trials:
        fields = trial_fields(trial) | ran(attempts, trial)
        params = {f"params_{name}": trial.params.get(name) for name in names}
        rows.append([*(fields[name] for name in _BEFORE), *params.values(), *(fields[name] for name in _AFTER)])
    frame = pd.DataFrame(rows, columns=[*_BEFORE, *(f"params_{name}" for name in names), *_AFTER])
    for name in ("started_at", "ended_at"):
        frame[name] = pd.to_datetime(frame[name], utc=True, format="ISO8601")
    return frame.astype({"value": float, "last_value": float})


_BEFORE = ("number", "state", "value")
_AFTER = (
    *("parameters", "trained_parameters", "last_step", "last_value", "started_at", "ended_at"),
    *("attempts", "worker", "machine"),
)


def export(
    study: str | optuna.Study,
    output: str | Path | None = None,
    *,
    objective: AnObjective | None = None,
    device: str | None = None,
    formats: Sequence[str] = ("safetensors", "pt2"),
    trial: int | None = None,
    epochs: int | None = None,
    full_schedule: bool = False,
    allow_code_change: bool = False,
    storage: str | None = None,
    data_dir: str | Path | None = None,
) -> Exported:
    """Retrain the study's best trial on train + valid, test it once and write the model, as `tuner export` does.

        exported = tuner.export(study, "model/", formats=["pt2", "onnx"])
        tuner.load_model(exported.directory).predict(rows)

    `output` is a directory, in models/ of the data directory unless given. `objective` is the study's own: an
    installed one, or one of a notebook or script, is found by itself, a file is to be given. `formats` are
    `safetensors` (always), `pt2`, `onnx`, `torchscript` and `aoti`. `trial` is the number of another than the best or
    confirmed one, `epochs` how many to train for (until the trial's best one), `full_schedule` for all of the study's.

    Returns the `directory`, the `manifest`, with the figures of test in `manifest.test`, and the `trial`. Trains in
    this process, whose random generators it seeds. Raises UsageError for what cannot be meant, TunerError if no trial
    is complete, the code is not the study's, or the output cannot be written; storage.StorageError as `load_study`.
    """
    wish = Wish(
        output=None if output is None else Path(output).absolute(),
        device=device,
        formats=[formats] if isinstance(formats, str) else formats,
        trial=trial,
        epochs=epochs,
        full_schedule=full_schedule,
    )
    with said_for_python(), _program_as_it_was():
        wish.check()
        with opened(study, storage, data_dir) as (its, engine, found):
            from tuner.study.joining import open_study

            named = open_study(engine, found.name)
            source = None if objective is None else _source(objective, its)
            log = its.log(study=named.name)
            exported, _ = export_named(its, engine, named, source, wish, log, allow_code_change=allow_code_change)
            return exported


def _source(objective: AnObjective, its: PythonSettings) -> ObjectiveSource:
    import tuner.objective  # noqa: F401 - it decides what is an objective's class
    from tuner.study.registry import find_objective, source_of

    return find_objective(objective) if isinstance(objective, str) else source_of(objective, its.own_data_dir())


def _wanted(
    objective: AnObjective,
    its: PythonSettings,
    *,
    trials: int | None,
    epochs: int | None,
    options: Mapping[str, JsonValue] | None,
    settings: StudySettings,
) -> Wanted:
    """Return the study that is wanted, whose spec could be made. Raises UsageError."""
    from tuner.study.joining import Wanted

    plan = study_plan({**settings, "trials": trials, "epochs": epochs})
    with _program_as_it_was():
        source = _source(objective, its)
        kind = source.load() if isinstance(objective, str) else objective
        planned = {**plan.plan(), "options": dict(options or {}), "option_texts": {}}
        wanted = Wanted(source=source, kind=kind, settings=planned, given=plan.given_settings())
        _ = wanted.spec  # whatever is wrong with it is told without a database
    return wanted


def _make_sure(
    engine: Engine, its: PythonSettings, name: str | None, wanted: Wanted, *, allow_code_change: bool | None
) -> tuple[Study, bool]:
    """Return the study and whether it is a new one; a plain function is minimized unless something says otherwise."""
    name = name or wanted.source.study_name
    study, is_new = make_sure(
        engine,
        its,
        name,
        wanted,
        again=f"tuner.load_study({name!r})",
        allow_code_change=allow_code_change,
        with_direction=lambda its_own: its_own,
    )
    log = its.log(study=study.name)
    log.event("study", f"{'created' if is_new else 'joined'} study {study.name}: {outline(study)}")
    if is_new:
        tell_random_start(log, study)
    return study, is_new


def _is_done(engine: Engine, study: Study) -> bool:
    from storage.coordination import studies

    return studies.count_states(engine, study.study_id).done >= study.spec.budget.trials


def _progress(its: PythonSettings, *, wanted: bool) -> Progress:
    from tuner.worker.progress import NoProgress, NotebookProgress, Progress

    kind = (NotebookProgress if _is_notebook() else Progress) if wanted else NoProgress
    return kind(its.log())


def _is_notebook() -> bool:
    """Whether what is shown is shown below a cell: IPython has a kernel there, and none on a terminal."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


@contextmanager
def _drained_by_signals() -> Iterator[None]:
    """Let what asked to stop do what it does in Python, once the workers have given their trials back."""
    try:
        yield
    except AskedToStop as asked:
        import signal

        if asked.exit_code == ExitCode.INTERRUPTED:
            raise KeyboardInterrupt from None
        numbers = {ExitCode.TERMINATED: signal.SIGTERM, ExitCode.HUNG_UP: signal.SIGHUP}
        if asked.exit_code in numbers:
            signal.raise_signal(numbers[ExitCode(asked.exit_code)])
        raise


@contextmanager
def _program_as_it_was() -> Iterator[None]:
    """Put back what is the whole program's: its arguments, and how torch computes in it."""
    torch: Any = sys.modules.get("torch")
    arguments = sys.argv
    threads = None if torch is None else torch.get_num_threads()
    is_deterministic = torch is not None and torch.are_deterministic_algorithms_enabled()
    is_benchmarked = torch is not None and torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        sys.argv = arguments
        if torch is not None:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(is_deterministic)
            torch.backends.cudnn.benchmark = is_benchmarked
