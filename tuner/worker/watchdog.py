"""Finding trials that hang, by what their slots tell: from outside, as what hangs in C may let no thread run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from storage.coordination import claims
from tuner.text import duration

LEAST_S = 60.0
TIMES = 10
"""A trial hangs that has told of no batch and no report for so many times as long as the study's slowest epoch took."""
UNKNOWN_S = 1800.0
"""The same while no epoch has ended: no batch takes as long."""
DUMP_S = 3.0
"""How long a slot has to write where its threads are, before it is killed."""
STOOD_STILL_S = 5.0
"""A worker that has not looked for so long stood still itself, and knows nothing of its slots."""


@dataclass(frozen=True, kw_only=True)
class Hang:
    """What a trial is killed for. `is_final` if it fails at once, as it would take as long in another attempt."""

    reason: str
    is_final: bool

    @property
    def given_back(self) -> claims.GivenBack:
        """What becomes of the trial."""
        return claims.GivenBack(outcome="hung", reason=self.reason, counts=True, failure="hung", is_final=self.is_final)


@dataclass(kw_only=True)
class _Watched:
    started_at: float
    sign_at: float
    has_batches: bool = False
    hang: Hang | None = None
    kill_at: float = math.inf


class Watchdog:
    """Watches the attempts of one worker's slots, by the number of the slot. All times are those of one clock.

    An attempt may take `trial_timeout_s`. Whether it must tell of itself, `is_on`, is for the study to say; where it
    does not (None), trials are watched whose batches are told of, which are those of `tuner.training.fit`.
    """

    def __init__(self, trial_timeout_s: float | None, is_on: bool | None) -> None:
        self.slowest_s = 0.0
        """The study's slowest epoch so far; 0 while none has ended."""
        self._trial_timeout_s = trial_timeout_s
        self._is_on = is_on
        self._has_batches = False
        self._watched: dict[int, _Watched] = {}
        self._looked_at = -math.inf

    def start(self, slot: int, now: float) -> None:
        """An attempt begins."""
        self._watched[slot] = _Watched(started_at=now, sign_at=now)

    def sign(self, slot: int, now: float, *, is_batch: bool = False) -> None:
        """The slot has told something, perhaps that its trial has trained or evaluated a batch."""
        its = self._watched.get(slot)
        if its is not None:
            its.sign_at = now
            its.has_batches |= is_batch
            self._has_batches |= is_batch

    def report(self, slot: int, now: float, epoch_s: float | None) -> None:
        """A trial has reported, after an epoch of so many seconds; before that is known, those since its last sign."""
        its = self._watched.get(slot)
        if its is not None and (epoch_s is not None or not its.has_batches):
            self.slowest_s = max(self.slowest_s, now - its.sign_at if epoch_s is None else epoch_s)
        self.sign(slot, now)

    def end(self, slot: int) -> Hang | None:
        """The attempt has ended, or waits for others; what it was to be killed for, if it was."""
        its = self._watched.pop(slot, None)
        return None if its is None else its.hang

    def look(self, now: float) -> dict[int, Hang]:
        """Return the slots whose attempts are found to hang now, each once."""
        if now - self._looked_at > STOOD_STILL_S:
            for its in self._watched.values():
                its.sign_at = max(its.sign_at, now)
        self._looked_at = now
        found = {}
        for slot, its in self._watched.items():
            hang = self._hang(its, now)
            if its.hang is None and hang is not None:
                its.hang, its.kill_at = hang, now + DUMP_S
                found[slot] = hang
        return found

    def to_kill(self, now: float) -> list[int]:
        """Return the slots that have had their time to tell where they hang."""
        return [slot for slot, its in self._watched.items() if now >= its.kill_at]

    def _hang(self, its: _Watched, now: float) -> Hang | None:
        if self._trial_timeout_s is not None and now - its.started_at >= self._trial_timeout_s:
            return Hang(reason=f"it took longer than --trial-timeout, {self._trial_timeout_s:g} s", is_final=True)
        limit_s = self._limit_s(its)
        if now - its.sign_at < limit_s:
            return None
        pace = f"the slowest epoch took {self.slowest_s:.1f} s" if self.slowest_s else "no epoch has ended yet"
        return Hang(reason=f"no batch and no report for {duration(limit_s)}, and {pace}", is_final=False)

    def _limit_s(self, its: _Watched) -> float:
        if self._is_on is False or (self._is_on is None and not self._has_batches):
            return math.inf
        if not self.slowest_s:
            return UNKNOWN_S if its.has_batches else math.inf
        return max(LEAST_S, TIMES * self.slowest_s)
