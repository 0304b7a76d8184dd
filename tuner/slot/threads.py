"""How many threads a slot computes with: as many as it has cores now, and of those a trial on the CPU no more than pay.

What pays is measured by a trial's own steps as they are done, a block of them with each number of threads in turn. It
depends on the model, on the params, and on what else the machine does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator
from typing import Final

import torch

from tuner import cores
from tuner.spec import TrainingSpec

LOOK_S: Final = 5.0
"""How often at most a slot looks for how many cores there are for it."""
AGAIN_S: Final = 30.0
"""How long what was measured holds: neighbours come and go."""
BLOCK_S: Final = 0.02
"""How long the steps of a block take, or one step that takes longer: some turns of a busy core."""
BLOCKS: Final = 6
"""How many blocks are done with each number of threads at most; the first is warming up, as libraries prepare anew."""
MEASURE_S: Final = 0.5
"""After what time no more is measured than every number of threads once."""
WARM_UP_STEPS: Final = 3
WORTH: Final = 1.05
"""How much longer a step may take with fewer threads: they leave cores to others, and are not waited for."""
HOPELESS: Final = 2.0
"""How much longer a step takes with a number of threads below which none is tried."""

_AT_IMPORT: Final = (torch.get_num_threads(), cores.named())  # before any objective is imported


class Threads:
    """The number of threads of this process.

    It is left alone where somebody has said it: without a `share`, which returns how many cores the slot has now, and
    where the objective sets it, as it is imported or later. In a trial it does not change where that is trained by
    deterministic algorithms, or compiled.
    """

    def __init__(
        self,
        share: Callable[[], int] | None = None,
        spec: TrainingSpec = TrainingSpec(),  # noqa: B008 - frozen
        device: torch.device = torch.device("cpu"),  # noqa: B008
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._share = share
        # Sums are rounded otherwise, and what was compiled is compiled again.
        self._is_fixed = spec.deterministic or spec.compile
        self._measures = device.type == "cpu" and not self._is_fixed
        self._log = log
        self._most = self._now = torch.get_num_threads()
        self._told: int | None = None
        self._looked_at = 0.0
        self._measured_at = 0.0
        self._step_at: float | None = None
        self._measuring: Generator[int, float, dict[int, float]] | None = None
        if share is not None:
            self._heed_objective()

    def start(self) -> None:
        """Begin a trial: with all cores that there are for it."""
        if self._is_ours():
            self._step_at = None
            self._take(self._cores(time.perf_counter()))

    def look(self) -> None:
        """Have no more threads than there are cores now: other workers come and go as a trial runs."""
        now = time.perf_counter()
        if self._share is None or self._is_fixed or now - self._looked_at < LOOK_S or not self._is_ours():
            return
        if (most := self._cores(now)) != self._most:
            self._take(most)

    def batch(self) -> None:
        """Take note that a step begins, of a trial on the CPU."""
        if self._share is None or not self._measures or self._most == 1 or not self._is_ours():
            return
        self.apart()
        now = self._step_at = time.perf_counter()
        if self._measuring is None and now - self._measured_at >= AGAIN_S:
            self._measure()

    def apart(self) -> None:
        """Take note that what follows is no step."""
        started_at, self._step_at = self._step_at, None
        if self._measuring is None or started_at is None:
            return
        now = time.perf_counter()
        try:
            self._set(self._measuring.send(now - started_at))
        except StopIteration as end:
            self._measuring, self._measured_at = None, now
            self._choose(end.value)

    def _heed_objective(self) -> None:
        before, named_before = _AT_IMPORT
        named = cores.named()
        if torch.get_num_threads() != before:
            self._share = None
        elif named is not None and named != named_before:  # torch had looked before
            torch.set_num_threads(named)
            self._share = None

    def _is_ours(self) -> bool:
        """Whether nobody else has set the number; from then on it is theirs."""
        if self._share is not None and torch.get_num_threads() != self._now:
            self._share = self._measuring = None
        return self._share is not None

    def _cores(self, now: float) -> int:
        assert self._share is not None
        self._looked_at = now
        return self._share()

    def _take(self, most: int) -> None:
        self._most = most
        self._measuring, self._measured_at = None, -AGAIN_S
        self._set(most)

    def _set(self, number: int) -> None:
        if number != self._now:
            torch.set_num_threads(number)
            self._now = torch.get_num_threads()

    def _measure(self) -> None:
        self._measuring = measured(self._most)
        self._set(next(self._measuring))

    def _choose(self, seconds: dict[int, float]) -> None:
        chosen = fewest(seconds)
        self._set(chosen)
        if chosen != self._told:
            self._told = chosen
            each = ", ".join(f"{1000 * took:.3g} ms with {number}" for number, took in sorted(seconds.items()))
            self._log(f"computes with {chosen} thread{'' if chosen == 1 else 's'}: a step takes {each}")


def measured(most: int) -> Generator[int, float, dict[int, float]]:
    """Yield how many threads the next step is to be done with, and get how many seconds it took.

    Returns the seconds of a step for each number that was tried: `most`, half of that, and so on.
    """
    for _ in range(WARM_UP_STEPS):
        yield most
    spent_s = 0.0
    blocks: dict[int, list[float]] = {}
    number = most
    while number > 0:
        step_s, took_s = yield from _block(number)
        spent_s += took_s
        blocks[number] = [step_s]
        if step_s > HOPELESS * min(first for (first,) in blocks.values()):
            break
        number //= 2
    while spent_s < MEASURE_S and len(blocks[most]) < BLOCKS:
        for number, its in blocks.items():
            step_s, took_s = yield from _block(number)
            spent_s += took_s
            its.append(step_s)
    return {number: statistics.median(its[1:] or its) for number, its in blocks.items()}


def fewest(seconds: dict[int, float]) -> int:
    """Return the fewest threads with which a step takes hardly longer than with the best number."""
    least = min(seconds.values())
    return min(number for number, took in seconds.items() if took <= WORTH * least)


def _block(number: int) -> Generator[int, float, tuple[float, float]]:
    """Do a block of steps; return the seconds of one, and of all."""
    first_s = yield number  # with a change of threads before it
    if first_s >= BLOCK_S:
        return first_s, first_s
    n_steps, took_s = 0, 0.0
    while took_s < BLOCK_S:
        took_s += yield number
        n_steps += 1
    return took_s / n_steps, first_s + took_s
