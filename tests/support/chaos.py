"""Workers under faults, and the log of what they were told had been done: it lies outside of the database."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from command import wait_for
from gate import Gate
from pooler import Pooler
from processes import slots_of

from storage import EmbeddedServer

OBJECTIVE = """
import threading
from pathlib import Path

STEPS = 12

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    with Path(__file__).with_name("params").open("a", buffering=1) as notes:
        notes.write(f"{trial.number} {x!r}\\n")
    for step in range(1, STEPS + 1):
        threading.Event().wait(0.15)
        trial.report(x + step, step)
        if trial.number % 13 == 5 and step == 3:
            raise ValueError("as some do")
        if trial.should_prune():
            import optuna
            raise optuna.TrialPruned
    return x + STEPS
"""


class Machine:
    """A machine with a worker on it that is started again whenever it dies, as a cluster's scheduler would."""

    def __init__(self, number: int, database: str, directory: Path) -> None:
        self.gate = Gate(database)
        self.log = directory / f"worker-{number}.log"
        self.exits: list[tuple[int, bool, bool]] = []
        """The exit codes of the workers that ended, whether they had joined, and whether a slot had been ready."""
        self._log_start = 0
        self._directory = directory
        self._data_dir = directory / f"machine-{number}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the worker."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("TUNER_", "PG"))}
        own = {
            "TUNER_STORAGE": self.gate.url.render_as_string(hide_password=False),
            "TUNER_DATA_DIR": str(self._data_dir),
        }
        objective = f"{self._directory / 'mine.py'}:objective"
        command = ["worker", "s", "--slots", "2", "--objective", objective, "--log-format", "json"]
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [str(Path(sys.executable).with_name("tuner")), *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**clean, **own},
            )

    def look(self) -> bool:
        """Start the worker again if it died; whether it has ended well."""
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return False
        log = self.log.read_bytes()[self._log_start :]
        self.exits.append((code, b'"event": "study"' in log, b'"event": "ready"' in log))
        if code == 0:
            return True
        self.start()
        return False

    def pids(self, who: str) -> list[int]:
        """The process ids of the worker, or of its slots."""
        assert self._process is not None
        pid = self._process.pid
        if who == "worker":
            return [pid] if self._process.poll() is None else []
        with suppress(OSError):
            return slots_of(pid)
        return []

    def events(self) -> list[dict[str, Any]]:
        """What the workers of this machine logged, each with whether it is whole."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def close(self) -> None:
        """Kill the worker; its slots end with it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.gate.close()


class Chaos:
    """Injects faults, one after the other, chosen from a seed."""

    def __init__(
        self,
        seed: int,
        machines: list[Machine],
        server: EmbeddedServer,
        longest_s: float,
        pooler: Pooler | None = None,
        among: Collection[str] = (),
    ) -> None:
        """A partition or a stop lasts `longest_s` seconds at most; the faults are `among` these, or all there are."""
        self.injected: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._machines = machines
        self._server = server
        self._pooler = pooler
        self._among = among
        self._longest_s = longest_s
        self._healing: list[threading.Timer] = []

    def inject(self) -> None:
        """Inject a fault into one of the machines, or into the server; it counts if there was something to hit."""
        faults: dict[str, Callable[[Machine], bool]] = {
            "SIGKILL of a slot": lambda machine: self._signal(machine, "slot", signal.SIGKILL),
            "SIGKILL of a worker": lambda machine: self._signal(machine, "worker", signal.SIGKILL),
            "loss of a machine": self._lose,
            "SIGTERM of a worker": lambda machine: self._signal(machine, "worker", signal.SIGTERM),
            "SIGSTOP of a slot": lambda machine: self._freeze(machine, "slot"),
            "SIGSTOP of a worker": lambda machine: self._freeze(machine, "worker"),
            "restart of PostgreSQL": lambda _: self._restart(),
            "partition": self._partition,
        }
        if (pooler := self._pooler) is not None:
            faults["restart of the pooler"] = lambda _: pooler.restart() is None
        name = self._random.choice([name for name in faults if not self._among or name in self._among])
        self.injected[name] += faults[name](self._random.choice(self._machines))

    def heal(self) -> None:
        """End all faults that last."""
        for timer in self._healing:
            timer.cancel()
            timer.function()

    def _signal(self, machine: Machine, who: str, number: signal.Signals) -> bool:
        pids = machine.pids(who)
        if pids:
            with suppress(ProcessLookupError):
                os.kill(self._random.choice(pids), number)
        return bool(pids)

    def _lose(self, machine: Machine) -> bool:
        pids = (*machine.pids("worker"), *machine.pids("slot"))
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(pids)

    def _freeze(self, machine: Machine, who: str) -> bool:
        pids = machine.pids(who)
        if not pids:
            return False
        pid = self._random.choice(pids)

        def thaw() -> None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        self._later(thaw)
        return True

    def _partition(self, machine: Machine) -> bool:
        drop = self._random.random() < 0.5
        machine.gate.shut()
        self._later(lambda: machine.gate.open(drop=drop))
        return bool(machine.pids("worker"))

    def _restart(self) -> bool:
        pid = self._server.status().pid
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGQUIT)  # PostgreSQL's "immediate" shutdown
            wait_for(lambda: not self._server.status().running, "the server is gone")
        self._server.start()
        return True

    def _later(self, end: Callable[[], None]) -> None:
        timer = threading.Timer(self._random.uniform(1, self._longest_s), end)
        timer.daemon = True
        timer.start()
        self._healing.append(timer)


def run_under_faults(machines: list[Machine], chaos: Chaos, seconds: float, watch: Callable[[], None]) -> None:
    """Inject faults for so long, then let the workers end; `watch` is called again and again."""
    for machine in machines:
        machine.start()
    for machine in machines:
        wait_for(lambda machine=machine: machine.log.read_text().count("trial_started") > 0, "it runs trials", 180)
    ends_at, pause = time.monotonic() + seconds, threading.Event()
    while time.monotonic() < ends_at:
        chaos.inject()
        pause.wait(random.uniform(0.5, 2.5))
        watch()
        for machine in machines:
            machine.look()
    chaos.heal()
    done: set[int] = set()

    def all_done() -> bool:
        watch()
        done.update(number for number, machine in enumerate(machines) if number not in done and machine.look())
        return len(done) == len(machines)

    wait_for(all_done, "the workers end once the faults do", 300 + seconds)
