"""What a plain function's best trial kept: where it lies, that no race loses it, and its export."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from optuna.trial import TrialState

import tuner
from storage import PostgresStorage
from storage.coordination import claims, models
from tuner.errors import SharedPlaceError, TunerError, UsageError
from tuner.log import Log
from tuner.model.export import export_study
from tuner.model.verifying import verify
from tuner.slot.kept_model import packed, take
from tuner.slot.kept_models import KeptModels
from tuner.spec import Spec
from tuner.study.joining import create_study
from tuner.study.registry import find_objective


class Made:
    """A study of a plain function, its trials run by hand."""

    def __init__(self, storage, tmp_path, place="database", name="s"):
        self.storage, self.data_dir = storage, tmp_path
        file = tmp_path / "mine.py"
        file.write_text("def objective(trial):\n    return 1.0\n")
        self.source = find_objective(f"{file}:objective")
        given = {
            "objective": {"name": self.source.name, "code_hash": self.source.code_hash()},
            "metric": "value",
            "direction": "maximize",
            "budget": {"trials": 30},
            "epochs": 1,
            "checkpoints": place,
        }
        self.study = create_study(storage.engine, name, Spec.model_validate(given))
        self.models = KeptModels(self.study, tmp_path, storage.sessions)

    def claim(self):
        held = claims.claim(self.storage.sessions, self.study.study_id, self.study.budget, claims.Holder(worker="w"))
        self.storage.hold(held)
        return held

    def end(self, held, value, data):
        """End a trial as a slot does."""
        self.storage.set_trial_user_attrs(held.trial_id, self.models.keep_if_best(held, value, data, print))
        self.storage.set_trial_state_values(held.trial_id, TrialState.COMPLETE, [value])
        self.models.tidy(print)

    def export(self, output="model", **how):
        return export_study(
            self.storage.engine,
            self.study,
            self.source,
            output=self.data_dir / output,
            data_dir=self.data_dir,
            device=None,
            log=Log(),
            **how,
        )

    def kept(self):
        """The trials whose models are there."""
        if self.study.spec.checkpoints == "database":
            with self.storage.engine.connect() as conn:
                rows = conn.exec_driver_sql(
                    "SELECT DISTINCT number FROM tuner_models JOIN trials USING (trial_id) ORDER BY number"
                )
                return [row.number for row in rows]
        names = [path.name for path in self.data_dir.rglob("*.model")]
        return sorted(int(name.split("-")[1]) for name in names)


@pytest.fixture
def storage(database):
    storage = PostgresStorage(database)
    yield storage
    storage.engine.dispose()


def some_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(), torch.nn.ReLU(), torch.nn.Linear(8, 2))


@pytest.fixture(scope="module")
def data():
    return packed(take(some_model(), torch.randn(5, 3), ["no", "yes"]))


@pytest.mark.parametrize("place", ["database", "local", "file"])
def test_only_the_best_trials_model_is_kept(storage, tmp_path, place):
    made = Made(storage, tmp_path, f"file://{tmp_path}/share" if place == "file" else place)
    kept = []
    for value in (0.5, 0.3, 0.9, 0.9, 0.7):
        made.end(made.claim(), value, b"of the value %f" % value)
        kept.append(made.kept())
    assert kept == [[0], [0], [2], [2], [2]]
    best = made.models.best()
    assert (best.number, made.models.read(best)) == (2, b"of the value 0.900000")
    made.end(made.claim(), 1.0, None)  # kept none
    assert made.kept() == [2]


@pytest.mark.parametrize("place", ["database", "file"])
def test_two_that_end_at_the_same_time_keep_the_better_one(storage, tmp_path, place):
    made = Made(storage, tmp_path, f"file://{tmp_path}/share" if place == "file" else place)
    for turn in range(4):
        values = (turn + 0.2, turn + 0.7) if turn % 2 else (turn + 0.7, turn + 0.2)
        held = [made.claim() for _ in values]
        together = threading.Barrier(len(values))

        def end(one, value, together=together):
            together.wait()
            made.end(one, value, b"%f" % value)

        ending = [threading.Thread(target=end, args=pair) for pair in zip(held, values, strict=True)]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join()
        best = made.models.best()
        assert made.kept() == [best.number]
        assert made.models.read(best) == b"%f" % max(values)


def test_a_worker_that_lost_its_trial_does_not_replace_the_model_of_the_next(storage, tmp_path):
    made = Made(storage, tmp_path)
    held = made.claim()
    models.save(storage.sessions, held, b"ours")
    stale = replace(held, token=type(held.token)(int=7))
    assert not models.save(storage.sessions, stale, b"theirs")
    assert models.load(storage.sessions, held.trial_id) == b"ours"


def test_the_model_of_a_trial_that_failed_after_all_is_dropped(storage, tmp_path):
    made = Made(storage, tmp_path)
    held = made.claim()
    storage.set_trial_user_attrs(held.trial_id, made.models.keep(held, b"of a worker that died then"))
    made.models.drop_others()
    assert made.kept() == [0]
    storage.set_trial_state_values(held.trial_id, TrialState.FAIL)
    made.models.drop_others()
    assert (made.kept(), made.models.best()) == ([], None)


def test_one_too_large_for_the_database_is_refused_with_what_to_do(storage, tmp_path):
    made = Made(storage, tmp_path)
    with pytest.raises(SharedPlaceError, match=r"may have 64 MB, got 65 MB; .*--checkpoints URL keeps"):
        made.models.keep(made.claim(), bytes(65 * 2**20))


@pytest.mark.slow
def test_an_export_gives_what_the_functions_model_gave(storage, tmp_path, data):
    made = Made(storage, tmp_path)
    held = made.claim()
    storage.report(held.trial_id, tuner_point(0, 0.4))
    made.end(held, 0.5, data)
    manifest = made.export(formats=("safetensors", "pt2", "onnx")).manifest
    rows = torch.randn(300, 3)
    loaded, wanted = tuner.load_model(tmp_path / "model"), some_model().eval()
    assert torch.equal(loaded(rows), wanted(rows))
    assert list(loaded.predict(rows)) == [("no", "yes")[place] for place in wanted(rows).argmax(1).tolist()]
    assert sorted(manifest.formats) == ["onnx", "pt2"]
    assert (manifest.kept.rows, manifest.retraining, manifest.epochs, manifest.test) == (5, None, 1, {})
    assert (manifest.parameters, manifest.validation) == (50, 0.5)
    assert manifest.missing == {"test": "a plain function tells of no test split"}
    assert {check.problem for check in verify(tmp_path / "model")} == {None}
    card = (tmp_path / "model" / "README.md").read_text()
    assert "as the trial gave it to be kept" in card
    assert "None" not in card.replace("session.run(None,", "")  # as ONNX Runtime is called
    with pytest.raises(TunerError, match="of a plain function, which has no build_model"):
        tuner.rebuild(tmp_path / "model", objective=str(made.source.file) + ":objective")


@pytest.mark.slow
def test_a_model_without_a_program_is_exported_by_its_weights(storage, tmp_path):
    class Branches(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    made, model = Made(storage, tmp_path), Branches(2, 2)
    made.end(made.claim(), 0.5, packed(take(model, torch.ones(2, 2))))
    manifest = made.export().manifest
    assert (list(manifest.files), sorted(manifest.missing)) == (["model.safetensors"], ["model.pt2", "test"])
    with pytest.raises(TunerError, match=r"has no model.pt2 that could be called .* the manifest's params$"):
        tuner.load_model(tmp_path / "model")


def test_what_kept_no_model_is_not_exported_and_says_which_trial_can_be(storage, tmp_path, data):
    made = Made(storage, tmp_path)
    made.end(made.claim(), 0.5, None)
    with pytest.raises(TunerError, match=r"has no model to export: let it call tuner.keep_model\(trial, model"):
        made.export()
    made.end(made.claim(), 0.4, data)
    with pytest.raises(TunerError, match=r"trial 0 has no model: .* best one's, .* --trial 1 exports it"):
        made.export()
    with pytest.raises(UsageError, match="is as it kept it"):
        made.export(epochs=3)
    assert not (tmp_path / "model").exists()


def tuner_point(step, value):
    from storage.trials.curves import CurvePoint

    return CurvePoint(step=step, value=value)
