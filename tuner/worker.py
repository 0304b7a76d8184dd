"""A worker: the process on a machine that starts slots, watches them and shows how the study goes."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from storage import claims, studies
from storage.engine import is_outage
from storage.errors import StorageError
from storage.sessions import Sessions
from tuner.errors import TunerError, WorkerInterrupted
from tuner.log import Log
from tuner.progress import Progress, Snapshot
from tuner.study import Study

DRAIN_S = 10.0
"""How long slots have to give their trials back once the worker is asked to stop."""
MAX_DEATHS = 3
"""A slot whose process dies this often in a row before it has a trial is not started again.

One that dies with a trial is: the trial's attempts and the study's `max_failures` bound that.
"""
LAST_OUTPUT_S = 1.0
"""How long the output of a slot that has ended is waited for, should somebody else hold its pipes open."""
REFRESH_S = 0.5


@dataclass(frozen=True, kw_only=True)
class _Message:
    """What reached the worker: a signal, or from slot `slot` a line of events or stderr, or its end."""

    kind: str
    slot: int = -1
    text: str = ""


class SlotProcess:
    """The process of one slot. It imports torch and the objective as it starts, and runs once it is configured."""

    def __init__(self, number: int, slots: int, objective: str, inbox: queue.SimpleQueue[_Message]) -> None:
        self.number = number
        self._inbox = inbox
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tuner.start_slot", objective],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_slot_environment(slots),
            start_new_session=True,  # a Ctrl-C at the terminal reaches the worker alone, which drains its slots
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        readers = [
            self._read("event", self._process.stdout),
            self._read("stderr", self._process.stderr),
        ]
        threading.Thread(target=self._report_end, args=(readers,), daemon=True).start()

    def configure(self, config: dict[str, Any]) -> None:
        """Tell the slot what to run."""
        self._write(json.dumps(config) + "\n")

    def drain(self) -> None:
        """Ask the slot to give its trial back and exit."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()

    def kill(self) -> None:
        """End the process at once, with all that it started."""
        with suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS says so by the second
            os.killpg(self._process.pid, signal.SIGKILL)

    def exit_code(self) -> int:
        """Wait for the process, whose end was reported, and return its exit code."""
        return self._process.wait()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died while it started; its end is reported like any other
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _read(self, kind: str, stream: IO[str]) -> threading.Thread:
        def forward() -> None:
            for line in stream:
                self._inbox.put(_Message(kind=kind, slot=self.number, text=line.rstrip("\n")))

        thread = threading.Thread(target=forward, daemon=True)
        thread.start()
        return thread

    def _report_end(self, readers: list[threading.Thread]) -> None:
        self._process.wait()
        self.kill()  # what an objective started and left behind, which would hold the pipes open
        for reader in readers:
            reader.join(LAST_OUTPUT_S)
        self._inbox.put(_Message(kind="end", slot=self.number))


class Slots:
    """The slots of a worker, started before the study is known so that importing torch overlaps with the rest.

    So does importing `objective`, an installed one's name or `path/to/file.py:NAME`.
    """

    def __init__(self, count: int, objective: str) -> None:
        self.inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._count = count
        self._objective = objective
        self.processes = {number: self._start(number) for number in range(count)}

    def restart(self, number: int) -> SlotProcess:
        """Start the slot's process anew."""
        self.processes[number] = self._start(number)
        return self.processes[number]

    def close(self) -> None:
        """Kill what still runs; for the way out of an error."""
        for process in self.processes.values():
            process.kill()

    def _start(self, number: int) -> SlotProcess:
        return SlotProcess(number, self._count, self._objective, self.inbox)


class Worker:
    """Runs a study's trials on its slots until the study is done or the worker is asked to stop."""

    def __init__(
        self,
        engine: Engine,
        study: Study,
        slots: Slots,
        config: dict[str, Any],
        log: Log,
        *,
        trials: int | None = None,
    ) -> None:
        """`config` is a `tuner.slot.SlotConfig` without `trials`, which is shared out among the slots."""
        self._engine = engine
        self._study = study
        self._slots = slots
        self._config = config
        self._log = log
        self._trials = trials
        self._held: dict[int, claims.Claim] = {}
        self._deaths: dict[int, int] = {}
        self._ended = dict.fromkeys(slots.processes, 0)
        self._refusal: TunerError | None = None
        self._reason = ""
        self._signals = 0
        self._deadline: float | None = None
        self._started_at = time.monotonic()
        self._shown_at = 0.0
        self._done_at_start = studies.count_states(engine, study.study_id).done

    def run(self) -> None:
        """Return when nothing is left to do.

        Raises WorkerInterrupted after SIGINT or SIGTERM, TunerError if the slots refused or kept dying.
        """
        with _signals_into(self._slots.inbox), Progress(self._log) as progress:
            for number, process in self._slots.processes.items():
                process.configure({**self._config, "trials": self._share(number)})
            running = set(self._slots.processes)
            while running:
                self._wait_and_handle(running)
                self._show(progress)
                if self._deadline is not None and time.monotonic() > self._deadline:
                    for number in running:
                        self._slots.processes[number].kill()
            self._show(progress, last=True)
        if self._signals:
            self._log.event("stopped", "stopped; the same command goes on where the study is")
            raise WorkerInterrupted
        if self._refusal is not None:
            raise self._refusal
        self._raise_if_failed()
        self._log.event("done", f"nothing left to do: {self._reason}")

    def _share(self, number: int) -> int | None:
        """Return how many of the worker's trials are left for this slot, None for as many as there are."""
        if self._trials is None:
            return None
        each, rest = divmod(self._trials, len(self._slots.processes))
        return each + (number < rest) - self._ended[number]

    def _wait_and_handle(self, running: set[int]) -> None:
        try:
            message = self._slots.inbox.get(timeout=REFRESH_S)
        except queue.Empty:
            return
        if message.kind == "signal":
            self._stop(running)
        elif message.kind == "stderr":
            self._log.event("slot_stderr", message.text, slot=message.slot)
        elif message.kind == "event":
            self._handle_event(message.slot, json.loads(message.text))
        elif message.kind == "end" and not self._restarted(message.slot):
            running.discard(message.slot)

    def _stop(self, running: set[int]) -> None:
        self._signals += 1
        if self._signals > 1:
            for number in running:
                self._slots.processes[number].kill()
            return
        self._log.event("stopping", "stopping: running trials are given back; again to stop at once")
        self._drain()

    def _drain(self) -> None:
        self._deadline = time.monotonic() + DRAIN_S
        for process in self._slots.processes.values():
            process.drain()

    def _handle_event(self, slot: int, event: dict[str, Any]) -> None:
        name = event.pop("event")
        if name == "trial_started":
            self._held[slot] = claims.Claim(
                study_id=self._study.study_id,
                trial_id=event.pop("trial_id"),
                number=event["trial"],
                attempt=event["attempt"],
                token=uuid.UUID(event.pop("token")),
            )
        if name in {"trial_ended", "trial_released"}:
            self._held.pop(slot, None)
            self._deaths.pop(slot, None)
            self._ended[slot] += name == "trial_ended"
        if name == "refused" and self._refusal is None:
            self._refusal = TunerError(event["message"], event["exit_code"])
            self._drain()
            return
        if name == "done":
            self._reason = event["message"]
            return
        text = _describe(name, slot, event, self._study.spec.metric)
        if text is not None or self._log.format == "json":
            message = event.pop("message", "")
            self._log.event(name, text or message, slot=slot, **event)

    def _restarted(self, slot: int) -> bool:
        """Deal with the end of a slot's process; whether it was started again."""
        code = self._slots.processes[slot].exit_code()
        held = self._held.pop(slot, None)
        if held is not None:
            self._release(held)
        if code == 0 or self._signals or self._refusal is not None:
            return False
        if held is None:
            self._deaths[slot] = self._deaths.get(slot, 0) + 1
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if self._deaths.get(slot, 0) >= MAX_DEATHS:
            self._refusal = TunerError(
                f"slot {slot} died {MAX_DEATHS} times in a row before it had a trial, last by {how}:"
                " see its output above"
            )
            self._drain()
            return False
        self._log.event("slot_died", f"slot {slot} died ({how}); starting it again", slot=slot)
        self._slots.restart(slot).configure({**self._config, "trials": self._share(slot)})
        return True

    def _release(self, held: claims.Claim) -> None:
        """Give back the trial of a dead slot at once; if the database is away, its lease runs out instead."""
        try:
            claims.release(
                Sessions(self._engine), held, counts=not self._signals, max_attempts=self._study.budget.max_attempts
            )
        except (StorageError, SQLAlchemyError) as error:
            if not is_outage(error):
                raise
            self._log.event("database_away", str(error).partition("\n")[0])

    def _show(self, progress: Progress, *, last: bool = False) -> None:
        if not last and time.monotonic() - self._shown_at < REFRESH_S:
            return
        self._shown_at = time.monotonic()
        try:
            counts = studies.count_states(self._engine, self._study.study_id)
            best = studies.best_trial(self._engine, self._study.study_id, self._study.spec.direction)
        except (StorageError, SQLAlchemyError) as error:
            if not is_outage(error):
                raise
            return  # shown again when the database is back
        progress.show(
            Snapshot(counts=counts, trials=self._study.spec.budget.trials, best=best, left_s=self._left_s(counts)),
            last=last,
        )

    def _raise_if_failed(self) -> None:
        """Raise TunerError if the study ended by its failures."""
        failed = studies.count_states(self._engine, self._study.study_id).failed
        allowed = self._study.spec.budget.max_failures
        if failed > allowed:
            failures = studies.count_failures(self._engine, self._study.study_id)
            last = list(failures.values())[-1][1]
            raise TunerError(
                f"study {self._study.name!r} ended: {failed} trials failed, more than the {allowed} allowed;"
                f" the last: {last}; 'tuner trials {self._study.name}' lists them"
            )

    def _left_s(self, counts: studies.StateCounts) -> float | None:
        done_here = counts.done - self._done_at_start
        if done_here <= 0 or counts.done >= self._study.spec.budget.trials:
            return None
        per_trial_s = (time.monotonic() - self._started_at) / done_here
        return per_trial_s * max(0, self._study.spec.budget.trials - counts.done)


def _slot_environment(slots: int) -> dict[str, str]:
    # Slots share the cores; with as many threads as cores each, they would fight over them.
    threads = str(max(1, (os.cpu_count() or 1) // slots))
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **os.environ}


@contextmanager
def _signals_into(inbox: queue.SimpleQueue[_Message]) -> Iterator[None]:
    """Put SIGINT and SIGTERM into `inbox` for a while, then put the handlers back."""

    def handle(number: int, _: FrameType | None) -> None:
        inbox.put(_Message(kind="signal", text=signal.Signals(number).name))

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _describe(name: str, slot: int, event: dict[str, Any], metric: str) -> str | None:
    """Return what to tell people about an event, None for nothing."""
    if name == "trial_ended":
        value = f": {metric} {event['value']:.6g}" if "value" in event else ""
        reason = f": {event['message']}" if "message" in event else ""
        took = f"{event.get('seconds', 0):.1f} s"
        return f"trial {event['trial']} {event['state'].lower()}{value}{reason} ({took}, slot {slot})"
    if name == "trial_released":
        reason = f": {event['message']}" if "message" in event else ""
        return f"trial {event['trial']} given back{reason} (slot {slot})"
    if name == "paused":
        return f"slot {slot} waits: {event['message']}"
    if name == "note":
        return f"{event['message']} (slot {slot})"
    if name == "database_away":
        return f"slot {slot}: {event['message']}; trying again"
    return None
