"""Where the model of a study's best trial is kept: beside its checkpoints, in the database, a folder or a bucket."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.exc import SQLAlchemyError

from storage.coordination import checkpoints, models
from storage.database.errors import InvalidWriteError, StorageError
from tuner.errors import SharedPlaceError, TunerError, first_line
from tuner.slot.folders import Folder, folder
from tuner.slot.kept_model import packed
from tuner.slot.shared_checkpoints import DATABASE, LOCAL, foreign_errors
from tuner.study.joining import Study, checkpoint_directory

if TYPE_CHECKING:
    from storage.coordination.claims import Claim
    from storage.database.sessions import Sessions
    from tuner.slot.kept_model import KeptModel

_FILE: Final = re.compile(r"trial-(\d+)-([0-9a-f]{64})\.model")


class KeptModels:
    """The models that trials of one study keep: of its best complete trial alone, once that has ended.

    A study whose checkpoints are local has them on the machine that ran the trial.
    """

    def __init__(self, study: Study, data_dir: Path, sessions: Sessions) -> None:
        self._study = study
        self._sessions = sessions
        self._folder: Folder | None = None
        place = study.spec.checkpoints
        if place == LOCAL:
            here = checkpoint_directory(data_dir, study)
            self._folder = folder(str(here.parent), here.name)
        elif place != DATABASE:
            self._folder = folder(place, study.directory)

    def is_wanted(self, number: int, value: float) -> bool:
        """Whether a trial that ends with this value is the best so far of those that kept a model."""
        study = self._study
        return models.would_be_best(self._sessions, study.study_id, study.spec.direction, number, value)

    def keep_if_best(
        self, held: Claim, value: float | None, kept: KeptModel | bytes | None, log: Callable[[str], None]
    ) -> dict[str, Any]:
        """Keep the model of a trial that ends with this value, if it is the best so far; return what tells of it.

        What cannot be kept is logged. Raises what the database away raises.
        """
        if kept is None or value is None or not self.is_wanted(held.number, value):
            return {}
        try:
            return self.keep(held, packed(kept))
        except SharedPlaceError as error:
            log(f"trial {held.number}: its model cannot be kept: {error}")
            return {}

    def tidy(self, log: Callable[[str], None]) -> None:
        """Drop the others; what cannot be dropped is logged, and left to the next trial that keeps one."""
        try:
            self.drop_others()
        except (SharedPlaceError, StorageError, SQLAlchemyError) as error:
            log(f"an older model is still kept: {first_line(error)}")

    def keep(self, held: Claim, data: bytes) -> dict[str, Any]:
        """Keep the model of a trial that is held and about to end, and return the attributes that tell of it.

        Raises SharedPlaceError if it cannot be kept, and what the database away raises.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        if self._folder is None:
            try:
                models.save(self._sessions, held, data)
            except InvalidWriteError as error:
                raise SharedPlaceError(f"{error}; a study with --checkpoints URL keeps larger ones") from error
        else:
            with foreign_errors():
                self._folder.write(_name(held.number, sha256), memoryview(data), threading.Event())
        return {models.KEPT: sha256}

    def drop_others(self) -> None:
        """Delete the models of trials that have ended and are not the best of those. Raises SharedPlaceError."""
        study = self._study
        if self._folder is None:
            models.drop_others(self._sessions, study.study_id, study.spec.direction)
            return
        with foreign_errors():
            found = {name: match for name in self._folder.names() if (match := _FILE.fullmatch(name)) is not None}
        # Listed before the values are looked at: what was not the best then cannot become it.
        numbers = sorted({int(match[1]) for match in found.values()})
        running = checkpoints.still_needed(self._sessions, study.study_id, numbers) if found else set()
        best = models.best(self._sessions, study.study_id, study.spec.direction)
        for name, match in found.items():
            is_best = best is not None and name == _name(best.number, str(best.sha256))
            if int(match[1]) not in running and not is_best:
                with foreign_errors():
                    self._folder.remove(name)

    def best(self) -> models.Best | None:
        """Return the best complete trial that kept a model."""
        return models.best(self._sessions, self._study.study_id, self._study.spec.direction)

    def read(self, best: models.Best) -> bytes | None:
        """Return its model, None if it is not there any more. Raises TunerError if it is damaged or cannot be read."""
        if self._folder is None:
            data = models.load(self._sessions, best.trial_id)
        else:
            try:
                with foreign_errors():
                    data = self._folder.read(_name(best.number, str(best.sha256)))
            except SharedPlaceError as error:
                raise TunerError(f"the model of trial {best.number} cannot be read: {error}") from error
        if data is not None and hashlib.sha256(data).hexdigest() != best.sha256:
            raise TunerError(f"the model that trial {best.number} kept is damaged: it is not the one of its sha256")
        return data


def _name(number: int, sha256: str) -> str:
    return f"trial-{number}-{sha256}.model"
