"""The steps of a training compiled: when, how it is made sure that they are the same, and what that gained."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuner.data import Batch
from tuner.errors import first_line
from tuner.training.checked_step import By, Parts, Proof
from tuner.training.compile_aside import Aside, DiedError, NoForkError, name_of
from tuner.training.whole_step import ChangedError, why_not_whole

STEP, MODEL = "the whole step", "model and loss"
SKIPPED = 2
"""Steps that are not timed after a change of what runs: libraries choose their algorithms in the first ones."""
BEAT_S, BEATS = 5.0, 360
"""How often it is told that a compilation goes on, and for how long that is believed: half an hour."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What compiling gave one training: seconds a step before and after, None where no step was timed."""

    what: str
    compile_s: float
    before_s: float | None
    after_s: float | None
    n_steps: int
    """Steps that were taken after."""
    slowed_s: float | None = None
    """Seconds that steps took longer while a process of the training's compiled beside it, None if none did."""

    def __str__(self) -> str:
        if self.before_s is None or self.after_s is None:
            return f"--compile: {self.what} was compiled in {self.compile_s:.1f} s, and ran too little to say its gain"
        saved_s = self.n_steps * (self.before_s - self.after_s) - self.compile_s - (self.slowed_s or 0.0)
        slowed = "" if self.slowed_s is None else f" and slowed the steps before by {self.slowed_s:.1f} s"
        return (
            f"--compile: a step took {1000 * self.before_s:.3g} ms, and {1000 * self.after_s:.3g} ms with {self.what}"
            f" compiled, x {self.before_s / self.after_s:.2f}, for {self.n_steps} steps; compiling took"
            f" {self.compile_s:.1f} s{slowed}, {abs(saved_s):.1f} s {'saved' if saved_s > 0 else 'lost'} in all"
        )

    def attrs(self) -> dict[str, Any]:
        """Return what is recorded of it with a trial."""
        found = {"step_ms_uncompiled": self.before_s, "step_ms_compiled": self.after_s}
        told = {name: round(1000 * value, 4) for name, value in found.items() if value is not None}
        if self.slowed_s is not None:
            told["compile_slowed_s"] = round(self.slowed_s, 3)
        return {"compiled": self.what, "compile_s": round(self.compile_s, 3), **told}


class Compiling:
    """Takes the steps of one training: as they are in its first epoch, and compiled as a whole after it.

    What cannot be compiled so has its model and loss compiled, or nothing. Batches of fewer rows, as an epoch's last,
    are trained on as they are. With `aside` a process of its own compiles first, while steps go on as they are, and
    the training does at the beginning of the epoch after that; most is on the disk then.
    """

    def __init__(
        self,
        parts: Parts,
        by: By,
        step: Callable[[Batch], Tensor],
        log: Callable[[str], None],
        alive: Callable[[], None],
        aside: Aside | None = None,
    ) -> None:
        """`step` takes one uncompiled; `alive` is called now and then while the compiler works."""
        self._parts = parts
        self._by = by
        self._step = step
        self._log = log
        self._alive = alive
        self._aside = aside
        scaled = parts.precision == "fp16"
        self._why_less = why_not_whole(parts.optimizer) if not scaled else "fp16's scaling decides on the host"
        self._what = STEP if self._why_less is None else MODEL
        self._compiled: Callable[[Batch], Tensor] | None = None
        self._is_due = self._is_waiting = self._is_over = False
        self._n_rows = 0
        self._compile_s = 0.0
        self._before, self._beside, self._after = (_Pace(parts.device) for _ in range(3))

    def start_epoch(self) -> None:
        """An epoch begins, and the device has nothing to do."""
        self._is_due = self._compiled is None and not self._is_over and self._before.n_steps > 0
        if not self._is_over:
            self._pace.start_epoch()

    def end_epoch(self) -> None:
        """The device has done all steps of an epoch."""
        self._pace.end_epoch()

    def close(self) -> None:
        """End the process that compiles, if it still does."""
        if self._aside is not None:
            self._aside.close()

    def told(self) -> str | None:
        """Return in a line what compiling gained so far, None if it was not begun or failed, of which a line told."""
        if self._is_waiting:
            return "--compile: not compiled, as the training ended before the compiler did"
        gain = self.gain()
        return None if gain is None else str(gain)

    def gain(self) -> Gain | None:
        """Return what compiling gained so far, None if nothing was compiled."""
        if self._compiled is None:
            return None
        before_s, beside_s, slowed_s = self._before.step_s, self._beside.step_s, None
        if before_s is not None and beside_s is not None:  # that may be shorter by what else the machine does
            slowed_s = self._beside.n_steps * max(0.0, beside_s - before_s)
        return Gain(
            what=self._what,
            compile_s=self._compile_s,
            before_s=before_s,
            after_s=self._after.step_s,
            n_steps=self._after.n_steps,
            slowed_s=slowed_s,
        )

    def __call__(self, batch: Batch) -> Tensor:
        """Take one step on the batch's rows."""
        if self._is_due and batch.n_rows >= self._n_rows:
            self._n_rows = batch.n_rows
            if self._is_ready(batch):
                return self._compile(batch)
        if self._is_over:
            return self._step(batch)
        loss = self._step(batch) if self._compiled is None else self._by_compiled(self._compiled, batch)
        self._pace.count()
        return loss

    @property
    def _pace(self) -> _Pace:
        if self._compiled is not None:
            return self._after
        return self._beside if self._aside is not None and self._aside.is_at_work else self._before

    def _is_ready(self, batch: Batch) -> bool:
        """Whether to compile now, and not by a process of its own, which was not begun or has not ended."""
        if self._aside is None:
            return True
        self._is_due = False  # until the next epoch
        try:
            name = name_of(self._parts, batch, self._by)
            self._is_waiting = not self._aside.is_ready(name, lambda: self._rehearse(batch))
        except (OSError, NoForkError):  # no process that could, or no place for its lock
            self._is_waiting = False
        except DiedError as error:  # for want of memory, maybe, which this process is not to be ended for
            self._is_waiting, self._is_over = False, True
            self._log(f"--compile: not compiled, as {error}")
            return False
        if not self._is_waiting:
            self._aside = None
        return not self._is_waiting

    def _rehearse(self, batch: Batch) -> bool:
        """Compile in a fork, of which nothing stays but what is on the disk. Returns whether anything was compiled."""
        self._aside, self._log, self._alive = None, lambda _: None, lambda: None
        self._is_due = True
        while self._is_due:
            self._compile(batch)
        return self._compiled is not None

    def _by_compiled(self, step: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        if batch.n_rows != self._n_rows:
            return self._step(batch)
        try:
            return step(batch)
        except (ChangedError, _dynamo_error()) as error:  # of compiling for another shape or setting: nothing has run
            why = str(error) if isinstance(error, ChangedError) else f"{type(error).__name__}: {first_line(error)}"
        self._is_over = True
        self._pace.drop_epoch()
        self._parts.optimizer.zero_grad(set_to_none=True)
        self._log(f"--compile: uncompiled from here on, as {why}")
        return self._step(batch)

    def _compile(self, batch: Batch) -> Tensor:
        """Take the step as it is, and have it compiled for those to come."""
        self._is_due = False
        started_at = time.perf_counter()
        try:
            proof = Proof(self._parts, batch, whole=self._what == STEP)
        except (RuntimeError, MemoryError) as error:  # of memory for a copy, or the step's own, which will come again
            self._is_over = True
            self._log(f"--compile: not compiled, {type(error).__name__}: {first_line(error)}")
        if self._is_over:
            return self._step(batch)
        try:
            with _told(self._alive):
                self._compiled = proof.compiled(self._by)
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises: without it the step has just run
            why = f"{type(error).__name__}: {first_line(error)}"
            if self._what == STEP:
                self._what, self._why_less, self._is_due = MODEL, why, True  # with the next batch
            else:
                self._is_over = True
                self._log(f"--compile: not compiled, {why}")
        else:
            if self._why_less is not None:
                self._log(f"--compile: {self._what} alone, as {self._why_less}")
        loss = proof.end()
        gc.collect()  # what the compiler has followed lies about in cycles, and holds the weights
        self._compile_s += time.perf_counter() - started_at
        return loss


class _Pace:
    """Seconds a step, without the first ones: there the device is waited for, once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._n_skipped = 0
        self._began_at: float | None = None
        self._n_here = 0
        self._seconds, self._n_timed, self.n_steps = 0.0, 0, 0

    @property
    def step_s(self) -> float | None:
        return self._seconds / self._n_timed if self._n_timed else None

    def start_epoch(self) -> None:
        self._n_here = 0
        self._began_at = time.perf_counter() if self._n_skipped == SKIPPED else None

    def count(self) -> None:
        self.n_steps += 1
        if self._began_at is not None:
            self._n_here += 1
            return
        self._n_skipped += 1
        if self._n_skipped == SKIPPED:
            if self._device.type != "cpu":
                torch.accelerator.synchronize(self._device)
            self._began_at = time.perf_counter()

    def drop_epoch(self) -> None:
        self._began_at = None

    def end_epoch(self) -> None:
        if self._began_at is not None and self._n_here:
            self._seconds += time.perf_counter() - self._began_at
            self._n_timed += self._n_here


def _dynamo_error() -> type[Exception]:
    import torch._dynamo.exc

    return torch._dynamo.exc.TorchDynamoException


@contextmanager
def _told(alive: Callable[[], None]) -> Iterator[None]:
    """Call `alive` now and then while the block runs, which may take longer than an epoch took."""
    ended = threading.Event()

    def beat() -> None:
        for _ in range(BEATS):
            if ended.wait(BEAT_S):
                return
            alive()

    thread = threading.Thread(target=beat, name="compiling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
