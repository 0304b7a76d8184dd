"""Learning curves as they are kept: recorded line by line, then packed into one file a task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Recorded:
    """One training of one point, as a line of a file tells it."""

    point: int
    repeat: int
    metric: list[float]
    loss: list[float]
    test: list[float]
    seconds: list[float]

    @classmethod
    def read(cls, directory: Path, task: str) -> list[Recorded]:
        """Return what the files of a task hold; a last line that was cut short is left out."""
        found = []
        for path in sorted(directory.glob(f"{task}.*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    found.append(cls(**json.loads(line)))
                except json.JSONDecodeError:
                    continue
        return found


@dataclass(frozen=True)
class Curves:
    """The trainings of a task: `point` and `repeat` (n,); the rest (n, epochs), NaN after a training diverged."""

    point: npt.NDArray[np.int32]
    repeat: npt.NDArray[np.int32]
    metric: Array
    loss: Array
    test: Array
    seconds: Array

    @classmethod
    def load(cls, path: Path) -> Curves:
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files})

    @property
    def has_seeds(self) -> bool:
        """Whether points were trained on several seeds, which a recording does last, with no point left out before.

        One that is split over machines may have come to its end in a part of the points alone.
        """
        points = np.sort(self.point[self.repeat == 0])
        return bool((self.repeat > 0).any()) and np.array_equal(points, np.arange(len(points)))

    def recorded(self) -> list[Recorded]:
        """Return the trainings one by one, as they were packed."""
        found = []
        for row, (point, repeat) in enumerate(zip(self.point.tolist(), self.repeat.tolist(), strict=True)):
            n_epochs = int(np.count_nonzero(~np.isnan(self.seconds[row])))
            curves = {
                name: getattr(self, name)[row, :n_epochs].tolist() for name in ("metric", "loss", "test", "seconds")
            }
            found.append(Recorded(point, repeat, **curves))
        return found


def pack(recorded: Sequence[Recorded], epochs: int, path: Path) -> str:
    """Write trainings into a file of `Curves`; returns a line about it."""
    ordered = sorted({(each.repeat, each.point): each for each in recorded}.items())
    rows = [each for _, each in ordered]

    def padded(curves: Sequence[Sequence[float]]) -> Array:
        filled = np.full((len(rows), epochs), np.nan, dtype=np.float32)
        for row, curve in zip(filled, curves, strict=True):
            row[: len(curve)] = curve
        return filled

    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        point=np.array([each.point for each in rows], dtype=np.int32),
        repeat=np.array([each.repeat for each in rows], dtype=np.int32),
        metric=padded([each.metric for each in rows]),
        loss=padded([each.loss for each in rows]),
        test=padded([each.test for each in rows]),
        seconds=padded([each.seconds for each in rows]),
    )
    return f"{path}: {len(rows)} trainings of {epochs} epochs, {path.stat().st_size / 1e6:.2f} MB"
