"""Every benchmark at its smallest, each in a process of its own, and whether any ratio fell.

    python -m benchmarks [--only NAME] [--turns 5] [--write] [--baseline FILE] [--out DIRECTORY] [-- ARGUMENTS]

A ratio is of two things that were measured in turns in one run, such as stock's time over ours, so that it means
something on another machine; the more the better. Prints a table: the median of the turns now, that of the baseline,
how far the turns lie apart (here or there, whichever is more), and the verdict. Ends with 1 if a ratio fell by more
than that or is gone, or if a benchmark failed. `--write` makes what was measured the baseline. `--out` keeps what each
benchmark printed, and ARGUMENTS are given to each, beside its own. On a machine on which something else runs, verdicts
are of that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import baseline
from benchmarks.baseline import Ratio

HERE = Path(__file__).parent
SMALLEST = {
    "startup": "--repeats {turns}",
    "reading": "--sizes 100 --repeats {turns}",
    "storage_scale": "--sizes 100 --repeats {turns} --firsts {turns}",
    "worker_load": "--workers 2 --seconds 2 --rounds {turns} --history 10",
    "report_load": "--workers 2 --history 10 --seconds 2 --every 0.1 --reports 3 --watch 0.5",
    "training_speed": "--rows 64 --repeats {turns} --batch-sizes 32 --device cpu",
    "compile_speed": "--models mlp --repeats {turns} --steps 2 --backend aot_eager --device cpu",
    "threads": "--smallest --repeats {turns}",
    "search_speed": "--repeats {turns} --trials 2 --epochs 1 --data-dir {directory}",
    "search_live": "--seeds {turns} --trials 2 --epochs 1 --seconds 600 --data-dir {directory}",
    "retraining": "--data-dir {directory} --data-sets digits --seeds {turns} --trials 1 --epochs 2 --rows 200",
    "main_job": "--runs {turns} --trials 2 --epochs 1",
    "on_gpu": "--device cpu --smallest --parts tests main steps speed slots --out {directory}/on_gpu --minutes 20",
}
"""By benchmark, how little of it there can be."""


def measured(name: str, turns: int, arguments: list[str], out: Path) -> dict[str, Ratio] | None:
    """Run a benchmark and return its ratios; None if it failed."""
    file = out / f"{name}.json"
    own = SMALLEST[name].format(turns=turns, directory=out).split()
    with (out / f"{name}.txt").open("w") as printed:
        done = subprocess.run(
            [sys.executable, HERE / f"{name}.py", *own, "--ratios", file, *arguments], stdout=printed, check=False
        )
    if done.returncode != 0:
        return None
    return {what: Ratio.of(its) for what, its in json.loads(file.read_text()).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=list(SMALLEST), action="append", metavar="NAME", help="may be given again")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--baseline", type=Path, default=HERE / "baseline.json")
    parser.add_argument("--write", action="store_true", help="make what was measured the baseline")
    parser.add_argument("--out", type=Path, help="keep there what each benchmark printed")
    parser.add_argument("arguments", nargs="*", help="for each benchmark, after --")
    options = parser.parse_args()
    before = baseline.read(options.baseline)
    is_good = True
    print(baseline.line("benchmark", "ratio", "now", "baseline", "spread", "verdict"), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        for name in options.only or SMALLEST:
            ratios = measured(name, options.turns, options.arguments, out)
            if ratios is None:
                is_good = False
                print(f"{name:<16}failed", flush=True)
                continue
            lines, nothing_fell = baseline.compared(name, ratios, before.get(name, {}))
            print(*lines, sep="\n", flush=True)
            if options.write:
                baseline.write(options.baseline, {name: ratios})
            is_good &= nothing_fell or options.write
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
