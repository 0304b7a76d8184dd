"""What an earlier version left goes on working: its exported model, and its database with the studies in it.

tests/fixtures holds, by version, what that version wrote: `tuner run digits` with its model, and a study whose worker
was stopped in its third trial. Neither is ever made again by later code.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import Tuner
from safetensors.torch import load_file

import tuner as package
from storage import open_engine
from tuner.spec import Budget, ObjectiveSpec, Retry, SamplerSpec, Spec, TrainingSpec, parse_spec

KEPT = Path(__file__).parents[1] / "fixtures" / "0.1.0"
RING = f"{KEPT / 'ring.py'}:Ring"


@pytest.fixture
def kept_database(empty_database: str) -> str:
    """The kept database, restored."""
    engine = open_engine(empty_database)
    with engine.begin() as conn:
        conn.exec_driver_sql((KEPT / "database.sql").read_text())
    engine.dispose()
    return empty_database


@pytest.fixture
def on_kept(kept_database: str, tmp_path: Path) -> Tuner:
    """The command line of now on the kept database."""
    return Tuner({"TUNER_STORAGE": kept_database, "TUNER_DATA_DIR": str(tmp_path / "data")}, tmp_path)


def test_an_exported_model_gives_what_it_gave() -> None:
    model = package.load_model(KEPT / "model")
    rows = load_file(KEPT / "rows.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(model(rows["inputs"]), rows["outputs"])
    assert (model.manifest.study, model.manifest.trial, model.manifest.class_names) == (
        "digits",
        0,
        tuple("0123456789"),
    )
    assert model.manifest.test == {"accuracy": 0.855555534362793}


def test_a_database_is_read(on_kept: Tuner) -> None:
    names = [(study["study"], study["trials"]["complete"]) for study in on_kept("studies", "--json").json()]
    assert names == [("digits", 4), ("ring", 2)]
    status = on_kept("status", "digits", "--json").json()
    assert (status["state"], status["reason"]) == ("finished", "the budget of 4 trials is used up")
    assert (status["workers_ended"], round(status["device_seconds"]["complete"], 1)) == (1, 9.4)
    best = on_kept("best", "digits", "--json").json()
    assert (best["number"], best["value"], best["epoch"], best["seed"]) == (0, 0.8083333373069763, 3, 148042955)
    assert best["params"] == {
        "layers": 1,
        "units_0": 8,
        "dropout": 0.23892677080610103,
        "lr": 0.025436379954750392,
        "batch_size": 128,
    }
    trials = on_kept("trials", "ring", "--json").json()
    assert [(trial["state"], trial["value"]) for trial in trials] == [
        ("COMPLETE", 0.5866666436195374),
        ("COMPLETE", 0.550000011920929),
        ("WAITING", None),
    ]


def test_a_stored_spec_is_read(kept_database: str) -> None:
    engine = open_engine(kept_database)
    with engine.connect() as conn:
        stored = conn.exec_driver_sql("SELECT study_name, spec FROM tuner_studies JOIN studies USING (study_id)").all()
    engine.dispose()
    specs = {name: parse_spec(spec, name) for name, spec in stored}
    digits, ring = specs["digits"], specs["ring"]
    assert (digits.objective.name, digits.objective.options) == ("digits", {"max_units": 8, "max_layers": 1})
    assert ring == Spec(
        objective=ObjectiveSpec(
            name="ring.py:Ring",
            code_hash="25c8aed15d4f26f34f03163c07050c35603fa7a4d243d7c334faa4e4f9c2fd06",
            options={"width": 8},
        ),
        metric="accuracy",
        direction="maximize",
        sampler=SamplerSpec(name="tpe", settings={"n_startup_trials": 2}),
        budget=Budget(trials=4),
        epochs=20,
        seed=7,
        retry=Retry(max_attempts=3),
        training=TrainingSpec(patience=19),
        checkpoints="database",
        checkpoint_every_s=0.05,
    )


def test_a_study_is_finished_by_a_worker_and_exported(on_kept: Tuner, tmp_path: Path) -> None:
    before = on_kept("trials", "ring", "--json").json()
    options = ["--trials", "4", "--epochs", "20", "--seed", "7", "--patience", "19", "--checkpoint-every", "0.05s"]
    created = on_kept("create", RING, *options, "--sampler", "tpe:n_startup_trials=2")
    assert (created.code, created.stderr) == (0, "")
    with on_kept.start("--log-format", "json", "worker", "ring", "--objective", RING, "--device", "cpu") as worker:
        assert worker.finish().code == 0
    assert "trial 2: resumed after epoch 6, batch 0 (slot 0)" in [event["message"] for event in worker.events("note")]
    after = on_kept("trials", "ring", "--json").json()
    assert after[:2] == before[:2]
    assert after[2]["params"] == before[2]["params"]
    assert [trial["state"] in ("COMPLETE", "PRUNED") for trial in after] == [True] * 4
    exported = on_kept("export", "ring", "--objective", RING, "--output", tmp_path / "model", "--device", "cpu")
    assert exported.code == 0, exported.stderr
    assert package.load_model(tmp_path / "model").manifest.study == "ring"
