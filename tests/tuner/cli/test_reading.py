"""What the commands that only read cost: statements and imports, which do not depend on the machine."""

from __future__ import annotations

import json

import pytest
from filling import fill

from storage import open_engine
from tuner.spec import Budget, ObjectiveSpec, Spec
from tuner.study.joining import create_study

RUN = """
import json, sys
from sqlalchemy import Engine, event
sent = []
event.listen(Engine, "before_cursor_execute", lambda *arguments: sent.append(arguments[2]))
from tuner.cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 0
heavy = {"alembic", "numpy", "optuna", "rich", "torch"} & sys.modules.keys()
print(json.dumps([len(sent), *heavy]))
"""
# The schema's version and the study are one each.
STATEMENTS = {"best": 6, "status": 17, "studies": 5, "trials": 6}


@pytest.fixture
def engine(database):
    engine = open_engine(database)
    yield engine
    engine.dispose()


def a_study(engine, name, n_trials):
    spec = Spec(
        objective=ObjectiveSpec(name="f", code_hash="0" * 64),
        metric="value",
        direction="minimize",
        budget=Budget(trials=n_trials),
        epochs=1,
    )
    fill(engine, create_study(engine, name, spec).study_id, n_trials)


@pytest.mark.slow
@pytest.mark.parametrize("command", list(STATEMENTS))
def test_reading_takes_few_statements_and_imports_whatever_there_is(engine, database, start_python, tmp_path, command):
    environment = {"TUNER_STORAGE": database, "TUNER_DATA_DIR": str(tmp_path)}
    for name, n_trials in (("small", 3), ("large", 300)):
        a_study(engine, name, n_trials)
        arguments = [command] if command == "studies" else [command, name]
        out, err = start_python(RUN, *arguments, env=environment).communicate(timeout=60)
        assert err == ""
        assert json.loads(out.splitlines()[-1]) == [STATEMENTS[command]]
