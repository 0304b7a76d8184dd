"""Results on disk that the database could not take, for the next worker on this machine to deliver."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

from optuna.trial import TrialState
from pydantic import BaseModel, ConfigDict, ValidationError

from storage import files
from storage.coordination import delivery, standings
from storage.coordination.delivery import Result
from storage.database.errors import InvalidWriteError
from storage.database.sessions import Sessions
from storage.trials.curves import CurvePoint

_STATES: Final[dict[TrialState, Literal["COMPLETE", "PRUNED", "FAIL"]]] = {
    TrialState.COMPLETE: "COMPLETE",
    TrialState.PRUNED: "PRUNED",
    TrialState.FAIL: "FAIL",
}


class _File(BaseModel):
    """A result as it lies on disk; `study` and `number` are for who looks at it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    study: str
    number: int
    token: uuid.UUID
    state: Literal["COMPLETE", "PRUNED", "FAIL"]
    value: float | None
    attrs: dict[str, Any]
    reports: list[CurvePoint | tuple[int, float]]
    """Pairs of step and value in files of version 0.1."""


class Spool:
    """A directory of results, one file each, whole or not there at all."""

    def __init__(self, data_dir: Path) -> None:
        self._directory = data_dir / "spool"
        self._refused: set[Path] = set()

    def add(self, study: str, number: int, result: Result) -> Path:
        """Keep a result, on the disk when this returns; its file. Raises OSError."""
        kept = _File(
            study=study,
            number=number,
            token=result.token,
            state=_STATES[result.state],
            value=result.value,
            attrs=dict(result.attrs),
            reports=list(result.reports),
        )
        path = self._directory / f"{result.token}.json"
        files.replace(path, kept.model_dump_json().encode())
        return path

    def is_empty(self) -> bool:
        """Whether nothing waits to be delivered; cheap."""
        return next(self._directory.glob("*.json"), None) is None

    def waiting(self, sessions: Sessions | None) -> list[tuple[Path, str | None, bool]]:
        """Return each file, the study that it says it is of, and whether the database may take it."""
        found: list[tuple[Path, str | None, bool]] = []
        for path in sorted([*self._directory.glob("*.json"), *self._directory.glob("*.refused")]):
            kept = None
            with suppress(ValueError, OSError):
                kept = _read(path)
            if kept is None:
                found.append((path, None, False))
                continue
            is_known = sessions is not None and delivery.find_attempt(sessions, kept.token) is not None
            found.append((path, kept.study, is_known and path.suffix == ".json"))
        return found

    def deliver(
        self,
        sessions: Sessions,
        study_id: int,
        budget: standings.Budget,
        log: Callable[[str, str, int | None], None],
    ) -> None:
        """Deliver what waits for this study, and tell `log` of each by event, message and trial number.

        What is damaged, or no database takes, is put aside; what belongs to other studies or databases stays, and what
        somebody else could have written, of which it is told once. Raises StorageError if the database is away.
        """
        for path in sorted(self._directory.glob("*.json")):
            try:
                kept = _read(path)
            except files.UntrustedError as error:
                if path not in self._refused:
                    self._refused.add(path)
                    log("result_refused", f"a result that was kept on disk is not delivered: {error}", None)
                continue
            except ValueError as error:
                aside = _put_aside(path)
                log("result_refused", f"{aside}, a result that was kept on disk, is damaged and lost: {error}", None)
                continue
            if kept is None:
                continue
            found = delivery.find_attempt(sessions, kept.token)
            if found is None or found[0] != study_id:
                continue
            result = Result(
                token=kept.token,
                state=TrialState[kept.state],
                value=kept.value,
                attrs=kept.attrs,
                reports=[_point(report) for report in kept.reports],
            )
            try:
                how = delivery.deliver(sessions, study_id, budget, result)
            except InvalidWriteError as error:
                message = f"trial {kept.number}: its result, kept in {_put_aside(path)}, is no good: {error}"
                log("result_refused", message, kept.number)
                continue
            if how == "unknown":
                continue
            with suppress(OSError):  # another worker here was as quick; to deliver it again does no harm
                path.unlink()
            became = "is delivered" if how == "delivered" else "came too late and is dropped"
            message = f"trial {kept.number}: its result, kept while the database was away, {became}"
            log(f"result_{how}", message, kept.number)


def _point(report: CurvePoint | tuple[int, float]) -> CurvePoint:
    return report if isinstance(report, CurvePoint) else CurvePoint(step=report[0], value=report[1])


def _put_aside(path: Path) -> Path:
    refused = path.with_suffix(".refused")
    with suppress(OSError):
        path.rename(refused)
    return refused


def _read(path: Path) -> _File | None:
    """Return the result, None for a file that is gone or not ours to understand.

    Raises ValueError if it is no JSON, UntrustedError if somebody else could have written it.
    """
    try:
        found = json.loads(files.read_own(path))
    except files.UntrustedError:
        raise
    except OSError:
        return None
    try:
        return _File.model_validate(found)
    except ValidationError:  # of another version of tuner
        return None
