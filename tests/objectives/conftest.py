"""The real data sets, and the export of an objective's model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest
import torch

import tuner
from storage import open_engine, open_storage
from tuner.log import Log
from tuner.model.export import export_study
from tuner.spec import Budget
from tuner.study.joining import create_study, plan
from tuner.study.registry import find_objective

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tuner.model.loading import LoadedModel
    from tuner.objective import Objective

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A data directory with Fashion-MNIST, California housing and Covertype, whole or in part."""
    directory = Path(os.environ.get("TUNER_TEST_DATA") or ROOT.parent / "shared" / "data")
    for part in ("FashionMNIST/raw", "scikit_learn"):
        if not (directory / part).is_dir():
            pytest.skip(f"there is no {directory / part}: TUNER_TEST_DATA may name a directory that has it")
    return directory


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Train on one thread: where tests run side by side, more would wait for each other (6 epochs: 25 s, not 2)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No download gets anywhere: it goes to a proxy that is not there."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)


@pytest.fixture
def cut(real_data: Path, tmp_path: Path) -> Callable[[str, int], Path]:
    """Return a data directory like the real one, but with this file of it ending after so many bytes."""

    def without_the_rest(name: str, n_bytes: int) -> Path:
        directory = tmp_path / "cut"
        for path in real_data.rglob("*"):
            copy = directory / path.relative_to(real_data)
            if path.is_file():
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.symlink_to(path)
        (directory / name).unlink()
        (directory / name).write_bytes((real_data / name).read_bytes()[:n_bytes])
        return directory

    return without_the_rest


@pytest.fixture
def exported(database: str, real_data: Path, tmp_path: Path) -> Callable[[str, dict[str, Any]], LoadedModel]:
    """Search an objective, given as `file.py:attribute`, by one trial of these params, and export its model."""

    def export(reference: str, params: dict[str, Any]) -> LoadedModel:
        source = find_objective(f"{ROOT}/objectives/{reference}")
        spec, objective = plan(
            source,
            source.load(),
            options={},
            budget=Budget(trials=1),
            epochs=1,
            sampler="tpe",
            pruner="none",
            direction=None,
            seed=0,
        )
        assert objective is not None
        engine = open_engine(database)
        try:
            study = create_study(engine, source.study_name, spec)
            in_optuna = optuna.load_study(study_name=source.study_name, storage=open_storage(database))
            in_optuna.add_trial(_a_finished_trial(objective, params))
            output = tmp_path / "model"
            export_study(engine, study, source, output=output, data_dir=real_data, device="cpu", log=Log())
        finally:
            engine.dispose()
        return tuner.load_model(output)

    return export


def _a_finished_trial(objective: Objective, params: dict[str, Any]) -> optuna.trial.FrozenTrial:
    trial = optuna.trial.FixedTrial(params)
    objective.suggest(trial)
    return optuna.trial.create_trial(
        value=0.5, params=trial.params, distributions=trial.distributions, user_attrs={"epoch": 1}
    )
