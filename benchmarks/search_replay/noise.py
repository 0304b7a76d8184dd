"""How many finalists, on how many seeds each, are worth their device time: what `tuner confirm` gains.

    python -m benchmarks.search_replay.noise [--tables DIRECTORY] [--tasks digits ..]

The points that were trained on three seeds are taken for their mean, and a seed's departure from it for the noise.
A search of 30 trials sees each once and has its best; confirming runs the `top` of them on `seeds` seeds each, with the
one that is there, and chooses by the mean. Shown is the share of the regret of the search's own choice that is gone
then, by the means, next to the trainings that it cost: 1 would be the best of the 30 itself. A search that has learnt
where to look sees points alike, so each task is told twice: of all points, and of the best third of them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.search_replay.curves import Curves
from benchmarks.search_replay.tasks import TASKS

N_TRIALS, N_SEARCHES = 30, 4000
TOPS = (1, 2, 3, 5, 8)
SEEDS = (2, 3, 5, 8)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pool:
    """Points of a task: `means` of their best values, to be minimized, and seeds' departures from them."""

    means: Floats
    noise: Floats

    @classmethod
    def of(cls, curves: Curves, *, maximize: bool, share: float) -> Pool:
        """Take the best `share` of the points that have several seeds, and all of these."""
        bests = np.fmax.reduce(curves.metric, axis=1) if maximize else np.fmin.reduce(curves.metric, axis=1)
        values = (-bests if maximize else bests).astype(float)
        several = [point for point in np.unique(curves.point) if np.sum(curves.point == point) > 1]
        of_point = [values[curves.point == point] for point in several]
        of_point = [found for found in of_point if np.isfinite(found).all()]
        of_point = sorted(of_point, key=lambda found: float(found.mean()))[: round(share * len(of_point))]
        # A departure from a mean of n is too small by the share that it has of the mean itself.
        apart = [(found - found.mean()) * np.sqrt(len(found) / (len(found) - 1)) for found in of_point]
        return cls(np.array([found.mean() for found in of_point]), np.concatenate(apart))

    @property
    def ratio(self) -> float:
        """Return the spread of seeds over that of the points' means."""
        return float(self.noise.std() / self.means.std())


def gained(pool: Pool, top: int, seeds: int, random: np.random.Generator) -> tuple[float, float, float]:
    """Return the share of the regret that confirming takes away, and the regrets before and after."""
    chosen = np.argsort(random.random((N_SEARCHES, len(pool.means))), axis=1)[:, :N_TRIALS]
    means = pool.means[chosen]
    seen = means + random.choice(pool.noise, means.shape)
    order = np.argsort(seen, axis=1)[:, :top]
    finalists = np.take_along_axis(means, order, axis=1)
    again = finalists[:, :, None] + random.choice(pool.noise, (*finalists.shape, seeds - 1))
    told = (np.take_along_axis(seen, order, axis=1) + again.sum(axis=2)) / seeds
    after = np.take_along_axis(finalists, told.argmin(axis=1)[:, None], axis=1)[:, 0]
    best = means.min(axis=1)
    before, left = float((finalists[:, 0] - best).mean()), float((after - best).mean())
    return 1 - left / before if before else 0.0, before, left


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", type=Path, default=Path(__file__).parent / "tables")
    parser.add_argument("--tasks", nargs="+", default=None, choices=list(TASKS))
    options = parser.parse_args(arguments)
    there = [name for name in TASKS if (options.tables / f"{name}.npz").exists()]
    for name in options.tasks or there:
        curves = Curves.load(options.tables / f"{name}.npz")
        if not curves.has_seeds:
            print(f"\n{name}: was not recorded to its end")
            continue
        for share in (1.0, 1 / 3):
            pool = Pool.of(curves, maximize=TASKS[name].build().direction == "maximize", share=share)
            print(f"\n{name}, {len(pool.means)} points: a seed's spread is {pool.ratio:.2f} of that of the points")
            print("  top  " + "".join(f"{seeds} seeds (trainings)  " for seeds in SEEDS))
            for top in TOPS[1:]:
                shares = [(gained(pool, top, seeds, np.random.default_rng(0))[0], top * (seeds - 1)) for seeds in SEEDS]
                print(f"  {top:>3}  " + "".join(f"{share:7.2f} ({cost:>3})".ljust(21) for share, cost in shares))


if __name__ == "__main__":
    main()
