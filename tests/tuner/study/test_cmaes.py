"""CMA-ES goes on from the state in the database as Optuna's own sampler does, and runs nothing that stands there."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import optuna
import pytest
from optuna.samplers import CmaEsSampler
from optuna.trial import TrialState, create_trial

from tuner.study.cmaes import SafeCmaEsSampler

X = optuna.distributions.FloatDistribution(-1, 1)


class Payload:
    """What unpickles into a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def searched(sampler_class: type[CmaEsSampler], **settings: bool) -> list[dict[str, float]]:
    """Run 30 trials, each with a sampler of its own, as slots do: all that it knows is in the study."""
    study = optuna.create_study()
    for number in range(30):
        study.sampler = sampler_class(seed=number, warn_independent_sampling=False, **settings)
        trial = study.ask()
        x, y, n = (
            trial.suggest_float("x", -3, 3),
            trial.suggest_float("y", 1e-3, 1, log=True),
            trial.suggest_int("n", 1, 9),
        )
        study.tell(trial, x**2 + y + n)
    assert any(":optimizer:" in name for trial in study.trials for name in trial.system_attrs)
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("settings", [{}, {"use_separable_cma": True}, {"with_margin": True}, {"lr_adapt": True}])
def test_it_suggests_what_optunas_suggests(settings):
    assert searched(SafeCmaEsSampler, **settings) == searched(CmaEsSampler, **settings)


def with_state(text: str, key: str = "cma:optimizer:0") -> optuna.Study:
    study = optuna.create_study(sampler=SafeCmaEsSampler(seed=0))
    for value in range(3):
        params = {"x": value / 4, "y": value / 5}
        trial = create_trial(params=params, distributions={"x": X, "y": X}, value=value, system_attrs={key: text})
        study.add_trial(trial)
    return study


def test_a_state_that_is_code_is_not_run_and_the_search_goes_on(tmp_path):
    path = tmp_path / "ran"
    study = with_state(pickle.dumps(Payload(path)).hex())
    trial = study.ask()
    assert -1 <= trial.suggest_float("x", -1, 1) <= 1
    assert not path.exists()
    study.sampler = CmaEsSampler(seed=0)  # Optuna's own: what this is about
    study.ask().suggest_float("x", -1, 1)
    assert path.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "zz",
        "80",
        pickle.dumps(3).hex(),
        b"ccmaes._cma\nCMA\n)\x81.".hex(),  # without its state
        b"\x80\x02cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(L99999999999999999999L\ntc_x\nx\ntR.".hex(),
        pickle.dumps({"a": 1}).hex(),
        pickle.dumps(optuna.create_study).hex(),
        b"cposix\nsystem\n(S'touch /tmp/x'\ntR.".hex(),
        b"\x80\x04]\x94(".hex(),
    ],
)
@pytest.mark.parametrize("key", ["cma:optimizer:0", "cma:optimizer:7"])
def test_a_state_that_is_none_is_passed_over(text, key):
    study = with_state(text, key)
    assert -1 <= study.ask().suggest_float("x", -1, 1) <= 1
    assert study.trials[-1].state == TrialState.RUNNING
