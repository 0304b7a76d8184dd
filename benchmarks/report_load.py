"""What the database makes of many workers that report at their own pace, as training ones do.

    python benchmarks/report_load.py [--storage URL] [--workers 100] [--seconds 300] [--every 1] [--max-connections N]
        [--pooler URL]

Each worker does what a real one with one slot does, and trains nothing: it claims a trial, suggests 5 params, reports
every `--every` seconds and asks whether to prune, which is not followed, and after `--reports` of them tells the result
and claims the next; it renews its lease, and its supervisor tells that it is there and, with `--watch`, looks how the
study goes every so many seconds. Slot and supervisor have connections of their own, as their processes have; here they
are threads of a few processes. The study has `--history` finished trials to begin with.

Prints the reports that were made a second; percentiles of each call in milliseconds, waits included; the most
connections at a time; the CPU time of server and workers a second, and the log written for each report; how often a
call met a server that was away or full, after which it waits and tries again; and the workers that gave up, or that
never got in. Without --storage, starts an embedded PostgreSQL for the time of the run, which lets in --max-connections,
as many as all workers may take unless given.

With --pooler URL, the address of a PgBouncer in front of the database of --storage, the workers connect there, and its
CPU time is printed too if it runs on this host.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import random
import statistics
import threading
import time
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

import optuna
from filling import N_PARAMS, fill
from measuring import Ratios, Times, argument_parser, database, print_machine, timed, write_ratios
from optuna.samplers import RandomSampler
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from storage import PostgresStorage, StorageError, open_engine
from storage.coordination import claims, records, standings, studies, workers
from storage.database.engine import CONNECTIONS_PER_PROCESS
from storage.database.errors import LeaseLostError
from storage.database.sessions import Backoff, Sessions
from storage.optuna_storage.pruning import IndexedPercentilePruner

BUDGET = standings.Budget(trials=10**9, timeout_s=None, max_failures=0, max_attempts=3)
PROCESSES_PER_WORKER = 2  # the supervisor and its slot
CALLS = ("report", "should_prune", "claim", "params", "tell", "renew", "seen", "watch")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What each worker is to do, for how long."""

    url: str
    study: str
    seconds: float
    every_s: float
    reports: int
    watch_s: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one worker: its calls' times in milliseconds, the errors it met, and the one that ended it."""

    times: Times
    errors: Counter[str]
    got_in: bool
    died_of: str | None


class Slot:
    """Runs trials that train nothing, and renews the lease of the one that runs."""

    def __init__(self, load: Load, number: int, started: threading.Event, stop: threading.Event) -> None:
        self.times: Times = defaultdict(list)
        self.errors: Counter[str] = Counter()
        self.got_in = False
        self.died_of: str | None = None
        self._load = load
        self._name = f"load:{number}"
        self._started = started
        self._stop = stop
        self._held: claims.Claim | None = None
        retry = Backoff(stop=stop, notice=lambda error: self.errors.update([_one_line(error)]))
        self._storage = PostgresStorage(load.url, application_name=f"tuner {self._name}", retry=retry)

    def run(self, ready: Queue[str]) -> None:
        """Run a trial to warm up, wait for the start, then run trials at the load's pace until the stop."""
        try:
            study_id = self._storage.get_study_id_from_name(self._load.study)
            pruner = IndexedPercentilePruner(self._storage, study_id, 50.0)
            study = optuna.load_study(
                study_name=self._load.study, storage=self._storage, sampler=RandomSampler(), pruner=pruner
            )
            self._run(study, self._claim(study), reports=2, every_s=0.0)
            trial = self._claim(study)
            self.got_in = True
            ready.put(self._name)
            self._started.wait()
            # As if the workers had been at it for long: neither their reports nor their claims come all at once.
            self._stop.wait(random.uniform(0, self._load.every_s))
            reports = random.randint(1, self._load.reports)
            while not self._stop.is_set():
                try:
                    self._run(study, trial, reports, self._load.every_s)
                    reports = self._load.reports
                    if not self._stop.is_set():
                        trial = self._claim(study)
                except LeaseLostError as error:
                    self.errors[_one_line(error)] += 1
                    trial = self._claim(study)
        except StorageError as error:
            if not self._stop.is_set():  # else it only gave up waiting
                self.died_of = _one_line(error)
        finally:
            self._storage.engine.dispose()

    def renew(self) -> None:
        """Renew the lease, as a slot does on a thread of its own, until the stop."""
        sessions = Sessions(self._storage.engine)
        while not self._stop.wait(random.uniform(0.9, 1.0) * claims.LEASE_S / 3):
            held = self._held
            if held is not None:
                try:
                    with timed(self.times, "renew"):
                        claims.renew(sessions, held)
                except StorageError as error:
                    self.errors[_one_line(error)] += 1

    def _claim(self, study: optuna.Study) -> optuna.Trial:
        with timed(self.times, "claim"):
            held = claims.claim(self._storage.sessions, study._study_id, BUDGET, claims.Holder(worker=self._name))
        assert isinstance(held, claims.Claim)
        self._storage.hold(held)
        self._held = held
        trial = optuna.Trial(study, held.trial_id)
        with timed(self.times, "params"):
            for number in range(N_PARAMS):
                trial.suggest_float(f"x{number + 1}", 0.0, 1.0)
        return trial

    def _run(self, study: optuna.Study, trial: optuna.Trial, reports: int, every_s: float) -> None:
        held = self._held
        assert held is not None
        due = time.monotonic()
        for step in range(1, reports + 1):
            due += every_s
            if self._stop.wait(max(0.0, due - time.monotonic())):
                return
            with timed(self.times, "report"):
                trial.report(random.random(), step)
            with timed(self.times, "should_prune"):
                trial.should_prune()
        with timed(self.times, "tell"):
            self._storage.set_trial_user_attrs(held.trial_id, {"seconds": 0.0, "seed": held.number})
            study.tell(trial, random.random())
        self._held = None
        self._storage.let_go(held)


class Supervisor:
    """Tells that its worker is there, and looks how the study goes."""

    def __init__(self, load: Load, number: int, stop: threading.Event) -> None:
        self.times: Times = defaultdict(list)
        self.errors: Counter[str] = Counter()
        self._load = load
        self._number = number
        self._stop = stop
        self._engine = open_engine(load.url)

    def run(self) -> None:
        """Do so until the stop; a call that meets no database is left out, as the next one comes soon."""
        sessions, study = Sessions(self._engine), None
        worker_id, slot = uuid.uuid4(), workers.SlotSeen(slot=0, device="cpu", share=1.0, state="running")
        watch_s = self._load.watch_s or math.inf
        seen_due = time.monotonic() + random.uniform(0, workers.SEEN_EVERY_S)
        watch_due = time.monotonic() + watch_s
        while not self._stop.wait(max(0.0, min(seen_due, watch_due) - time.monotonic())):
            now = time.monotonic()
            try:
                study = study or studies.find_study(self._engine, self._load.study)
                if now >= seen_due:
                    seen_due += workers.SEEN_EVERY_S
                    seen = workers.WorkerSeen(
                        worker_id=worker_id,
                        study_id=study.study_id,
                        name=f"load:{self._number}",
                        slots=[slot],
                        versions={"tuner": "0", "torch": "0"},
                    )
                    with timed(self.times, "seen"):
                        workers.seen(sessions, seen)
                if now >= watch_due:
                    watch_due = max(watch_due + watch_s, now)
                    with timed(self.times, "watch"):
                        studies.count_states(self._engine, study.study_id)
                        records.best_trial(self._engine, study.study_id, "minimize")
            except (StorageError, SQLAlchemyError) as error:
                self.errors[_one_line(error)] += 1
                seen_due, watch_due = max(seen_due, now + 1), max(watch_due, now + 1)
        self._engine.dispose()


def serve(
    load: Load, numbers: range, ready: Queue[str], go: Event, results: Queue[tuple[list[Outcome], float]]
) -> None:
    """Be the process of some workers; put what became of them and the CPU seconds that they took."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    started, stop = threading.Event(), threading.Event()
    slots = [Slot(load, number, started, stop) for number in numbers]
    supervisors = [Supervisor(load, number, stop) for number in numbers]
    threads = [threading.Thread(target=slot.run, args=(ready,)) for slot in slots]
    threads += [threading.Thread(target=slot.renew) for slot in slots]
    threads += [threading.Thread(target=supervisor.run) for supervisor in supervisors]
    for thread in threads:
        thread.start()
    go.wait()
    before = time.process_time()
    for each in (*slots, *supervisors):
        each.errors.clear()
        each.times.clear()
    started.set()
    stop.wait(load.seconds)
    cpu_s = time.process_time() - before
    stop.set()
    for thread in threads:
        thread.join()
    outcomes = [
        Outcome(
            times={**slot.times, **supervisor.times},
            errors=slot.errors + supervisor.errors,
            got_in=slot.got_in,
            died_of=slot.died_of,
        )
        for slot, supervisor in zip(slots, supervisors, strict=True)
    ]
    results.put((outcomes, cpu_s))


@dataclass(frozen=True, kw_only=True)
class Server:
    """What was seen of the server over the time of the run."""

    connections: int
    cpu_s: float | None
    pooler_cpu_s: float | None
    host_cpu_s: float | None
    wal_bytes: float


class Observer:
    """Watches the server on a connection of its own."""

    def __init__(self, engine: Engine) -> None:
        self._conn = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self._most = 0
        self._cpu_s = _server_cpu_s(self._conn.scalar(_POSTMASTER))
        self._pooler_cpu_s = _pooler_cpu_s()
        self._host_cpu_s = _host_cpu_s()
        self._lsn = self._conn.scalar(_LSN)

    def look(self) -> None:
        """Count the connections of clients, but for our own."""
        self._most = max(self._most, self._conn.scalar(_CONNECTIONS) or 0)

    def end(self) -> Server:
        """Return what was seen since the beginning."""
        cpu_s = _server_cpu_s(self._conn.scalar(_POSTMASTER))
        wal_bytes = self._conn.scalar(
            text("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), :since)"), {"since": self._lsn}
        )
        self._conn.close()
        return Server(
            connections=self._most,
            cpu_s=_difference(cpu_s, self._cpu_s),
            pooler_cpu_s=_difference(_pooler_cpu_s(), self._pooler_cpu_s),
            host_cpu_s=_difference(_host_cpu_s(), self._host_cpu_s),
            wal_bytes=float(wal_bytes or 0),
        )


_CONNECTIONS = text(
    "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
)
_LSN = text("SELECT pg_current_wal_lsn()::text")
_POSTMASTER = text("SELECT pg_backend_pid()")


def _server_cpu_s(backend: int | None) -> float | None:
    """Return the CPU seconds of all processes, dead ones too, of a backend's server; None if it is not on this host."""
    if not Path(f"/proc/{backend}/comm").exists() or Path(f"/proc/{backend}/comm").read_text() != "postgres\n":
        return None
    stats = {int(path.name): _stat(path) for path in Path("/proc").iterdir() if path.name.isdecimal()}
    assert backend is not None
    postmaster = int(stats[backend][1])
    ticks = sum(map(int, stats[postmaster][13:15]))
    for stat in stats.values():
        if int(stat[1]) == postmaster:
            ticks += sum(map(int, stat[11:13]))
    return (ticks + sum(map(int, stats[postmaster][11:13]))) / os.sysconf("SC_CLK_TCK")


def _pooler_cpu_s() -> float | None:
    """Return the CPU seconds of all poolers on this host; None if there is none."""
    names = [path.parent for path in Path("/proc").glob("[0-9]*/comm") if _text(path) == "pgbouncer\n"]
    return sum(sum(map(int, _stat(name)[11:13])) for name in names) / os.sysconf("SC_CLK_TCK") if names else None


def _host_cpu_s() -> float | None:
    """Return the CPU seconds of all that runs on this host; None where the system does not tell."""
    try:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    except FileNotFoundError:
        return None
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def _difference(end: float | None, start: float | None) -> float | None:
    return None if end is None or start is None else end - start


def _stat(process: Path) -> list[str]:
    """Return a process's state, parent and so on; zeros for one that has ended meanwhile."""
    return _text(process / "stat").rpartition(")")[2].split() or ["0"] * 20


def _text(of_process: Path) -> str:
    try:
        return of_process.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def run(load: Load, engine: Engine, n_workers: int, n_processes: int, start_within_s: float) -> Ratios:
    """Run the workers, print what became of them, and return how many of the reports that each wanted it made."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["report_load"])
    ready, results, go = context.Queue(), context.Queue(), context.Event()
    shares = [range(first, n_workers, n_processes) for first in range(min(n_processes, n_workers))]
    arguments = (ready, go, results)
    processes = [context.Process(target=serve, args=(load, share, *arguments), daemon=True) for share in shares]
    for process in processes:
        process.start()
    began = time.monotonic()
    n_ready = 0
    while n_ready < n_workers and (left_s := began + start_within_s - time.monotonic()) > 0:
        try:
            ready.get(timeout=left_s)
        except queue.Empty:
            break
        n_ready += 1
    print(f"  {n_ready} of {n_workers} workers ready after {time.monotonic() - began:.0f} s", flush=True)
    observer = Observer(engine)
    go.set()
    until = time.monotonic() + load.seconds
    pause = threading.Event()
    while time.monotonic() < until:
        observer.look()
        pause.wait(min(1.0, max(0.0, until - time.monotonic())))
    server = observer.end()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    outcomes = [outcome for its, _ in found for outcome in its]
    show(outcomes, load, server, sum(cpu_s for _, cpu_s in found))
    made = [len(outcome.times.get("report", [])) * load.every_s / load.seconds for outcome in outcomes]
    return {f"reports made of those wanted, {n_workers} workers": made} if load.every_s else {}


def show(outcomes: list[Outcome], load: Load, server: Server, workers_cpu_s: float) -> None:
    pooled = {call: [ms for outcome in outcomes for ms in outcome.times.get(call, [])] for call in CALLS}
    n_reports = max(1, len(pooled["report"]))
    wanted = f" of {len(outcomes) / load.every_s:.1f}" if load.every_s else ""
    print(f"  {'reports/s':<14}{len(pooled['report']) / load.seconds:>10.1f}{wanted}")
    print(f"  {'ms':<14}{'p50':>10}{'p99':>10}{'max':>10}{'calls':>10}")
    for call, values in pooled.items():
        if len(values) > 1:
            hundredths = statistics.quantiles(values, n=100, method="inclusive")
            print(f"  {call:<14}{hundredths[49]:>10.2f}{hundredths[98]:>10.2f}{max(values):>10.2f}{len(values):>10}")
    took = {
        "server": server.cpu_s,
        "pooler": server.pooler_cpu_s,
        "workers": workers_cpu_s,
        "whole host": server.host_cpu_s,
    }
    cores = ", ".join(f"{who} {s / load.seconds:.2f}" for who, s in took.items() if s is not None)
    load_average = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"  {'load average':<14}    {load_average}")
    print(f"  {'connections':<14}{server.connections:>10} at most")
    print(f"  {'CPU, cores':<14}    {cores}")
    print(f"  {'log':<14}{server.wal_bytes / 1024 / n_reports:>10.2f} KB a report")
    errors = sum((outcome.errors for outcome in outcomes), Counter[str]())
    print(f"  {'waits':<14}{errors.total():>10}")
    died = [outcome.died_of for outcome in outcomes if outcome.died_of is not None]
    never = sum(not outcome.got_in and outcome.died_of is None for outcome in outcomes)
    print(f"  {'gave up':<14}{len(died):>10}, never got in {never}", flush=True)
    for message, count in (errors + Counter(died)).most_common(3):
        print(f"    {count} x {message[:300]}", flush=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--storage", default=os.environ.get("TUNER_STORAGE"))
    parser.add_argument("--workers", type=int, nargs="+", default=[100])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two reports of a worker")
    parser.add_argument("--reports", type=int, default=20, help="reports of a trial")
    parser.add_argument("--watch", type=float, default=0.0, help="seconds between a supervisor's looks; 0 for none")
    parser.add_argument("--history", type=int, default=10_000, help="finished trials that the study starts with")
    parser.add_argument("--max-connections", type=int, help="of the embedded server (default: enough)")
    parser.add_argument("--pooler", help="URL by which the workers connect")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--start-within", type=float, default=300.0, help="seconds to wait until all workers are in")
    options = parser.parse_args()
    if options.pooler and not options.storage:
        parser.error("--pooler stands in front of the database of --storage: name that too")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    enough = CONNECTIONS_PER_PROCESS * PROCESSES_PER_WORKER * max(options.workers) + 20
    ratios: Ratios = {}
    with database(options.storage, options.max_connections or enough) as url:
        engine = open_engine(url)
        print_machine(url)
        for n_workers in options.workers:
            name = f"report-load-{os.getpid()}-{n_workers}"
            study = studies.create_study(engine, name, "minimize", {"version": 1}, {}, "value")
            fill(engine, study.study_id, options.history)
            load = Load(
                url=options.pooler or url,
                study=name,
                seconds=options.seconds,
                every_s=options.every,
                reports=options.reports,
                watch_s=options.watch,
            )
            print(f"{n_workers} workers for {options.seconds:g} s, a report each {options.every:g} s:", flush=True)
            ratios |= run(load, engine, n_workers, options.processes, options.start_within)
            optuna.delete_study(study_name=name, storage=PostgresStorage(url))
        engine.dispose()
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
