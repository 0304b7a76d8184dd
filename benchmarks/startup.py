"""What `import tuner` and the commands that only look take from start to end, beside a bare `import optuna`.

    python benchmarks/startup.py [--storage URL] [--repeats 7]

Each turn runs all of them once, each in a process of its own, from compiled modules. `best` and `status` read a study
of 20 finished trials on a server that runs. Prints seconds as median, minimum and maximum, beside the 0.6 s that they
shall stay within on a machine on which nothing else runs, and how many times as long `import optuna` takes. Without
--storage, starts an embedded PostgreSQL for the time of the run.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from measuring import Ratios, Times, argument_parser, database, paired, print_machine, timed, write_ratios
from reading import Processes, a_study

from storage import PostgresStorage

TARGET_S = 0.6
N_TRIALS = 20
YARDSTICK = "import optuna"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--storage", default=os.environ.get("TUNER_STORAGE"))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    name = f"startup-{os.getpid()}"
    commands = {
        YARDSTICK: ["-c", "import optuna"],
        "import tuner": ["-c", "import tuner"],
        "tuner --help": ["-m", "tuner", "--help"],
        "tuner objectives": ["-m", "tuner", "objectives"],
        "tuner studies": ["-m", "tuner", "studies"],
        "tuner best": ["-m", "tuner", "best", name],
        "tuner status": ["-m", "tuner", "status", name],
    }
    times: Times = defaultdict(list)
    with database(options.storage) as url, tempfile.TemporaryDirectory() as directory:
        print_machine(url)
        study_id = a_study(url, name, N_TRIALS)
        processes = Processes(url, Path(directory))
        for turn in range(options.repeats + 1):  # the first compiles the modules
            for what, arguments in commands.items():
                with timed(times if turn else defaultdict(list), what):
                    processes.run(*arguments)
        PostgresStorage(url).delete_study(study_id)
    print(f"\n  {'seconds':<20}{'median':>9}{'min':>9}{'max':>9}{'wanted':>9}{'optuna /':>10}")
    ratios: Ratios = {}
    for what, ms in times.items():
        shown = "".join(f"{each / 1000:9.2f}" for each in (statistics.median(ms), min(ms), max(ms)))
        wanted = ""
        if what != YARDSTICK:
            ratios[f"{YARDSTICK} over {what}"] = its = paired(times[YARDSTICK], ms)
            wanted = f"{TARGET_S:9.2f}{statistics.median(its):10.2f}"
        print(f"  {what:<20}{shown}{wanted}")
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
