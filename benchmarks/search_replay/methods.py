"""The methods that are compared: a sampler with a rule each."""

from __future__ import annotations

from collections.abc import Callable

import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler

from benchmarks.search_replay.rules import AnyOf, Calibrated, FromEta, Until
from benchmarks.search_replay.simulator import Method, Promotion
from storage.optuna_storage.rules import N_STARTUP, Percentile, Rungs, standard_rungs
from tuner.study.tpe import ScipyTPESampler


def random(seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


def tpe(seed: int) -> BaseSampler:
    return ScipyTPESampler(seed=seed)


def tpe_of(**settings: object) -> Callable[[int], BaseSampler]:
    return lambda seed: ScipyTPESampler(seed=seed, **settings)  # type: ignore[arg-type]


def sharper(seed: int) -> BaseSampler:
    return ScipyTPESampler(seed=seed, gamma="sqrt")


def later(seed: int) -> BaseSampler:
    return ScipyTPESampler(seed=seed, n_startup_trials=30)


def gp(seed: int) -> BaseSampler:
    return GPSampler(seed=seed, deterministic_objective=False)


TENTH_AND_THIRD = (0.1, 0.3)
THREE = (0.1, 0.3, 0.6)
DOUBLE = (0.1, 0.2, 0.4, 0.8)


def started_rungs(shares: tuple[float, ...], epochs: int) -> Rungs:
    """Return rungs that let one of two go on, and begin as the product's do."""
    return Rungs.at(shares, epochs, eta=2.0, n_startup=N_STARTUP)


METHODS: dict[str, Method] = {
    "random": Method(sampler=random),
    "tpe": Method(sampler=tpe),
    # Our median is asked after all epochs but the last; a plain loop of Optuna's after each.
    "tpe + stock median": Method(sampler=tpe, pruner=lambda _: optuna.pruners.MedianPruner(), asks_last=True),
    "tpe + median": Method(sampler=tpe, rule=Percentile()),
    "tpe + percentile 25": Method(sampler=tpe, rule=Percentile(25.0)),
    "tpe + stock asha": Method(
        sampler=tpe, pruner=lambda _: optuna.pruners.SuccessiveHalvingPruner(reduction_factor=3), asks_last=True
    ),
    "tpe + hyperband": Method(
        sampler=tpe,
        pruner=lambda epochs: optuna.pruners.HyperbandPruner(1, epochs, reduction_factor=3),
        asks_last=True,
    ),
    "tpe + rungs": Method(sampler=tpe, scales=standard_rungs),
    "tpe + two rungs": Method(sampler=tpe, scales=lambda epochs: Rungs.at(TENTH_AND_THIRD, epochs)),
    "tpe + two rungs from three": Method(sampler=tpe, scales=lambda epochs: FromEta.at(TENTH_AND_THIRD, epochs)),
    "tpe + two rungs, 1 in 2": Method(sampler=tpe, scales=lambda epochs: Rungs.at(TENTH_AND_THIRD, epochs, eta=2.0)),
    "tpe + rungs from the first trial and epoch on": Method(
        sampler=tpe, scales=lambda epochs: Rungs.at((0.0, 0.1, 0.2, 0.4, 0.8), epochs, eta=2.0)
    ),
    "tpe + two rungs, in doubt on": Method(
        sampler=tpe, scales=lambda epochs: Rungs.at(TENTH_AND_THIRD, epochs), doubts=1.0
    ),
    "tpe + three rungs": Method(sampler=tpe, scales=lambda epochs: Rungs.at(THREE, epochs)),
    "tpe + three rungs from three": Method(sampler=tpe, scales=lambda epochs: FromEta.at(THREE, epochs)),
    "tpe + four rungs": Method(sampler=tpe, scales=lambda epochs: Rungs.at((0.0, *THREE), epochs)),
    "tpe + rungs from the first trial on": Method(sampler=tpe, scales=lambda epochs: Rungs.at(DOUBLE, epochs, eta=2.0)),
    "tpe + two rungs, at the first epoch": Method(sampler=tpe, scales=lambda epochs: Rungs.at((0.0, 0.3), epochs)),
    "tpe + calibrated": Method(sampler=tpe, rule=Calibrated()),
    "tpe + calibrated 0.9": Method(sampler=tpe, rule=Calibrated(0.9)),
    "tpe + calibrated 0.5": Method(sampler=tpe, rule=Calibrated(0.5)),
    "tpe + two rungs or calibrated": Method(
        sampler=tpe, scales=lambda epochs: AnyOf((Rungs.at(TENTH_AND_THIRD, epochs), Calibrated()))
    ),
    "tpe + early rungs": Method(sampler=tpe, scales=lambda epochs: started_rungs(DOUBLE[:2], epochs)),
    "tpe + rungs up to 0.4": Method(sampler=tpe, scales=lambda epochs: started_rungs(DOUBLE[:3], epochs)),
    "tpe + rungs up to 0.8": Method(sampler=tpe, scales=lambda epochs: started_rungs(DOUBLE, epochs)),
    "tpe + rungs up to 0.8 or median": Method(
        sampler=tpe, scales=lambda epochs: AnyOf((started_rungs(DOUBLE, epochs), Percentile()))
    ),
    "tpe + rungs up to 0.8, then median": Method(
        sampler=tpe, scales=lambda epochs: Until(5, started_rungs(DOUBLE, epochs), Percentile())
    ),
    "tpe + promotion": Method(sampler=tpe, promotes=Promotion(TENTH_AND_THIRD)),
    "tpe + promotion, three rungs": Method(sampler=tpe, promotes=Promotion(THREE)),
    "tpe + promotion, unseen": Method(sampler=tpe, promotes=Promotion(TENTH_AND_THIRD), shows_paused=False),
    "tpe + one epoch, then the best": Method(sampler=tpe, promotes=Promotion((0.0,), eta=8.0)),
    "tpe by itself + median": Method(sampler=tpe_of(multivariate=False), rule=Percentile()),
    "tpe of groups + median": Method(sampler=tpe_of(group=True), rule=Percentile()),
    # The best 0.25 sqrt(n) of n trials are what it learns from instead of the best tenth; the product's, beside rungs.
    "sharper tpe + stock median": Method(
        sampler=sharper, pruner=lambda _: optuna.pruners.MedianPruner(), asks_last=True
    ),
    "sharper tpe + rungs": Method(sampler=sharper, scales=standard_rungs),
    "sharper tpe + rungs up to 0.8": Method(sampler=sharper, scales=lambda epochs: started_rungs(DOUBLE, epochs)),
    "sharper tpe + early rungs": Method(sampler=sharper, scales=lambda epochs: started_rungs(DOUBLE[:2], epochs)),
    # A random trial takes rungs less time than the median: as many of them as take as long.
    "later tpe + early rungs": Method(sampler=later, scales=lambda epochs: started_rungs(DOUBLE[:2], epochs)),
    "later tpe + rungs up to 0.4": Method(sampler=later, scales=lambda epochs: started_rungs(DOUBLE[:3], epochs)),
    "random + median": Method(sampler=random, rule=Percentile()),
    "random + stock median": Method(sampler=random, pruner=lambda _: optuna.pruners.MedianPruner(), asks_last=True),
    "random + median, asked last": Method(sampler=random, rule=Percentile(), asks_last=True),
    "random + rungs": Method(sampler=random, scales=standard_rungs),
    "random + two rungs": Method(sampler=random, scales=lambda epochs: Rungs.at(TENTH_AND_THIRD, epochs)),
    "random + two rungs from three": Method(sampler=random, scales=lambda epochs: FromEta.at(TENTH_AND_THIRD, epochs)),
    "random + three rungs": Method(sampler=random, scales=lambda epochs: Rungs.at(THREE, epochs)),
    "random + calibrated": Method(sampler=random, rule=Calibrated()),
    "random + promotion": Method(sampler=random, promotes=Promotion(TENTH_AND_THIRD)),
    "gp + median": Method(sampler=gp, rule=Percentile()),
    "gp + rungs": Method(sampler=gp, scales=standard_rungs),
}

OF_RULES = tuple(name for name in METHODS if name.startswith("random"))
"""Those that learn nothing of the space, which need no surrogate."""
