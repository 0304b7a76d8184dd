"""A study with finished trials of a small objective, and its export."""

import textwrap

import optuna
from sqlalchemy import insert

from storage import open_engine, open_storage
from storage.coordination import studies
from storage.database.tables import tuner_curves
from tuner.log import Log
from tuner.model.export import export_study
from tuner.spec import Budget
from tuner.study.joining import create_study, plan
from tuner.study.registry import find_objective

OBJECTIVE = """
    import torch
    from torch import nn
    from tuner.data import Data, Split
    from tuner.objective import Objective

    KIND = "{kind}"

    class Model(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layers = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))

        def forward(self, x, y=None):
            return self.layers(x if y is None else torch.cat([x, y.float()], 1))

    class Signs(Objective):
        width: int = 4

        def suggest(self, trial):
            trial.suggest_float("lr", 0.01, 0.1)

        def load_data(self, root):
            splits = []
            for seed in range(3):
                x = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))
                pair = (x[:, :2], x[:, 2:].double())
                inputs = {{"tensor": x, "tuple": pair, "dict": dict(zip("xy", pair, strict=True))}}[KIND]
                splits.append(Split(inputs, (x[:, 0] > 0).long()))
            return Data(*splits, class_names=("negative", "positive"))

        def build_model(self, params):
            return Model(self.width)

    {more}
"""


FUNCTION = """
    def loss(trial):
        return trial.suggest_float("x", -1, 1) ** 2
"""


class Exporting:
    """A study with finished trials, and what export_study takes."""

    def __init__(self, database, tmp_path):
        self.database = database
        self.engine = open_engine(database)
        self.path = tmp_path / "mine.py"
        self.data_dir = tmp_path
        self.output = tmp_path / "model"

    def start(
        self, code, attribute="Signs", *, name="signs", epoch=2, values=(0.5, 0.9, 0.7), attrs=None, rates=(), **options
    ):
        self.path = self.path.with_stem(name)
        self.path.write_text(textwrap.dedent(code))
        self.source = find_objective(f"{self.path}:{attribute}")
        spec, self.objective = plan(
            self.source,
            self.source.load(),
            options=options,
            budget=Budget(trials=3),
            epochs=None,
            sampler="tpe",
            pruner="median",
            direction=None,
            seed=5,
        )
        self.study = create_study(self.engine, name, spec)
        in_optuna = optuna.load_study(study_name=name, storage=open_storage(self.database))
        for value in values:
            in_optuna.add_trial(
                optuna.trial.create_trial(
                    value=value,
                    params={"lr": 0.05},
                    distributions={"lr": optuna.distributions.FloatDistribution(0.01, 0.1)},
                    user_attrs={**({"epoch": epoch} if epoch else {}), **(attrs or {})},
                    intermediate_values={step: 0.5 for step, _ in enumerate(rates, 1)},
                )
            )
        points = [
            {"trial_id": trial._trial_id, "step": step, "epoch": {"rates": its}}
            for step, its in enumerate(rates, 1)
            for trial in in_optuna.trials
        ]
        if points:
            with self.engine.begin() as conn:
                conn.execute(insert(tuner_curves), points)
        return self

    def __call__(self, output=None, device="cpu", **how):
        return export_study(
            self.engine,
            self.study,
            self.source,
            output=output or self.output,
            data_dir=self.data_dir,
            device=device,
            log=Log(),
            **how,
        )

    def recorded(self):
        return studies.list_exports(self.engine, self.study.study_id)


def code(kind="tensor", more=""):
    return textwrap.dedent(OBJECTIVE).format(kind=kind, more=textwrap.dedent(more))
