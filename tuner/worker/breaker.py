"""Holding a slot back whose device, and not its trials, seems to be what fails."""

from __future__ import annotations

N_FAILURES = 3
FAST_S = 60.0
"""A failure later than this after the trial's start is no sign of a broken device."""
FIRST_PAUSE_S = 60.0
LONGEST_PAUSE_S = 600.0


class Breaker:
    """Opens after a few fast failures in a row; then the slot pauses, longer each time, before it tries again.

    One trial that fails wherever it runs does not open it: the trial's attempts bound that.
    """

    def __init__(self, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self._first_pause_s = first_pause_s
        self.succeeded()

    def succeeded(self) -> None:
        """A trial has ended: close it."""
        self._trials: list[int | None] = []
        self._pause_s = self._first_pause_s

    def failed(self, trial: int | None, after_s: float) -> float:
        """Return for how many seconds to pause; 0 while it is closed.

        `trial` is the number of the trial that failed after so many seconds, None if the slot had not got one.
        """
        if after_s > FAST_S:
            self.succeeded()
        self._trials.append(trial)
        if len(self._trials) < N_FAILURES or (len(set(self._trials)) == 1 and trial is not None):
            return 0.0
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return pause_s
