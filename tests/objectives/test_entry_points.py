import importlib
import tomllib
from pathlib import Path

import optuna
import pytest
import torch

from tuner.objective import Objective
from tuner.study.registry import ENTRY_POINT_GROUP

ROOT = Path(__file__).parents[2]
NAMED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][ENTRY_POINT_GROUP]


@pytest.mark.parametrize("place", NAMED.values(), ids=NAMED)
def test_an_entry_point_names_an_objective(place):
    module, _, attribute = place.partition(":")
    assert issubclass(getattr(importlib.import_module(module), attribute), Objective)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is (deprecated|not supported)")
@pytest.mark.parametrize("place", NAMED.values(), ids=NAMED)
def test_its_models_can_be_scripted_and_its_data_has_a_licence(place):
    module, _, attribute = place.partition(":")
    objective = getattr(importlib.import_module(module), attribute)()
    assert objective.data_license
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(4):
        trial = study.ask()
        objective.suggest(trial)
        assert torch.jit.script(objective.build_model(trial.params))


def test_every_objective_has_an_entry_point():
    defined = set()
    for path in (ROOT / "objectives").glob("*.py"):
        module = importlib.import_module(f"objectives.{path.stem}")
        kinds = [its for its in vars(module).values() if isinstance(its, type) and issubclass(its, Objective)]
        defined |= {
            f"{its.__module__}:{its.__name__}"
            for its in kinds
            if its.__module__ == module.__name__ and not its.__abstractmethods__
        }
    assert defined == set(NAMED.values())
