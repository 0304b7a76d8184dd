"""What compiling a training step gains, and what it takes: as it is, the model alone compiled, and the whole step.

    python benchmarks/compile_speed.py [--models digits mlp cnn] [--repeats 15] [--steps 200] [--device cpu]

Models: the digits' MLP (64-256-128-10, batch norm, dropout, AdamW, batch 64), an MLP 784-300-100-10 (SGD, batch 64)
and a CNN of two convolutions with 16 and 32 channels (AdamW, batch 64). Three sides, interleaved in one process:

  eager  the step of `tuner.training`, as it is
  model  the usual loop with `torch.compile(model)`, as `--compile` did up to 2026-11
  whole  `--compile`: loss, gradients and update as one

Each model has two processes, one after the other: the first finds an empty cache of compiled code, the second what the
first has left. Prints milliseconds a step in the second (median, minimum .. maximum), the ratio to eager, and seconds
of compiling in both. A third one, with an empty cache again, has the whole step compiled by a process beside it, as a
trial on a CPU has (`tuner/training/compile_aside.py`), and prints how long it stood still then, how long that process
was at work, and by how much it slowed the steps. With `--cpu-time`, for a machine that others use too, the sides' steps
are timed by the process's CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import argument_parser, paired, write_ratios
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tuner.data import Batch
from tuner.training import choose_device
from tuner.training.checked_step import By
from tuner.training.compile_aside import Aside, can_compile_aside
from tuner.training.steps import Step, fastest

BATCH = 64
WARM_UP = 5
EPOCH = 100
"""Steps of an epoch beside a process that compiles."""

Side = Callable[[], Any]


def digits() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = [nn.BatchNorm1d(64)]
    for before, after in ((64, 256), (256, 128)):
        layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(128, 10)), torch.rand(BATCH, 64)


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(*layers), torch.rand(BATCH, 784)


def cnn() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 10)), torch.rand(BATCH, 1, 28, 28)


MODELS = {"digits": digits, "mlp": mlp, "cnn": cnn}


def built(name: str, device: torch.device) -> tuple[nn.Module, Optimizer, Batch]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.to(device)
    kind: Any = SGD if name == "mlp" else AdamW
    batch = Batch(inputs.to(device), torch.arange(BATCH, device=device) % 10)
    return model, fastest(kind, model.parameters(), lr=1e-3), batch


def eager(name: str, device: torch.device, _: By) -> tuple[Side, float]:
    model, optimizer, batch = built(name, device)
    step = Step(model, nn.CrossEntropyLoss(), optimizer, device)
    return lambda: step(batch), 0.0


def model_alone(name: str, device: torch.device, by: By) -> tuple[Side, float]:
    model, optimizer, batch = built(name, device)
    compiled, loss = torch.compile(model, backend=by.backend), nn.CrossEntropyLoss()

    def step() -> None:
        loss(compiled(batch.inputs), batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    started_at = time.perf_counter()
    step()
    return step, time.perf_counter() - started_at


def whole(name: str, device: torch.device, by: By) -> tuple[Side, float]:
    model, optimizer, batch = built(name, device)
    step = Step(model, nn.CrossEntropyLoss(), optimizer, device, compiled=by, log=lambda line: print(line, flush=True))
    compiling = step.compiling
    assert compiling is not None
    for _ in range(2):  # the first step of a second epoch compiles
        compiling.start_epoch()
        for _ in range(WARM_UP):
            step(batch)
        compiling.end_epoch()
    gain = compiling.gain()
    if gain is None:
        raise SystemExit(f"{name}: nothing was compiled")
    return lambda: step(batch), gain.compile_s


def aside(name: str, device: torch.device, by: By) -> dict[str, float]:
    """Train in epochs of some steps until a process beside this one has compiled, and then this one."""
    model, optimizer, batch = built(name, device)
    beside = Aside(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
    step = Step(model, nn.CrossEntropyLoss(), optimizer, device, compiled=by, aside=beside, log=sys.exit)
    compiling = step.compiling
    assert compiling is not None
    started_at = time.perf_counter()
    while (gain := compiling.gain()) is None:
        compiling.start_epoch()
        for _ in range(EPOCH):
            step(batch)
        compiling.end_epoch()
    assert gain.slowed_s is not None
    worked_s = time.perf_counter() - started_at - gain.compile_s
    return {"still_s": gain.compile_s, "worked_s": worked_s, "slowed_s": gain.slowed_s}


SIDES = {"eager": eager, "model": model_alone, "whole": whole}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return seconds of compiling and milliseconds a step of each side, which take turns."""
    device, by = choose_device(options.device), By(backend=options.backend, mode=options.mode)
    # The whole step first, as compiling it forgets what was compiled before.
    made = {side: make(name, device, by) for side, make in reversed(SIDES.items())}
    clock = time.process_time if options.cpu_time else time.perf_counter
    ms: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side, times in ms.items():
            step = made[side][0]
            started_at = clock()
            for _ in range(options.steps):
                step()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            times.append(1000 * (clock() - started_at) / options.steps)
    return {"compile_s": {side: seconds for side, (_, seconds) in made.items()}, "ms": ms}


def in_process_of_its_own(name: str, cache: str, *how: str) -> dict[str, Any]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    arguments = [sys.executable, __file__, *sys.argv[1:], "--measure", name, *how]
    done = subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    for line in lines:
        print(f"  {line}")
    found: dict[str, Any] = json.loads(last)
    return found


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device")
    parser.add_argument("--backend", default="inductor", choices=("inductor", "aot_eager"))
    parser.add_argument("--mode", default="default", choices=("default", "max-autotune"))
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--measure", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--aside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, by = choose_device(options.device), By(backend=options.backend, mode=options.mode)
    if options.aside:
        print(json.dumps(aside(options.measure, device, by)))
        return
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    name = platform.processor() or platform.machine()
    print(f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}", end="")
    print(f", {device}, {options.backend}, {options.mode}", flush=True)
    ratios: dict[str, list[float]] = {}
    for model in options.models:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (in_process_of_its_own(model, cache) for _ in range(2))
        of_eager = statistics.median(warm["ms"]["eager"])
        for side, ms in warm["ms"].items():
            middle = statistics.median(ms)
            line = f"  {model:<8}{side:<8}{middle:9.3f} ms ({min(ms):.3f} .. {max(ms):.3f})  x {of_eager / middle:.2f}"
            if side != "eager":
                line += f"  compiled in {cold['compile_s'][side]:.1f} s, again {warm['compile_s'][side]:.1f} s"
                ratios[f"{model}, {side}, x faster than eager"] = paired(warm["ms"]["eager"], ms)
            print(line, flush=True)
        if can_compile_aside(device, by):
            with tempfile.TemporaryDirectory() as cache:
                found = in_process_of_its_own(model, cache, "--aside")
            line = f"  {model:<8}aside   stood still for {found['still_s']:.1f} s, after {found['worked_s']:.1f} s"
            print(f"{line} of compiling beside it that slowed its steps by {found['slowed_s']:.1f} s", flush=True)
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
