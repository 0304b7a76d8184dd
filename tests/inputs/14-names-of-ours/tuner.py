"""An objective's file with tuner's own name; it means tuner by it, and starts a process that imports it by its own."""

import argparse
import multiprocessing

from tuner import TunerError

START = argparse.ArgumentParser().parse_args()


def half(number):
    assert START is not None
    return number / 2


def objective(trial):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(half, (trial.suggest_int("x", 3, 3),))


assert issubclass(TunerError, Exception)
