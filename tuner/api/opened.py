"""A study opened from Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import optuna

from tuner.api.words import LibraryLog
from tuner.errors import UsageError
from tuner.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from tuner.study.joining import AnyStudy


class PythonSettings(Settings):
    """Settings whose log is Python's."""

    def log(self, **fields: Any) -> LibraryLog:
        """Return a log with these fields in every record."""
        return LibraryLog(**fields)


class OpenedStudy(optuna.Study):
    """Optuna's study, with the sampler and pruner of its spec, which knows where it is from."""

    def __init__(self, name: str, settings: PythonSettings) -> None:
        from storage import open_storage
        from tuner.study.joining import find_study
        from tuner.study.sampling import build_pruner, build_sampler

        its = open_storage(settings.storage_url())
        found = find_study(its.engine, name)
        sampler = pruner = None
        if (spec := found.spec) is not None:
            # Another one for each number of trials: those that a study suggests from afresh shall not be the same.
            sampler = build_sampler(spec.sampler, spec.seed, its.get_n_trials(found.study_id))
            pruner = build_pruner(spec.pruner, spec.budget.trials)
        super().__init__(name, its, sampler=sampler, pruner=pruner)
        self.tuner_settings: Final = settings


@contextmanager
def opened(
    study: str | optuna.Study, storage: str | None, data_dir: str | Path | None
) -> Iterator[tuple[PythonSettings, Engine, AnyStudy]]:
    """Give the settings, the database and the study; `storage` and `data_dir` say where a name is looked for."""
    from tuner.study.joining import find_study

    if isinstance(study, OpenedStudy):
        if storage is not None or data_dir is not None:
            raise UsageError("storage and data_dir are for a study's name: this one knows where it is from")
        settings, name = study.tuner_settings, study.study_name
    elif isinstance(study, str):
        settings, name = PythonSettings.of_environment(storage, data_dir), study
    else:
        raise UsageError(
            "a study needs to be its name, or what tuner.run, tuner.create_study or tuner.load_study returned,"
            f" got {study!r}"
        )
    engine = settings.open()
    try:
        yield settings, engine, find_study(engine, name)
    finally:
        engine.dispose()
