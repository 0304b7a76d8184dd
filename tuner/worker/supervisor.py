"""A worker: the process on a machine that starts slots, gives them leave to claim trials, and mends what fails."""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from storage.coordination import claims
from storage.coordination.workers import SlotSeen, WorkerSeen
from storage.database.engine import is_outage
from storage.database.errors import StorageError, StudyNotFoundError
from tuner.errors import AskedToStop, StudyFailedError, TunerError
from tuner.exits import OF_SIGNAL, TOGETHER_S, ExitCode
from tuner.log import OWN_PRINTS, Log
from tuner.placement import placement
from tuner.slot import prints
from tuner.slot.loading import DataSource
from tuner.study.joining import Study, why_failed
from tuner.versions import versions
from tuner.worker.known_slot import KnownSlot
from tuner.worker.presence import LIVE_PROGRESS_S, PROGRESS_S, Presence
from tuner.worker.processes import Slots
from tuner.worker.progress import Progress
from tuner.worker.signals import signals_into
from tuner.worker.slot_process import Message
from tuner.worker.telling import describe, hung, printed, reported
from tuner.worker.watchdog import Watchdog

DRAIN_S = 9.0
"""How long slots have to give their trials back once the worker is asked to stop; it has ended a second later."""
MAX_DEATHS = 3
"""A worker whose slot dies this often in a row before it ever was ready ends."""
TICK_S = 0.25
REPORTS_S = 10.0
"""The shortest time between two plain lines that tell what a slot's trial reported."""


_SILENT = ("wants_trial", "nothing", "batch", "waiting", "refused", "done")
"""What slots tell that is no event of the log."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a worker ends before the study does: after so many trials, so many seconds, so many seconds of idleness."""

    trials: int | None = None
    timeout_s: float | None = None
    idle_exit_s: float | None = None


class Worker:
    """Runs a study's trials on its slots until the study is done or the worker is asked to stop."""

    def __init__(
        self,
        engine: Engine,
        study: Study,
        slots: Slots,
        config: dict[str, Any],
        log: Log,
        limits: Limits = Limits(),
        on_trial: Callable[[int], None] = lambda _: None,
        progress: Progress | None = None,
    ) -> None:
        """`config` is a `tuner.slot.slot.SlotConfig` without what differs from slot to slot.

        `on_trial` is told the number of each trial that has reported or ended. `progress` shows how far the study is,
        by the log unless another is given.
        """
        self._engine = engine
        self._study = study
        self._slots = slots.all
        self._start, self._tell_at_work, self._share_data = slots.start, slots.tell_at_work, slots.share_data
        self._inbox = slots.inbox
        self._config = config
        self._log = log
        self._limits = limits
        self._on_trial = on_trial
        self._progress = progress or Progress(log)
        self._id = uuid.uuid4()
        self._placement = placement(os.environ)
        self._n_ended = self._n_at_work = 0
        self._refusal: TunerError | None = None
        self._reason: str | None = None
        self._is_finished = False
        self._signals: list[ExitCode] = []  # what each asks the worker to end with
        self._is_draining = False
        self._kill_at: float | None = None
        self._started_at = time.monotonic()
        self._idle_since: float | None = None
        self._watchdog = Watchdog(study.spec.trial_timeout_s, study.spec.watchdog)
        self._alone: dict[str, KnownSlot] = {}  # by device, the slot that has it to itself

    def run(self) -> None:
        """Return when nothing is left to do.

        Raises AskedToStop after a signal of `OF_SIGNAL`, or once nobody reads its log any more, StudyFailedError if the
        study ended by its failures, TunerError if the slots refused or kept dying.
        """
        with signals_into(self._inbox), self._progress as progress:
            presence = self._presence = Presence(
                self._engine,
                self._study,
                self._seen,
                self._log,
                Path(self._config["data_dir"]),
                progress_s=LIVE_PROGRESS_S if progress.is_live else PROGRESS_S,
            )
            presence.start()
            shown = None
            try:
                self._count_at_work()
                objective, data_dir = self._config["objective"], Path(self._config["data_dir"])
                self._share_data(DataSource.of(self._study.spec, objective, data_dir))
                for slot in self._slots:
                    slot.process.send(self._config_of(slot))
                while any(slot.state != "ended" for slot in self._slots):
                    self._wait_and_handle()
                    self._look_at_the_clock()
                    if self._log.is_unread and not self._is_draining:
                        self._stop(ExitCode.AGAIN)
                    if presence.snapshot is not None and presence.snapshot is not shown:
                        shown = presence.snapshot
                        progress.show(shown)
            finally:
                presence.close(self._left_s())
            self._count_late_signals()
            if not self._signals and (last := presence.look()) is not None:
                progress.show(last, last=True)
            self._count_late_signals()
        if self._signals:
            self._log.event("stopped", "stopped; the same command goes on where the study is")
            raise AskedToStop(self._signals[-1])
        if self._refusal is not None:
            raise self._refusal
        self._raise_if_failed()
        self._log.event("done", f"nothing left to do: {self._reason}")

    def _config_of(self, slot: KnownSlot) -> dict[str, Any]:
        plan = slot.plan
        own = {"slot": plan.number, "device": plan.own_device, "shown_device": plan.device, "share": plan.share}
        return {**self._config, **own, "shares_cores_by": len(self._slots) if plan.shares_cores else None}

    def _wait_and_handle(self) -> None:
        try:
            message = self._inbox.get(timeout=TICK_S)
        except queue.Empty:
            return
        if message.kind == "signal":
            self._stop(_asked(message))
            return
        if message.kind == "note":
            self._log.event("note", message.text)
            return
        slot = self._slots[message.slot]
        if message.kind == "stderr":
            self._say_printed(slot, message.text)
        elif message.kind == "event":
            self._handle_event(slot, json.loads(message.text))
        elif message.kind == "end":
            self._handle_end(slot)

    # Stopping

    def _stop(self, code: ExitCode) -> None:
        self._signals.append(code)
        if len(self._signals) > 1:
            for slot in self._slots:
                slot.process.kill()
            return
        self._drain()
        threading.Event().wait(TOGETHER_S)  # from now on another signal is a second one
        self._log.event("stopping", "stopping: running trials are given back; again to stop at once")

    def _count_late_signals(self) -> None:
        """Count the signals that came after the last slot had ended."""
        while not self._inbox.empty():
            if (message := self._inbox.get()).kind == "signal":
                self._signals.append(_asked(message))

    def _drain(self) -> None:
        self._is_draining = True
        self._kill_at = time.monotonic() + DRAIN_S
        for slot in self._slots:
            slot.process.drain()
        self._end_paused()

    def _left_s(self) -> float:
        """Return how long the worker may still take to end: it has a second after its slots."""
        return math.inf if self._kill_at is None else max(0.0, self._kill_at + 1 - time.monotonic())

    def _end_paused(self) -> None:
        """End the slots that have no process, and wait to get one."""
        for slot in self._slots:
            if slot.restart_at is not None:
                slot.restart_at, slot.state = None, "ended"

    def _end(self, reason: str) -> None:
        """End the worker, whose slots have no trial."""
        if not self._is_draining:
            self._reason = reason
            self._drain()

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if self._kill_at is not None and now > self._kill_at:
            for slot in self._slots:
                slot.process.kill()
        for slot in self._slots:
            if slot.restart_at is not None and now >= slot.restart_at:
                slot.restart_at = None
                self._restart(slot)
        self._kill_hung(now)
        if any(slot.held is not None for slot in self._slots):
            self._idle_since = None
        idle_exit_s = self._limits.idle_exit_s
        if self._idle_since is not None and idle_exit_s is not None and now - self._idle_since >= idle_exit_s:
            self._end(f"no trial to claim for {idle_exit_s:g} s")
        if self._limits.timeout_s is not None and now - self._started_at >= self._limits.timeout_s:
            self._grant()

    def _kill_hung(self, now: float) -> None:
        self._watchdog.slowest_s = max(self._watchdog.slowest_s, self._presence.slowest_s)
        for number, hang in self._watchdog.look(now).items():
            slot = self._slots[number]
            self._say(slot, "hung", hung(slot.last_trial, _named(slot), hang.reason))
            slot.process.request_stacks()
        for number in self._watchdog.to_kill(now):
            slot = self._slots[number]
            for line in slot.process.read_stacks():
                self._say_printed(slot, line)
            slot.process.kill()

    # Leave to claim

    def _grant(self) -> None:
        """Let slots claim that wait to, as far as may be; end the worker if none will be let any more."""
        for slot in self._slots:
            if slot.waits_alone and not self._is_in_use_beside(slot):
                self._alone[slot.device] = slot
                slot.waits_alone = False
                self._watchdog.start(slot.plan.number, time.monotonic())
                slot.process.send("alone")
        closed = self._closed()
        for slot in self._slots:
            if closed is None and slot.wants and not self._is_reserved(slot.device):
                slot.wants, slot.may_claim = False, True
                slot.process.send("claim")
                closed = self._closed()
        if closed is not None and not any(slot.may_claim for slot in self._slots):
            self._end(closed)

    def _closed(self) -> str | None:
        """Return why no slot may claim another trial now, None if one may."""
        limits, n_may_claim = self._limits, sum(slot.may_claim for slot in self._slots)
        if limits.trials is not None and self._n_ended + n_may_claim >= limits.trials:
            return f"this worker ran its {limits.trials} trials"
        if limits.timeout_s is not None and time.monotonic() - self._started_at >= limits.timeout_s:
            return f"this worker's time of {limits.timeout_s:g} s is over"
        return None

    def _is_reserved(self, device: str) -> bool:
        return device in self._alone or any(slot.waits_alone and slot.device == device for slot in self._slots)

    def _is_in_use_beside(self, slot: KnownSlot) -> bool:
        if slot.device in self._alone:
            return True
        others = (other for other in self._slots if other is not slot and other.device == slot.device)
        return any(other.may_claim and not other.waits_alone for other in others)

    def _count_at_work(self) -> None:
        """Leave the cores of slots that have nothing to do to those that have."""
        n_at_work = sum(not slot.has_nothing for slot in self._slots)
        if n_at_work != self._n_at_work:
            self._n_at_work = n_at_work
            self._tell_at_work(n_at_work)

    # What slots tell

    def _handle_event(self, slot: KnownSlot, event: dict[str, Any]) -> None:
        name = event.pop("event")
        self._watchdog.sign(slot.plan.number, time.monotonic(), is_batch=name == "batch")
        handle = getattr(self, f"_on_{name}", None)
        if handle is not None:
            handle(slot, event)
        text = describe(name, event, slot.plan.number, slot.device, self._study.spec.metric)
        if name not in _SILENT and (text or self._log.format == "json"):
            message = event.pop("message", "")
            self._say(slot, name, text or message, **event)
        if name in ("report", "trial_ended"):
            self._on_trial(event["trial"])
        if name in ("trial_ended", "trial_released", "result_kept"):
            self._give_up_trial(slot)
        self._grant()

    def _on_ready(self, slot: KnownSlot, event: dict[str, Any]) -> None:
        slot.device, slot.state, slot.was_ready, slot.deaths = event["device"], "idle", True, 0
        self._presence.tell()

    def _on_wants_trial(self, slot: KnownSlot, _: dict[str, Any]) -> None:
        slot.wants = True

    def _on_nothing(self, slot: KnownSlot, event: dict[str, Any]) -> None:
        if event["paused"] and not slot.is_paused:
            self._say(slot, "paused", f"slot {slot.plan.number} waits: {event['message']}")
        slot.is_paused, slot.may_claim, slot.has_nothing = event["paused"], False, True
        self._count_at_work()
        if self._idle_since is None:
            self._idle_since = time.monotonic()

    def _on_trial_started(self, slot: KnownSlot, event: dict[str, Any]) -> None:
        slot.held = claims.Claim(
            study_id=self._study.study_id,
            trial_id=event.pop("trial_id"),
            number=event["trial"],
            attempt=event["attempt"],
            token=uuid.UUID(event.pop("token")),
        )
        slot.state, slot.since, slot.is_paused = "running", time.monotonic(), False
        slot.told_at, slot.has_nothing = slot.since, False
        self._count_at_work()
        self._watchdog.start(slot.plan.number, slot.since)
        slot.last_trial = event["trial"]
        self._presence.tell()

    def _on_report(self, slot: KnownSlot, event: dict[str, Any]) -> None:
        slot.epoch = event["epoch"]
        now = time.monotonic()
        self._watchdog.report(slot.plan.number, now, event.get("seconds"))
        if self._log.format == "text" and not self._log.console.is_terminal and now - slot.told_at >= REPORTS_S:
            slot.told_at = now
            self._say(slot, "report", reported(event, slot.plan.number, self._study.spec.metric))

    def _on_out_of_memory(self, slot: KnownSlot, _: dict[str, Any]) -> None:
        self._watchdog.end(slot.plan.number)
        slot.waits_alone = True

    def _on_trial_ended(self, slot: KnownSlot, _: dict[str, Any]) -> None:
        slot.breaker.succeeded()
        self._n_ended += 1

    def _on_result_kept(self, *_: Any) -> None:
        self._n_ended += 1

    def _on_trial_released(self, slot: KnownSlot, event: dict[str, Any]) -> None:
        if event.get("failure") == "infrastructure":
            slot.failed_by = event["message"]

    def _on_broken(self, slot: KnownSlot, event: dict[str, Any]) -> None:
        slot.failed_by = event["message"]

    def _on_refused(self, _: KnownSlot, event: dict[str, Any]) -> None:
        if self._refusal is None and not self._is_draining:
            self._refusal = TunerError(event["message"], event["exit_code"])
            self._drain()

    def _on_done(self, slot: KnownSlot, event: dict[str, Any]) -> None:
        self._reason = event["message"]
        self._is_finished = True
        slot.may_claim, slot.has_nothing = False, True
        self._count_at_work()
        self._end_paused()

    def _give_up_trial(self, slot: KnownSlot) -> None:
        if self._alone.get(slot.device) is slot:
            del self._alone[slot.device]
        self._watchdog.end(slot.plan.number)
        slot.let_go("idle")
        self._presence.tell()

    # What becomes of slots that end

    def _handle_end(self, slot: KnownSlot) -> None:
        code = slot.process.exit_code()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        hang = self._watchdog.end(slot.plan.number)
        if slot.held is not None:
            why = claims.GivenBack(outcome="lost", reason=f"its process died ({how})", counts=not self._is_draining)
            if hang is not None:
                why = hang.given_back
                self._n_ended += hang.is_final
            self._presence.release(slot.held, why)
        self._give_up_trial(slot)
        slot.wants = False
        if self._is_draining or self._is_finished:
            slot.state = "ended"
        elif not slot.was_ready:
            self._handle_death_at_start(slot, how)
        elif hang is not None or (code == ExitCode.AGAIN and slot.failed_by is None):
            self._restart(slot)  # its last trial ended, and took the process along
        else:
            self._handle_failure(slot, slot.failed_by or how)
        self._grant()

    def _handle_death_at_start(self, slot: KnownSlot, how: str) -> None:
        slot.deaths += 1
        message = slot.failed_by or (
            f"slot {slot.plan.number} died {MAX_DEATHS} times in a row before it had a trial, last by {how}:"
            " see its output above"
        )
        if slot.failed_by is None and slot.deaths < MAX_DEATHS:
            self._say(slot, "slot_died", f"slot {slot.plan.number} died ({how}); starting it again")
            self._restart(slot)
            return
        slot.state = "ended"
        self._refusal = TunerError(message)
        self._drain()

    def _handle_failure(self, slot: KnownSlot, how: str) -> None:
        pause_s = slot.breaker.failed(slot.last_trial, time.monotonic() - slot.since)
        named = _named(slot)
        if not pause_s:
            self._say(slot, "slot_died", f"{named} died ({how}); starting it again")
            self._restart(slot)
            return
        slot.state = "broken"
        slot.restart_at = time.monotonic() + pause_s
        self._say(slot, "slot_broken", f"{named} failed again and again, last by {how}; pausing it for {pause_s:g} s")
        self._presence.tell()

    def _restart(self, slot: KnownSlot) -> None:
        slot.state, slot.failed_by, slot.last_trial, slot.since = "starting", None, None, time.monotonic()
        slot.prints_for = None
        slot.process = self._start(slot.plan)
        slot.process.send(self._config_of(slot))

    # Telling

    def _seen(self) -> WorkerSeen:
        slots = [
            SlotSeen(slot=slot.plan.number, device=slot.device, share=slot.plan.share, state=slot.state)
            for slot in self._slots
        ]
        return WorkerSeen(
            worker_id=self._id,
            study_id=self._study.study_id,
            name=self._config["worker"],
            slots=slots,
            versions=versions(),
            placement=None if self._placement is None else self._placement.fields(),
        )

    def _say_printed(self, slot: KnownSlot, line: str) -> None:
        trial = slot.prints_for
        text, slot.prints_for = prints.read(line, trial)
        if text is not None:
            shown = printed(text, slot.plan.number, trial) if self._log.format == "text" else text
            self._say(slot, OWN_PRINTS, shown, trial=trial)

    def _say(self, slot: KnownSlot, event: str, text: str, **fields: Any) -> None:
        held = slot.held
        now = {
            "slot": slot.plan.number,
            "trial": None if held is None else held.number,
            "attempt": None if held is None else held.attempt,
            "epoch": slot.epoch,
        }
        self._log.event(event, text, **{**now, **fields})

    def _raise_if_failed(self) -> None:
        """Raise TunerError if the study ended by its failures."""
        try:
            why = why_failed(self._engine, self._study)
        except StudyNotFoundError:
            return
        except (StorageError, SQLAlchemyError) as error:
            if not is_outage(error):
                raise
            return
        if why is not None:
            raise StudyFailedError(why)


def _asked(message: Message) -> ExitCode:
    return OF_SIGNAL[signal.Signals[message.text]]


def _named(slot: KnownSlot) -> str:
    return f"slot {slot.plan.number} ({slot.device})"
