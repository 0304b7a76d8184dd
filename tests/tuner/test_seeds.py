import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuner.seeds import derive_seed, seed_everything, set_deterministic

SEEDS = st.integers(0, 2**63 - 1)


@given(SEEDS, st.text(), st.integers(0))
def test_a_derived_seed_suits_every_generator_and_is_always_the_same(seed, use, number):
    derived = derive_seed(seed, use, number)
    assert 0 <= derived < 2**32
    assert derived == derive_seed(seed, use, number)
    np.random.RandomState(derived)


@pytest.mark.parametrize(
    ("path", "expected"),
    [((0, "trial", 0), 3451003037), ((7, "trial", 12), 769492341), ((2**63 - 1, "export", 1), 765993967)],
)
def test_a_derived_seed_stays_the_same_in_every_version(path, expected):
    assert derive_seed(*path) == expected


def test_trials_uses_and_studies_have_seeds_of_their_own():
    seeds = {derive_seed(study, use, n) for study in range(5) for use in ("trial", "sampler") for n in range(200)}
    assert len(seeds) == 5 * 2 * 200


@pytest.mark.parametrize("seed", [0, 5, 2**32 + 5, 2**63 - 1])
def test_seeding_fixes_the_draws_of_python_numpy_and_torch(seed):
    def draws():
        seed_everything(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draws()
    assert draws() == first
    seed_everything(seed + 1 if seed < 2**63 - 1 else 0)
    assert random.random() != first[0]


@pytest.mark.parametrize("on", [True, False])
def test_what_has_not_been_written_is_not_filled_for_determinism_s_sake(on, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        set_deterministic(on)
        assert torch.are_deterministic_algorithms_enabled() == on
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
