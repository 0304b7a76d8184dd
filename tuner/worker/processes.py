"""The processes of a worker's slots, and the one that they are forked from."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tuner import cores
from tuner.caches import keep_compiled_apart
from tuner.slot.loading import DataSource
from tuner.slot.nursery import can_fork
from tuner.worker.known_slot import KnownSlot
from tuner.worker.nursery import Nursery, Running
from tuner.worker.slot_process import Inbox, Message, SlotProcess
from tuner.worker.slots import SlotPlan


class Slots:
    """The slots of a worker, started before the study is known so that importing torch overlaps with the rest.

    So does importing `objective`, an installed one's name or `path/to/file.py:NAME`; None if only the study knows it,
    which is then to be told by `load`. Both are imported once, and slots are forked from the process that did: one of
    its own, or this one if it `imports_here`, which then says when it `has_imported`. Where that cannot be, each slot
    imports them. Several slots on the CPU share the memory of the data, too: they wait for what `share_data` is told.
    """

    def __init__(
        self,
        plans: Sequence[SlotPlan],
        objective: str | None,
        worker: str,
        data_dir: Path,
        *,
        imports_here: bool = False,
        forks: bool = True,
    ) -> None:
        """`worker` is this worker's name, and `data_dir` where others that share the cores look for it.

        Without `forks` each slot imports for itself, as where this process is somebody's program or notebook, with
        threads and devices of its own.
        """
        forks = forks and can_fork()
        keep_compiled_apart()
        self._seat = cores.Seat(worker, len(plans), data_dir)
        self._share = partial(cores.share, worker, len(plans), data_dir)
        self._plans = plans
        self._objective = objective or ""
        self._directory = current_directory()
        self._nursery: Nursery | None = None
        self._source: DataSource | None = None
        self._with_data: Nursery | None = None  # for slots on the CPU
        self._has_asked_for_data = threading.Event()
        self._n_on_cpu = sum(plan.device == "cpu" for plan in plans)
        self._is_told = threading.Lock()
        self.inbox: Inbox = queue.SimpleQueue()
        self.all: list[KnownSlot] = []
        if forks and not imports_here:
            self._nursery = Nursery.importing(self.environment(), self._directory, self._tell_printed)
        if objective is not None and not (forks and imports_here):
            self.load(objective)

    def load(self, objective: str) -> None:
        """Import the objective, and start the slots."""
        self._objective = objective
        if self._nursery is not None:
            self._nursery.load(objective)
        self._start_all()

    def has_imported(self) -> None:
        """Start the slots, if they wait for this process to import the objective."""
        if not self.all:
            self._nursery = Nursery.copied()
            self._start_all()

    def environment(self) -> dict[str, str]:
        """Return what slots find in their environment as they import, apart from their devices."""
        return self._plans[0].shared_environment(self._share())

    def start(self, plan: SlotPlan) -> SlotProcess:
        """Start the process of a slot."""
        return SlotProcess(plan, self._start, self._give_up_data, self.inbox)

    def share_data(self, source: DataSource) -> None:
        """Have data loaded once for all slots on the CPU, which are forked from the process that did, or load them."""
        if self._nursery is None or self._n_on_cpu < 2 or source == self._source:
            self._has_asked_for_data.set()
        else:
            # In a thread: it waits for the objective to be imported.
            threading.Thread(target=self._load_data, args=(self._nursery, source), daemon=True).start()

    def again(self) -> Slots:
        """Start all slots anew, for another study of the objective."""
        for slot in self.all:
            slot.process.kill()
        self._has_asked_for_data.clear()
        self.inbox = queue.SimpleQueue()
        self._start_all()
        return self

    def tell_at_work(self, number: int) -> None:
        """Have the slots that are at work share the cores, of which there are so many."""
        self._seat.tell(max(1, number))

    def close(self) -> None:
        """Kill what still runs, as on the way out of an error, and leave the cores to others."""
        for slot in self.all:
            slot.process.kill()
        self._has_asked_for_data.set()
        for nursery in (self._with_data, self._nursery):
            if nursery is not None:
                nursery.close()
        self._seat.close()

    def _start_all(self) -> None:
        self.all = [KnownSlot(plan=plan, process=self.start(plan), device=plan.shown) for plan in self._plans]

    def _start(self, plan: SlotPlan, streams: tuple[int, int, int]) -> Running:
        for nursery, does in ((self._for_cpu(plan), "loads the data of"), (self._nursery, "imports")):
            if nursery is not None:
                forked = nursery.fork(plan.own_environment, streams, partial(self._tell_unsuited, does))
                if forked is not None:
                    return forked
        stdin, stdout, stderr = streams
        return subprocess.Popen(
            # -P: no file of the current directory is taken for a module of ours, or of torch.
            [sys.executable, "-P", "-m", "tuner.slot.start", self._objective],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=plan.environment(self._share()),
            cwd=self._directory,  # that of the first ones: an objective may have changed this one's
            start_new_session=True,  # a Ctrl-C at the terminal reaches the worker alone, which drains its slots
        )

    def _tell_printed(self, line: str) -> None:
        self.inbox.put(Message(kind="stderr", slot=0, text=line))

    def _for_cpu(self, plan: SlotPlan) -> Nursery | None:
        """Return what forks slots that share the data, once it is known; None if this one shares none."""
        if plan.device != "cpu" or self._nursery is None or self._n_on_cpu < 2:
            return None
        self._has_asked_for_data.wait()
        return self._with_data

    def _load_data(self, nursery: Nursery, source: DataSource) -> None:
        try:
            if self._with_data is not None:
                self._with_data.close()
            environment = next(plan.own_environment for plan in self._plans if plan.device == "cpu")
            refused = partial(self._tell_unsuited, "imports")
            self._with_data = nursery.with_data(source, environment, self._tell_printed, refused)
            self._source = source
        finally:
            self._has_asked_for_data.set()

    def _give_up_data(self) -> None:
        """Load no data any more, as a slot is to end that waits for them."""
        if self._with_data is not None:
            self._with_data.kill()

    def _tell_unsuited(self, does: str, why: str) -> None:
        if self._is_told.acquire(blocking=False):  # once: it is never let go
            self.inbox.put(Message(kind="note", text=f"each slot {does} {self._objective} itself: {why}"))


def current_directory() -> str:
    """Return where slots are started."""
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was deleted, and libraries of torch's would not load there
        return os.sep
