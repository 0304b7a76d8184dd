"""TPE with scipy's normal distribution suggests what Optuna's suggests."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe import _truncnorm
from optuna.samplers._tpe.sampler import hyperopt_default_gamma

from tuner.study import tpe

SPACE = {
    "rate": FloatDistribution(1e-6, 1.0, log=True),
    "share": FloatDistribution(0.0, 0.5),
    "step": FloatDistribution(0.0, 1.0, step=0.1),
    "units": IntDistribution(1, 1000, log=True),
    "layers": IntDistribution(1, 5),
    "kind": CategoricalDistribution([0, 1, 2]),
}


@pytest.fixture(autouse=True)
def _optunas_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin with the function that Optuna has, and put it back."""
    tpe._use_scipy.cache_clear()
    monkeypatch.setattr(_truncnorm, "_log_ndtr", own)


def own(numbers: np.ndarray) -> np.ndarray:
    """What Optuna has, which other tests of this process may have replaced."""
    return np.frompyfunc(_truncnorm._log_ndtr_single, 1, 1)(numbers).astype(float)


def suggested(sampler: type[TPESampler], **settings: Any) -> list[dict[str, Any]]:
    """Return what 40 trials are suggested, the best of which lie where the rate is high and the kind is 0."""
    study = optuna.create_study(sampler=sampler(seed=1, **settings))
    found = []
    for _ in range(40):
        trial = study.ask(SPACE)
        found.append(trial.params)
        study.tell(trial, abs(np.log10(trial.params["rate"])) + trial.params["kind"] + trial.params["share"])
    return found


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("settings", [{}, {"multivariate": False}, {"group": True}], ids=str)
def test_it_suggests_what_optunas_does(settings: dict[str, bool]) -> None:
    theirs = suggested(TPESampler, **settings)
    assert _truncnorm._log_ndtr is own
    ours = suggested(tpe.ScipyTPESampler, **settings)
    assert _truncnorm._log_ndtr is not own
    assert len(ours) == len(theirs) == 40
    for its, others in zip(ours, theirs, strict=True):
        assert its == pytest.approx(others, rel=1e-9)


def test_numbers_are_not_gone_through_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(number: float) -> float:
        raise AssertionError(number)

    monkeypatch.setattr(_truncnorm, "_log_ndtr", np.frompyfunc(one, 1, 1))
    with pytest.raises(AssertionError):
        suggested(TPESampler)
    assert len(suggested(tpe.ScipyTPESampler)) == 40


def test_an_optuna_without_that_function_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_truncnorm, "_log_ndtr")
    tpe._use_scipy()
    assert not hasattr(_truncnorm, "_log_ndtr")


@pytest.mark.filterwarnings("ignore:`gamma` has been deprecated:FutureWarning")
def test_gamma_is_a_tenth_or_hyperopts_root() -> None:
    theirs = suggested(TPESampler, gamma=hyperopt_default_gamma)
    ours = suggested(tpe.ScipyTPESampler, gamma="sqrt")
    for its, others in zip(ours, theirs, strict=True):
        assert its == pytest.approx(others, rel=1e-9)
    assert ours != suggested(tpe.ScipyTPESampler)
    assert b"_root" in pickle.dumps(tpe.ScipyTPESampler(gamma="sqrt"))  # as Optuna's can be, to go on with it elsewhere
    with pytest.raises(ValueError, match="gamma needs to be linear or sqrt, got 'cubic'"):
        tpe.ScipyTPESampler(gamma="cubic")
