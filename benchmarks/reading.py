"""What people and workers wait for when they read a study: Optuna's and optuna-dashboard's ways and ours, side by side.

    python benchmarks/reading.py [--storage URL] [--sizes 1000 10000 50000] [--repeats 5]

Fills a study of each size by bulk SQL with finished trials of 5 params and up to 20 steps, run by 100 workers. Then,
in turns, each time in a process of its own: `tuner best`, `status` and `studies` beside `optuna best-trial`, from
start to end; the data of the study's page, first and again, from a dashboard just started, `tuner dashboard` beside
optuna-dashboard on Optuna's RDBStorage; and the first reading by a new storage object, with what it adds to the
process's memory at its peak (on Linux), as a worker has it and with all intermediate values. Prints median, minimum
and maximum, and stock's median over ours. The stock side of a study of more than 1000 trials runs once. Without
--storage, starts an embedded PostgreSQL.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filling import fill
from measuring import (
    Ratios,
    Times,
    argument_parser,
    database,
    print_machine,
    print_sides,
    ratios_of_sides,
    timed,
    write_ratios,
)

from storage import PostgresStorage, open_engine, parse_url
from tuner.spec import Budget, ObjectiveSpec, Spec
from tuner.study.joining import create_study

ONCE_ABOVE = 1000  # trials

STOCK_COMMAND = "from optuna.cli import main; main()"
# optuna-dashboard on the server that ours runs on, so that what differs is the storage.
STOCK_DASHBOARD = """
import os, sys
from optuna.storages import RDBStorage
from optuna_dashboard import wsgi
from waitress.server import create_server
server = create_server(wsgi(RDBStorage(os.environ["OPTUNA_STORAGE"], skip_table_creation=True)), port=0)
print(f"dashboard on http://127.0.0.1:{server.effective_port}/; stock", file=sys.stderr, flush=True)
server.run()
"""
# Both sides import the same modules, and have a connection, before anything is measured. Not getrusage's peak, which
# starts at what the parent had.
FIRST_READ = """
import os, sys, time
from measuring import stock
from storage import PostgresStorage
def megabytes(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024 / 1e6
side, study_id = sys.argv[1], int(sys.argv[2])
storage = {"stock": stock, "ours": PostgresStorage}[side](os.environ["TUNER_STORAGE"])
storage.get_study_name_from_id(study_id)
before, start = megabytes("VmRSS"), time.perf_counter()
trials = storage.get_all_trials(study_id, deepcopy=False)
seconds, after = time.perf_counter() - start, megabytes("VmHWM")
for trial in trials:
    assert trial.intermediate_values
print(1000 * seconds, after - before, megabytes("VmHWM") - before)
"""


class Processes:
    """Runs Python as users do: from compiled modules, with the database in the environment."""

    def __init__(self, url: str, directory: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        path = (Path(__file__).parent, *os.environ.get("PYTHONPATH", "").split(os.pathsep))
        self._environment = {
            **environment,
            "OPTUNA_STORAGE": parse_url(url).render_as_string(hide_password=False),
            "PYTHONPATH": os.pathsep.join(map(str, filter(None, path))),
            "PYTHONPYCACHEPREFIX": str(directory / "compiled"),
            "TUNER_DATA_DIR": str(directory / "data"),
            "TUNER_STORAGE": url,
        }

    def run(self, *arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], env=self._environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout

    @contextmanager
    def dashboard(self, *arguments: str) -> Iterator[str]:
        """The URL of a dashboard that was just started."""
        process = subprocess.Popen(
            [sys.executable, *arguments], env=self._environment, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        try:
            said = ""
            for line in process.stderr:
                said += line
                if line.startswith("dashboard on "):
                    yield line.split()[2].rstrip(";")
                    return
            raise RuntimeError(f"the dashboard did not start: {said}")
        finally:
            process.terminate()
            process.communicate()


def a_study(url: str, name: str, n_trials: int) -> int:
    """Return the id of a study of so many finished trials."""
    spec = Spec(
        objective=ObjectiveSpec(name="benchmark", code_hash="0" * 64),
        metric="value",
        direction="minimize",
        budget=Budget(trials=n_trials),
        epochs=20,
    )
    engine = open_engine(url)
    study_id = create_study(engine, name, spec).study_id
    fill(engine, study_id, n_trials)
    engine.dispose()
    return study_id


def time_commands(processes: Processes, name: str, stock: Times, ours: Times, *, with_stock: bool) -> None:
    commands = {"best": ["best", name], "status": ["status", name], "studies": ["studies"]}
    for command, arguments in commands.items():
        with timed(ours, f"tuner {command}"):
            processes.run("-m", "tuner", *arguments)
    if with_stock:
        with timed(stock, "tuner best"):
            processes.run("-W", "ignore", "-c", STOCK_COMMAND, "best-trial", "--study-name", name)
        stock["tuner status"] = stock["tuner studies"] = stock["tuner best"]


def time_dashboard(processes: Processes, arguments: list[str], study_id: int, times: Times) -> None:
    with processes.dashboard(*arguments) as url:
        for what in ("dashboard's page, first", "dashboard's page, again"):
            with timed(times, what), urllib.request.urlopen(f"{url}api/studies/{study_id}?after=0") as response:  # noqa: S310
                response.read()


def time_first_read(processes: Processes, side: str, study_id: int, times: Times) -> None:
    figures = processes.run("-c", FIRST_READ, side, study_id).split()
    names = ("first read by a worker", "its memory, MB", "with intermediate values, MB")
    for name, figure in zip(names, figures, strict=True):
        times[name].append(float(figure))


def measure(url: str, n_trials: int, repeats: int, directory: Path) -> Ratios:
    name = f"reading-{n_trials}-{os.getpid()}"
    study_id = a_study(url, name, n_trials)
    processes = Processes(url, directory)
    stock: Times = defaultdict(list)
    ours: Times = defaultdict(list)
    for turn in range(repeats):
        with_stock = turn == 0 or n_trials <= ONCE_ABOVE
        time_commands(processes, name, stock, ours, with_stock=with_stock)
        time_dashboard(processes, ["-m", "tuner", "dashboard", "--port", "0"], study_id, ours)
        time_first_read(processes, "ours", study_id, ours)
        if with_stock:
            time_dashboard(processes, ["-c", STOCK_DASHBOARD], study_id, stock)
            time_first_read(processes, "stock", study_id, stock)
    print_sides(f"{n_trials} finished trials, ms", stock, ours)
    PostgresStorage(url).delete_study(study_id)
    took_time = {what: values for what, values in ours.items() if not what.endswith("MB")}  # a small study takes none
    return ratios_of_sides(stock, took_time, repeats, f"{n_trials} trials")


def warm_up(url: str, directory: Path) -> None:
    """Have all modules compiled, as an installation has them."""
    processes = Processes(url, directory)
    processes.run("-m", "tuner", "studies")
    processes.run("-c", "import measuring, optuna.cli, optuna_dashboard, waitress.server")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--storage", default=os.environ.get("TUNER_STORAGE"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 50_000])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    ratios: Ratios = {}
    with database(options.storage) as url, tempfile.TemporaryDirectory() as directory:
        print_machine(url)
        warm_up(url, Path(directory))
        for n_trials in options.sizes:
            ratios |= measure(url, n_trials, options.repeats, Path(directory))
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
