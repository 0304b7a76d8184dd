"""How fast models are trained on a device, one way of training beside the other: a part of `on_gpu.py`.

    python benchmarks/gpu_speed.py [--device cuda] [--models digits-mlp mlp-32] [--seconds 1] [--json FILE]

For each model the plain loop (a shuffled DataLoader of tensors, `.to(device)`, `loss.item()` on each batch), the bare
step on one batch that is on the device already, and `tuner.training.fit` in several ways: as it is, by CUDA graphs, in
other precisions, compiled, and for images in another layout or without searching for the fastest convolutions. Each
trains for about `--seconds` after its first epoch, which is told apart: it holds capturing, compiling and searching.
Prints microseconds a step (median of the epochs), samples a second, and how busy the device was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from tuner.data import Split
from tuner.training import Epoch, Options, Run, choose_device, fit
from tuner.training.steps import fastest

MAX_EPOCHS = 200


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with its data's shape, batch size and optimizer."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rows: int
    batch_size: int
    optimizer: type[Optimizer] = SGD
    sides: tuple[str, ...] = ("plain", "bare", "ours", "graphs", "bf16", "bf16 graphs")

    def tensors(self, rows: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(rows, *self.shape, generator=generator), torch.randint(10, (rows,), generator=generator)


def digits_mlp() -> nn.Module:
    hidden = [nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def mlp() -> nn.Module:
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def cnn(channels: int) -> nn.Module:
    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]

    wide = 2 * channels
    return nn.Sequential(*block(1, channels), *block(channels, wide), nn.Flatten(), nn.Linear(wide * 49, 10))


IMAGES = ("plain", "bare", "ours", "graphs", "tf32", "bf16", "bf16 graphs", "contiguous", "contiguous graphs")
IMAGES += ("bf16 contiguous graphs", "no search", "no search graphs")
COMPILED = ("compile", "compile graphs")
CASES = [
    Case(name="digits-mlp", build=digits_mlp, shape=(64,), rows=1078, batch_size=64, optimizer=AdamW),
    Case(name="mlp-32", build=mlp, shape=(784,), rows=8226, batch_size=32),
    Case(name="mlp-512", build=mlp, shape=(784,), rows=8226, batch_size=512),
    Case(
        name="cnn-16",
        build=lambda: cnn(16),
        shape=(1, 28, 28),
        rows=8226,
        batch_size=128,
        optimizer=AdamW,
        sides=IMAGES,
    ),
    Case(
        name="cnn-128",
        build=lambda: cnn(128),
        shape=(1, 28, 28),
        rows=8226,
        batch_size=128,
        optimizer=AdamW,
        sides=IMAGES,
    ),
]


@contextmanager
def usage(device: torch.device) -> Iterator[list[int]]:
    """Collect in how many per cent of the time some kernel ran, as the driver tells it every 50 ms."""
    seen: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            seen.append(torch.cuda.utilization(device))

    thread = threading.Thread(target=watch, daemon=True)
    if device.type == "cuda":
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join()


def of_loop(epoch: Callable[[], None], seconds: float) -> list[float]:
    """Return the seconds of each epoch, the first and those of `seconds` after it."""
    taken: list[float] = []
    end = None
    while end is None or (time.perf_counter() < end and len(taken) < MAX_EPOCHS) or len(taken) < 3:
        started_at = time.perf_counter()
        epoch()
        taken.append(time.perf_counter() - started_at)
        end = time.perf_counter() + seconds if end is None else end
    return taken


def plain(case: Case, device: torch.device, seconds: float) -> list[float]:
    model = case.build().to(device)
    optimizer = case.optimizer(model.parameters(), lr=0.01)
    loss_fn = nn.CrossEntropyLoss()
    loader = DataLoader(TensorDataset(*case.tensors(case.rows)), batch_size=case.batch_size, shuffle=True)

    def epoch() -> None:
        total = 0.0
        for inputs, targets in loader:
            inputs, targets = inputs.to(device), targets.to(device)
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.item()

    return of_loop(epoch, seconds)


def bare(case: Case, device: torch.device, seconds: float) -> list[float]:
    model = case.build().to(device)
    optimizer = fastest(case.optimizer, model.parameters(), lr=0.01)
    loss_fn = nn.CrossEntropyLoss()
    inputs, targets = (tensor.to(device) for tensor in case.tensors(case.batch_size))

    def epoch() -> None:
        for _ in range(-(-case.rows // case.batch_size)):
            loss_fn(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return of_loop(epoch, seconds)


def ours(case: Case, device: torch.device, seconds: float, how: str) -> tuple[list[float], list[str]]:
    """Return the seconds of each epoch, and what was logged."""
    words = how.split()
    precisions = [word for word in words if word in ("bf16", "fp16", "tf32")]
    options = Options(
        precision=precisions[0] if precisions else "fp32",  # type: ignore[arg-type]  # one of them
        compile="compile" in words,
        cuda_graphs="graphs" in words,
        channels_last=False if "contiguous" in words else None,
    )
    torch.backends.cudnn.benchmark = "search" not in words
    model = case.build().to(device)
    optimizer = fastest(case.optimizer, model.parameters(), lr=0.01)
    taken: list[float] = []
    lines: list[str] = []
    ends: list[float] = []

    class Enough(Exception):  # noqa: N818 - no error
        pass

    def on_epoch(epoch: Epoch) -> None:
        taken.append(epoch.train_s)
        ends.append(ends[0] if ends else time.perf_counter() + seconds)
        if len(taken) >= 3 and (time.perf_counter() > ends[0] or len(taken) == MAX_EPOCHS):
            raise Enough

    with suppress(Enough):
        fit(
            model,
            Split(*case.tensors(case.rows)).to(device),
            optimizer=optimizer,
            scheduler=CosineAnnealingLR(optimizer, MAX_EPOCHS),
            loss=nn.CrossEntropyLoss(),
            metrics={},
            epochs=MAX_EPOCHS,
            batch_size=case.batch_size,
            seed=0,
            on_epoch=on_epoch,
            run=Run(options=options, log=lines.append),
        )
    return taken, lines


def measure(case: Case, device: torch.device, seconds: float, side: str) -> dict[str, Any]:
    torch.manual_seed(0)
    lines: list[str] = []
    with usage(device) as busy:
        if side == "plain":
            taken = plain(case, device, seconds)
        elif side == "bare":
            taken = bare(case, device, seconds)
        else:
            taken, lines = ours(case, device, seconds, side.replace("ours", ""))
    later = taken[1:]
    steps = -(-case.rows // case.batch_size)
    return {
        "model": case.name,
        "side": side,
        "first_epoch_s": round(taken[0], 4),
        "step_us": round(1e6 * statistics.median(later) / steps, 1),
        "step_us_spread": [round(1e6 * extreme / steps, 1) for extreme in (min(later), max(later))],
        "samples_per_s": round(case.rows / statistics.median(later)),
        "epochs": len(taken),
        "busy_percent": round(statistics.mean(busy[len(busy) // 3 :])) if busy else None,
        "log": lines,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device")
    parser.add_argument("--models", nargs="*", default=[case.name for case in CASES])
    parser.add_argument("--sides", nargs="*", help="default: those of each model")
    parser.add_argument("--compile", nargs="*", default=[], metavar="MODEL", help="models to compile as well")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = choose_device(options.device)
    found: list[dict[str, Any]] = []
    for case in (case for case in CASES if case.name in options.models):
        sides = options.sides or [*case.sides, *(COMPILED if case.name in options.compile else ())]
        for side in sides:
            found.append(measured := measure(case, device, options.seconds, side))
            low, high = measured["step_us_spread"]
            print(
                f"{case.name:<11}{side:<24}{measured['step_us']:>9.1f} us a step ({low:.1f} .. {high:.1f})"
                f"{measured['samples_per_s']:>12,} samples/s, first epoch {measured['first_epoch_s']:.2f} s,"
                f" busy {measured['busy_percent']} %",
                *measured["log"],
                flush=True,
            )
            if options.json is not None:  # now and not at the end, which may not come
                options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
