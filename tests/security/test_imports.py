"""Rows 4 and 7: nothing is imported because it lies in the current directory, or because the database names it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import pytest
from sqlalchemy import text

from storage import open_storage

if TYPE_CHECKING:
    from command import Tuner

ROOT = Path(__file__).parents[2]
PLANTED = "open({mark!r}, 'a').write(__name__ + chr(10))\n"
LIBRARIES = [
    *("cmaes", "fsspec", "greenlet", "joblib", "matplotlib", "networkx", "numpy", "objectives", "onnx", "optuna"),
    *("pandas", "psycopg2", "pydantic", "rich", "sklearn", "storage", "sympy", "tensorboard", "torch", "torchmetrics"),
    *("torchvision", "triton", "tuner", "typer"),
]
OBJECTIVE = """
import helping_beside
from objectives.digits import Digits

class Mine(Digits):
    def load_data(self, root):
        import json, late_beside
        assert json.dumps(late_beside.VALUE) == "7"
        return super().load_data(root)
"""


@pytest.mark.slow
def test_no_file_of_the_current_directory_is_taken_for_a_module(tuner: Tuner, tmp_path: Path) -> None:
    """Nor one that lies beside the objective, but by the objective's own code."""
    mark = tmp_path / "was-imported"
    for name in {*sys.stdlib_module_names, *LIBRARIES} - {"__main__"}:
        (tmp_path / f"{name}.py").write_text(PLANTED.format(mark=str(mark)))
    for name in ("helping_beside", "late_beside"):
        (tmp_path / f"{name}.py").write_text("VALUE = 7\n")
    (tmp_path / "mine.py").write_text(OBJECTIVE)
    done = tuner("run", "mine.py:Mine", "--trials", "1", "--epochs", "1")
    assert done.code == 0, done.stderr
    assert not mark.exists(), mark.read_text()


def test_every_python_that_we_start_leaves_the_current_directory_alone() -> None:
    starts = []
    for file in sorted({*ROOT.glob("tuner/**/*.py"), *ROOT.glob("storage/**/*.py")}):
        starts += [(file.name, match[1]) for match in re.finditer(r"\[sys\.executable(.{0,6})", file.read_text())]
    assert len(starts) >= 4
    assert [start for start in starts if not start[1].startswith((', "-P"', ', "-I"'))] == []


@pytest.mark.slow
def test_a_file_that_the_database_names_is_not_imported(tuner: Tuner, database: str, tmp_path: Path) -> None:
    mark = tmp_path / "was-imported"
    assert tuner("create", "digits", "--study", "s", "--trials", "2").code == 0
    storage = open_storage(database)
    params = {"layers": 1}
    kinds = {"layers": optuna.distributions.IntDistribution(1, 3)}
    trial = optuna.trial.create_trial(value=0.5, params=params, distributions=kinds)
    optuna.load_study(study_name="s", storage=storage).add_trial(trial)
    for name in ("planted.py", "planted/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(PLANTED.format(mark=str(mark)) + "def f(trial): return 1.0\n")
    named = "UPDATE tuner_studies SET spec = jsonb_set(spec, '{objective,name}', to_jsonb(cast(:name AS text)))"
    for name in ("planted.py:f", "planted:f"):
        with storage.engine.begin() as conn:
            conn.execute(text(named), {"name": name})
        for command in ("worker", "export"):
            assert f"searches {name!r}, a file of the one who created it" in tuner(command, "s").error()
    for command in (["show", "s"], ["adopt", "s", "digits"], ["create", "digits", "--study", "t", "--from", "s"]):
        assert "Traceback" not in tuner(*command).stderr
    assert not mark.exists()
    storage.engine.dispose()
