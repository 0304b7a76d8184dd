"""From a study to a model on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.api.planning import check_positive
from tuner.errors import UsageError
from tuner.formats.names import DEFAULT, chosen, require
from tuner.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from tuner.log import Log
    from tuner.model.export import Exported
    from tuner.study.joining import Study
    from tuner.study.registry import ObjectiveSource


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What to export and how: `tuner.model.export.export_study` says what each means."""

    output: Path | None = None
    device: str | None = None
    formats: Sequence[str] = DEFAULT
    trial: int | None = None
    epochs: int | None = None
    full_schedule: bool = False
    in_fresh_process: bool = True

    def check(self) -> None:
        """Raise UsageError for what cannot be meant, TunerError if this machine lacks what a format is written by."""
        if self.epochs is not None:
            check_positive("--epochs", self.epochs)
            if self.full_schedule:
                raise UsageError("--epochs and --full-schedule both say how long to train: give one of them")
        require(chosen(",".join(self.formats)))


def export_named(
    settings: Settings,
    engine: Engine,
    study: Study,
    source: ObjectiveSource | None,
    wish: Wish,
    log: Log,
    *,
    allow_code_change: bool,
) -> tuple[Exported, Path | None]:
    """Export a trial of the study by the code of `source`, or of its own objective.

    Whatever is wrong with the study, the code or the place is told before torch is imported. Returns as
    `export_opened` does.
    """
    from tuner.model.output import check_output
    from tuner.study.confirming import choose
    from tuner.study.joining import check_code
    from tuner.study.registry import find_objective

    choose(engine, study, wish.trial)
    source = source or find_objective(own_reference(settings, study))
    check_code(study, source, allow_code_change=allow_code_change)
    check_output(wish.output or default_output(settings, study))
    return export_opened(settings, engine, study, source, wish, log)


def export_opened(
    settings: Settings, engine: Engine, study: Study, source: ObjectiveSource, wish: Wish, log: Log
) -> tuple[Exported, Path | None]:
    """Retrain a trial, test it and write the model to the output, or to the study's place in the data directory.

    Returns with it the link by the study's name, where there is one. Raises as `tuner.model.export.export_study`.
    """
    from tuner.model.export import export_study
    from tuner.model.output import link_by_name

    target = wish.output or default_output(settings, study)
    exported = export_study(
        engine,
        study,
        source,
        output=target,
        data_dir=settings.own_data_dir(),
        device=wish.device,
        log=log,
        full_schedule=wish.full_schedule,
        trial=wish.trial,
        epochs=wish.epochs,
        formats=chosen(",".join(wish.formats)),
        in_fresh_process=wish.in_fresh_process,
    )
    return exported, link_by_name(target, study.name) if wish.output is None else None


def own_reference(settings: Settings, study: Study) -> str:
    """Return where the study's objective is: its name, an installed one's, or the file that Python wrote of it here.

    Raises UsageError if it is a file of somebody's. What the database names is never imported as a file, though one
    of that name may lie here: the file that was written is found by the sha256 of its content.
    """
    from tuner.study.written import written_here

    name = study.spec.objective.name
    if ":" not in name:
        return name
    found = written_here(settings.data_dir, name, study.spec.objective.code_hash)
    if found is None:
        raise UsageError(
            f"study {study.name!r} searches {name!r}, a file of the one who created it;"
            f" give yours: --objective path/to/{name}"
        )
    return found


def default_output(settings: Settings, study: Study) -> Path:
    """Return where a study's model goes: numbers make the path, a name is not to be trusted with that.

    Studies of the embedded server and of other servers may have the same number, and do not meet.
    """
    name = f"study-{study.study_id}"
    if settings.storage is not None:
        url = settings.storage_url()
        server = f"{url.host} {url.port} {url.database} {dict(url.query).get('host')}"
        name += f"-{hashlib.sha256(server.encode()).hexdigest()[:8]}"
    return settings.own_data_dir() / "models" / name
