"""How fast a model is trained: the plain loop everybody writes, ours, and the bare step that neither can beat.

    python benchmarks/training_speed.py [--data-dir data] [--repeats 7] [--batch-sizes 32 512] [--device cpu]

The model is an MLP 784-300-100-10 on Fashion-MNIST, by SGD. Three sides, interleaved in one process:

  plain  a DataLoader without workers over torchvision's data set, `ToImage` and `ToDtype(float32, scale=True)` on each
         image, `loss.item()` on each batch
  ours   `tuner.training.fit`, an epoch without validation
  bare   the step alone, on one batch that is on the device already: no data handling at all

Prints seconds an epoch (median, minimum .. maximum) and the ratios, then what an epoch of an empty model costs with
its report and the pruner's decision: in a study in memory, which leaves the loop itself, and in one in PostgreSQL, on a
trial that is held, as a slot does it. On a CUDA device also ours with CUDA graphs, and trials an hour with 1, 2, 4 and
8 slots. `--data-dir` (or TUNER_TEST_DATA) is torchvision's root of FashionMNIST; without it, the images are random
ones of the same shape and number. Without --storage, starts an embedded PostgreSQL for what needs one.
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import optuna
import torch
from measuring import Ratios, argument_parser, database, paired, write_ratios
from optuna.samplers import RandomSampler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import FashionMNIST
from torchvision.transforms import v2
from workers import Ours

from storage import EmbeddedServer, open_engine
from storage.coordination import studies
from storage.database.sessions import Backoff
from storage.trials.curves import CurvePoint
from tuner.data import Split
from tuner.slot.checked_trial import CheckedTrial
from tuner.slot.reports import Reports
from tuner.training import Epoch, Options, Run, choose_device, fit
from tuner.training.steps import fastest

N_IMAGES = 8226
LEARNING_RATE = 0.01
EMPTY_EPOCHS = 100
N_FINISHED = 20
FINISHED = optuna.trial.create_trial(value=0.0, intermediate_values=dict.fromkeys(range(EMPTY_EPOCHS + 1), 1.0))

Side = Callable[[], None]


class Pixels(nn.Module):
    """Scales pixels of a batch to 0..1 where it is computed on, as ToDtype(scale=True) does for each image."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) / 255


def mlp(first: nn.Module, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(first, *layers).to(device)


def load(data_dir: Path | None, limit: int | None) -> tuple[Tensor, Tensor, str]:
    """Return images (n, 28, 28) in uint8, labels, and what they are."""
    try:
        found = FashionMNIST(data_dir, train=True, download=False) if data_dir is not None else None
    except RuntimeError:
        found = None
    if found is None:
        images, labels = torch.randint(256, (N_IMAGES, 28, 28), dtype=torch.uint8), torch.randint(10, (N_IMAGES,))
        what = "random images of the shape of Fashion-MNIST, which was not found"
    else:
        images, labels, what = found.data, found.targets, "Fashion-MNIST"
    return images[:limit], labels[:limit], what


class Images(Dataset[tuple[Tensor, int]]):
    """What torchvision's FashionMNIST does for an image, with the transform that its documentation shows."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index].numpy(), mode=None)), int(self.labels[index])


def plain(images: Tensor, labels: Tensor, batch_size: int, device: torch.device) -> Side:
    model = mlp(nn.Flatten(), device)
    optimizer = SGD(model.parameters(), lr=LEARNING_RATE)
    loss_fn = nn.CrossEntropyLoss()
    loader = DataLoader(Images(images, labels), batch_size=batch_size, shuffle=True, num_workers=0)

    def epoch() -> None:
        total = 0.0
        for inputs, targets in loader:
            inputs, targets = inputs.to(device), targets.to(device)
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.item()

    return epoch


def ours(
    images: Tensor, labels: Tensor, batch_size: int, device: torch.device, *, cuda_graphs: bool = False
) -> tuple[nn.Module, Side]:
    model = mlp(Pixels(), device)
    optimizer = fastest(SGD, model.parameters(), lr=LEARNING_RATE)
    rows = Split(images, labels).to(device)
    run = Run(options=Options(cuda_graphs=cuda_graphs), log=print)

    def epoch() -> None:
        fit(
            model,
            rows,
            optimizer=optimizer,
            loss=nn.CrossEntropyLoss(),
            metrics={},
            epochs=1,
            batch_size=batch_size,
            seed=0,
            run=run,
        )

    return model, epoch


def bare(images: Tensor, labels: Tensor, batch_size: int, device: torch.device) -> Side:
    model = mlp(nn.Identity(), device)
    optimizer = fastest(SGD, model.parameters(), lr=LEARNING_RATE)
    loss_fn = nn.CrossEntropyLoss()
    whole, rest = divmod(len(images), batch_size)
    batches = [(Pixels()(images[:n]).to(device), labels[:n].to(device)) for n in (batch_size, rest)]

    def step(inputs: Tensor, targets: Tensor) -> None:
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def epoch() -> None:
        for _ in range(whole):
            step(*batches[0])
        if rest > 1:
            step(*batches[1])
        if device.type == "cuda":
            torch.cuda.synchronize()

    return epoch


def measure(sides: dict[str, Side], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each side, which take turns, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            started_at = time.perf_counter()
            side()
            if repeat:
                seconds[name].append(time.perf_counter() - started_at)
    return seconds


def compare(images: Tensor, labels: Tensor, batch_size: int, device: torch.device, repeats: int) -> Ratios:
    sides = {
        "plain": plain(images, labels, batch_size, device),
        "ours": ours(images, labels, batch_size, device)[1],
        "bare": bare(images, labels, batch_size, device),
    }
    if device.type == "cuda":
        sides["graphs"] = ours(images, labels, batch_size, device, cuda_graphs=True)[1]
    seconds = measure(sides, repeats)
    for name, values in seconds.items():
        middle = statistics.median(values)
        ends = f"({min(values):.4f} .. {max(values):.4f})"
        print(f"  batch {batch_size:>4} {name:<8}{middle:9.4f} s {ends:<22}{len(images) / middle:12,.0f} samples/s")
    plain_ratios, bare_ratios = (paired(seconds[side], seconds["ours"]) for side in ("plain", "bare"))
    print(f"  batch {batch_size:>4} ratio: ours {spread(plain_ratios)} x plain, {spread(bare_ratios)} of the bare step")
    return {f"x plain, batch {batch_size}": plain_ratios, f"of the bare step, batch {batch_size}": bare_ratios}


def spread(ratios: list[float]) -> str:
    """Return the median and both ends."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"


class Empty(nn.Module):
    """As little of a model as there can be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight


class Nothing(Optimizer):
    """An optimizer that does nothing."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        super().__init__(params, {})

    def step(self, closure: object = None) -> None:
        """Leave the params as they are."""


@contextmanager
def trial_in_memory() -> Iterator[CheckedTrial]:
    """A running trial of a study in this process's memory, beside trials that the pruner compares it with."""
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner())
    study.add_trials(N_FINISHED * [FINISHED])
    yield CheckedTrial(study, study.ask()._trial_id, lambda: None)


@contextmanager
def trial_in_database(url: str) -> Iterator[CheckedTrial]:
    """The same in PostgreSQL: a trial that was claimed and is held, with the pruner, the storage and the thread that
    writes the reports of a slot."""
    name = f"overhead-{os.getpid()}"
    engine = open_engine(url)
    studies.create_study(engine, name, "minimize", {"version": 1}, {}, "value")
    engine.dispose()
    side = Ours(url, name, RandomSampler())
    side.study.add_trials(N_FINISHED * [FINISHED])
    try:
        trial_id = side.claim()._trial_id

        def write(point: CurvePoint) -> None:
            side.study._storage.report(trial_id, point)

        with Reports(write, lambda *_: None) as reports:
            yield CheckedTrial(side.study, trial_id, reports.check, reports, Backoff())
    finally:
        side.close()


def overhead(device: torch.device, trial: CheckedTrial, where: str) -> None:
    """Print what an epoch costs beside its steps: one batch of an empty model, a report and the pruner's decision."""
    ends: list[float] = []

    def on_epoch(epoch: Epoch) -> None:
        trial.report(epoch.train_loss, epoch.number)
        trial.should_prune()
        ends.append(time.perf_counter())

    model = Empty().to(device)
    rows = Split(torch.zeros(1, 1), torch.zeros(1)).to(device)
    fit(
        model,
        rows,
        rows,
        optimizer=Nothing(list(model.parameters())),
        loss=lambda outputs, _: outputs.sum(),
        metrics={},
        epochs=EMPTY_EPOCHS,
        batch_size=1,
        seed=0,
        on_epoch=on_epoch,
        run=Run(check=trial.check),
    )
    ms = [1000 * (after - before) for before, after in itertools.pairwise(ends)]
    print(f"  an epoch of an empty model with report and pruning {where}: {statistics.median(ms):.2f} ms", end="")
    print(f" ({min(ms):.2f} .. {max(ms):.2f})")


def trials_an_hour(slots: Sequence[int], trials: int) -> None:
    """Print how many trials of the digits an hour gives with so many slots on this device."""
    for count in slots:
        with tempfile.TemporaryDirectory() as directory:
            data_dir = Path(directory) / "data"
            arguments = ["run", "digits", "--trials", str(trials), "--workers", str(count), "--no-export"]
            started_at = time.perf_counter()
            try:
                subprocess.run(
                    [sys.executable, "-m", "tuner", *arguments, "--pruner", "none", "--data-dir", str(data_dir)],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    check=True,
                )
            finally:
                EmbeddedServer(data_dir).destroy()
            seconds = time.perf_counter() - started_at
        print(f"  {count} slots: {3600 * trials / seconds:8,.0f} trials an hour ({seconds:.1f} s with the start)")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("TUNER_TEST_DATA"))
    parser.add_argument("--storage", default=os.environ.get("TUNER_STORAGE"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--rows", type=int, help="use only so many images")
    parser.add_argument("--device")
    parser.add_argument("--slots", type=int, nargs="*", help="default: 1 2 4 8 on a CUDA device, else none")
    parser.add_argument("--trials", type=int, default=64, help="trials for each number of slots")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Of asking without optimize, which is what tuner does.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    device = choose_device(options.device)
    images, labels, what = load(options.data_dir, options.rows)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}")
    print(f"{len(images)} images, {what}; an epoch in seconds, median (minimum .. maximum) of {options.repeats}")
    ratios: Ratios = {}
    for batch_size in options.batch_sizes:
        ratios |= compare(images, labels, batch_size, device, options.repeats)
    with trial_in_memory() as trial:
        overhead(device, trial, "in memory")
    with database(options.storage) as url, trial_in_database(url) as trial:
        overhead(device, trial, "in PostgreSQL")
    trials_an_hour(
        options.slots if options.slots is not None else [1, 2, 4, 8] * (device.type == "cuda"), options.trials
    )
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
