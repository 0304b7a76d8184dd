import inspect
import pydoc
import re

import pytest

import tuner
from tuner import Objective, training


def test_the_public_surface_is_what_all_says():
    assert tuner.__all__ == [
        "Objective",
        "TunerError",
        "best",
        "callbacks",
        "checkpoint",
        "create_study",
        "curves",
        "device",
        "export",
        "keep_model",
        "load_model",
        "load_study",
        "rebuild",
        "run",
        "trials",
    ]
    assert [getattr(tuner, name).__name__.removeprefix("tuner.") for name in tuner.__all__] == tuner.__all__
    assert {*tuner.__all__} <= {*dir(tuner)}


def test_the_help_of_tuner_shows_each_name_with_what_it_is_for():
    told = pydoc.plain(pydoc.render_doc(tuner))
    for name in tuner.__all__:
        found = getattr(tuner, name)
        assert inspect.getdoc(found), name
        assert re.search(rf"^    (class )?{name}\b", told, re.M), name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'load_modle'"):
        tuner.load_modle  # noqa: B018


def test_training_keeps_its_names():
    assert training.__all__ == [
        "CHECKED_EVERY",
        "EVALUATION_BYTES",
        "EVALUATION_ROWS",
        "DivergedError",
        "Epoch",
        "Interrupted",
        "Options",
        "Predictions",
        "Run",
        "RunningLoss",
        "best_epoch",
        "choose_device",
        "evaluate",
        "fit",
        "predict",
    ]
    assert all(hasattr(training, name) for name in training.__all__)
    assert inspect.isfunction(training.fit)  # and no module of that name


def test_the_help_of_an_objective_is_its_own():
    class Mine(Objective):
        width: int = 3

    for kind in (Objective, Mine):
        told = pydoc.plain(pydoc.render_doc(kind))
        assert "build_model(self, params" in told
        assert not re.search(r"model_dump|model_config|__pydantic|__fields_set__|parse_obj", told)
        assert len(told.splitlines()) < 150
    assert {"width", "suggest", "epochs"} <= {*dir(Objective), *Mine.model_fields}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import tuner", ("torch", "optuna", "pydantic", "sqlalchemy")),
        ("import tuner.cli.app; tuner.cli.app.make_app()", ("torch", "optuna", "numpy", "rich", "sqlalchemy")),
        ("import tuner.cli.app; tuner.cli.app.make_app('best')", ("pydantic", "sqlalchemy", "tuner.cli.search")),
        ("import tuner.study.joining, tuner.study.registry, tuner.worker.progress, tuner.doctor", ("torch", "optuna")),
        ("import tuner.study.sampling", ("torch",)),
        ("import tuner.slot.shared_checkpoints", ("torch", "optuna", "fsspec")),
        ("import tuner.cli.importing, storage.importing.studies", ("torch",)),
        ("import tuner.training, tuner.data", ("optuna", "sqlalchemy", "psycopg2", "storage.database")),
    ],
)
def test_importing_pulls_in_no_more_than_needed(start_python, statement, absent):
    process = start_python(f"{statement}\nimport sys\nprint(*set({absent!r}) & sys.modules.keys())")
    out, err = process.communicate(timeout=60)
    assert (out.strip(), err) == ("", "")
