"""How many threads a slot computes with: whose word counts, and what its trials' own steps tell of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import optuna
import pytest
import torch
from attempts import Signs, attempt

from tuner import cores
from tuner.slot import threads
from tuner.slot.threads import Threads, fewest, measured
from tuner.spec import TrainingSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have two threads from when torch was imported."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for name in cores.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_AT_IMPORT", (2, None))
    yield
    torch.set_num_threads(before)


def four() -> int:
    return 4


def measured_with(most: int, step_s: Callable[[int, int], float]) -> tuple[dict[int, float], list[int]]:
    """What is found where a step with some threads, and the how manieth it is, takes so long; and what was tried."""
    measuring, tried = measured(most), []
    try:
        number = next(measuring)
        while True:
            tried.append(number)
            number = measuring.send(step_s(number, len(tried)))
    except StopIteration as end:
        return end.value, tried


def take_steps(of: Threads, wanted: Callable[[], bool]) -> None:
    """Take steps of no work until what is wanted has come."""
    for _ in range(100_000):
        of.batch()
        if wanted():
            return
    raise AssertionError("it did not come within 100,000 steps")


@pytest.mark.parametrize(
    ("step_ms", "wanted"),
    [
        ({1: 8.0, 2: 4.4, 4: 2.5, 8: 1.5}, 8),
        ({1: 8.0, 2: 4.4, 4: 4.2, 8: 4.3}, 2),  # more is hardly faster
        ({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.9}, 1),
        ({1: 1.0, 2: 20.0, 4: 30.0, 8: 50.0}, 1),  # busy neighbours
        ({1: 900.0, 2: 500.0, 4: 300.0, 8: 200.0}, 8),
    ],
)
def test_the_fewest_threads_are_chosen_with_which_steps_take_no_longer(step_ms: dict[int, float], wanted: int) -> None:
    seconds, tried = measured_with(8, lambda number, _: step_ms[number] / 1000)
    assert fewest(seconds) == wanted
    assert set(tried) >= {8, wanted}


def test_measuring_takes_half_a_second_unless_steps_are_slow() -> None:
    spent = [0.0]

    def step_s(number: int, _: int) -> float:
        spent[0] += 0.001 / number
        return 0.001 / number

    measured_with(64, step_s)
    assert spent[0] < 2 * threads.MEASURE_S
    _, tried = measured_with(2, lambda number, _: 3.0 / number)
    assert tried == [2, 2, 2, 2, 1]  # warming up, and each once


def test_threads_that_would_take_much_longer_still_are_not_tried() -> None:
    _, tried = measured_with(64, lambda number, _: 1.0 / number)
    assert set(tried) == {64, 32, 16}


def test_the_first_steps_with_a_number_of_threads_do_not_count() -> None:
    seen: set[int] = set()

    def step_s(number: int, so_far: int) -> float:
        is_first = so_far > threads.WARM_UP_STEPS and number not in seen
        if is_first:
            seen.add(number)
        return 0.025 if is_first else 0.001

    seconds, _ = measured_with(2, step_s)
    assert seconds == pytest.approx({1: 0.001, 2: 0.001})


def test_a_trial_is_measured_by_its_steps_and_what_was_chosen_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "BLOCK_S", 1e-6)
    told: list[str] = []
    of = Threads(four, log=told.append)
    of.start()
    assert torch.get_num_threads() == 4
    take_steps(of, lambda: bool(told))
    chosen = torch.get_num_threads()
    assert told[0].startswith(f"computes with {chosen} thread")
    assert "ms with 4" in told[0]
    of.start()
    assert torch.get_num_threads() == 4  # another trial, with params of its own


def test_the_steps_of_a_training_are_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "BLOCK_S", 0.0)
    monkeypatch.setattr(threads, "AGAIN_S", 1e9)
    told: list[str] = []
    of = Threads(four, log=told.append)
    of.start()
    outcome, _ = attempt(optuna.create_study(direction="maximize"), Signs(), threads=of, epochs=30)
    assert len(told) == 1
    assert outcome.attrs["threads"] == torch.get_num_threads()
    assert told[0].startswith(f"computes with {torch.get_num_threads()} thread")


def test_what_is_no_step_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "BLOCK_S", 0.0)
    told: list[str] = []
    of = Threads(four, log=told.append)
    of.start()
    for _ in range(100):
        of.apart()  # an evaluation, or an epoch's end
    assert not told
    assert torch.get_num_threads() == 4
    for _ in range(100):  # epochs of one batch
        of.batch()
        of.apart()
    assert told


@pytest.mark.parametrize(
    ("training", "device"),
    [({"deterministic": True}, "cpu"), ({"compile": True}, "cpu"), ({}, "cuda")],
)
def test_deterministic_compiled_and_gpu_trials_have_all_their_cores(
    monkeypatch: pytest.MonkeyPatch, training: dict[str, bool], device: str
) -> None:
    monkeypatch.setattr(threads, "BLOCK_S", 0.0)
    told: list[str] = []
    of = Threads(four, TrainingSpec(**training), torch.device(device), told.append)
    of.start()
    for _ in range(1000):
        of.batch()
    assert (torch.get_num_threads(), told) == (4, [])


def test_a_trial_that_runs_leaves_cores_to_workers_that_come(monkeypatch: pytest.MonkeyPatch) -> None:
    n_cores = [4]
    for training, wanted in (({}, 2), ({"deterministic": True}, 4)):
        n_cores[0] = 4
        of = Threads(lambda: n_cores[0], TrainingSpec(**training), torch.device("cuda"))
        of.start()
        n_cores[0] = 2
        of.look()
        assert torch.get_num_threads() == 4  # it has just looked
        with monkeypatch.context() as patched:
            patched.setattr(threads, "LOOK_S", 0.0)
            of.look()
        assert torch.get_num_threads() == wanted
        of.start()
        assert torch.get_num_threads() == 2


def test_a_number_that_somebody_said_or_sets_is_left_alone() -> None:
    said = Threads(None)
    ours = Threads(four)
    ours.start()
    torch.set_num_threads(3)  # as an objective's build_model may
    for of in (said, ours):
        for _ in range(100):
            of.batch()
            of.look()
        of.start()
        assert torch.get_num_threads() == 3


def test_what_an_objective_says_as_it_is_imported_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    Threads(four).start()
    assert torch.get_num_threads() == 3
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # torch was imported before, and had looked
    Threads(four).start()
    assert torch.get_num_threads() == 3
