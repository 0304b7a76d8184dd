"""The checkpoint of a trial whose loop is its function's own: what that saves, the random generators, the reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from storage.database.errors import StudyHaltedError
from storage.trials.curves import CurvePoint
from tuner.errors import TunerError
from tuner.slot.kept_model import packed
from tuner.training import Interrupted
from tuner.training.checkpoint import generator_states, set_generator_states

if TYPE_CHECKING:
    from tuner.slot.checked_trial import CheckedTrial
    from tuner.training.checkpoint import Checkpoint

RESUMABLE: Final = (Interrupted, StudyHaltedError)
"""What gives a trial back, to go on from its checkpoint."""
_PLAIN: Final = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class TrialCheckpoint:
    """The state that a trial's own loop goes on from, on whichever machine the trial is claimed next.

    It lies where the study keeps its checkpoints, and is gone once the trial has ended.
    """

    def __init__(self, kept: Checkpoint | None, trial: CheckedTrial | None, device: torch.device) -> None:
        """Without `kept` and `trial`, as outside of a slot, nothing is kept."""
        self._kept = kept
        self._trial = trial
        self._device = device
        self._n_saved = 0

    def load(self) -> dict[str, Any] | None:
        """Return the state that was saved last, its tensors on the CPU; None if there is none that can be used.

        The random generators are set as they were then, so call it when model and data are made. What the trial had
        reported until then is reported again.
        """
        state = self.load_all()
        if state is None:
            return None
        set_generator_states(state["generators"], self._device)
        own: dict[str, Any] = state["own"]
        return own

    def load_all(self) -> dict[str, Any] | None:
        """Return what was saved last as `own`, with the random generators' states, which stay as they are now."""
        if self._kept is None or self._trial is None:
            return None
        self._trial.saves_next = True
        state = self._kept.load()
        if state is None:
            return None
        self._n_saved = state["n_saved"]
        if state["kept"] is not None and self._trial.loop is not None:
            self._trial.loop.kept = state["kept"].numpy().tobytes()
        for step, value in state["reports"]:
            self._trial.report_point(CurvePoint(step=step, value=value))
        self._trial.saves_next = True
        return state

    def is_due(self) -> bool:
        """Whether `save` would write now: `--checkpoint-every` has passed, or the trial is about to be given back."""
        if self._kept is None or self._trial is None:
            return False
        self._trial.saves_next = True
        try:
            self._trial.check()
        except RESUMABLE:
            return True
        return self._kept.is_due()

    def save(self, state: Mapping[str, Any], *, now: bool = False) -> None:
        """Save a copy of the state, on a thread, if `--checkpoint-every` has passed since the last; `now` at once.

        `now` waits until it is written, and for some seconds until other machines find it. A state is a dict of
        tensors, numbers, text, None, and of lists, tuples, sets and dicts of them: nothing is unpickled to read it.
        Call it after the step's report: a trial that is to be given back ends here, with this state saved. Raises
        TunerError for anything else in the state.
        """
        if not isinstance(state, Mapping):
            raise TunerError(f"a checkpoint's state needs to be a dict, got {type(state).__name__}")
        plain = _plain(state, "state")
        if self._kept is None or self._trial is None:
            return
        self._trial.alive()
        self._trial.saves_next = True
        try:
            self._trial.check()
        except RESUMABLE:
            self._write(plain, last=True)
            raise
        if now or self._kept.is_due():
            self._write(plain, last=now)
        if now:
            self._kept.close()

    def close(self) -> None:
        """Wait until what was saved is written, and for some seconds until it is copied."""
        if self._kept is not None:
            self._kept.close(copied=True)

    def _write(self, plain: Any, *, last: bool) -> None:
        assert self._kept is not None
        assert self._trial is not None
        self._n_saved += 1
        kept = None if self._trial.loop is None else self._trial.loop.kept
        state = {
            "own": plain,
            "generators": generator_states(self._device),
            "reports": list(self._trial.values_by_step.items()),
            "n_saved": self._n_saved,
            "kept": None if kept is None else torch.frombuffer(bytearray(packed(kept)), dtype=torch.uint8),
        }
        self._kept.save(state, (self._n_saved, 0), last=last)


def _plain(value: Any, place: str) -> Any:
    """Return a state as it can be read without unpickling code, numbers of NumPy as Python's. Raises TunerError."""
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return value
    if isinstance(value, np.generic):
        return _plain(value.item(), place)
    if isinstance(value, Mapping):
        return {_plain(key, f"a key of {place}"): _plain(its, f"{place}[{key!r}]") for key, its in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_plain(its, f"{place}[{number}]") for number, its in enumerate(value))
    hint = ": give torch.from_numpy of it" if isinstance(value, np.ndarray) else ""
    raise TunerError(
        "a checkpoint holds tensors, numbers, text, None, and lists, tuples, sets and dicts of them,"
        f" got {type(value).__name__} as {place}{hint}"
    )
