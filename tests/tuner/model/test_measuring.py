"""An export's figures are taken again by its objective and its data, and by nothing that a manifest names."""

import pytest
from exporting import code

import tuner
from tuner.errors import TunerError, UsageError
from tuner.model.manifest import MANIFEST, read_manifest
from tuner.model.measuring import measure, source_of
from tuner.study.registry import find_objective


def _changed(directory, **fields):
    changed = read_manifest(directory).model_copy(update=fields)
    (directory / MANIFEST).write_text(changed.model_dump_json())


def _problems(directory, source, data_dir, **how):
    return {check.name: check.problem for check in measure(directory, source, data_dir=data_dir, **how)}


def test_figures_come_out_again_or_are_told(export_copy, tmp_path):
    path = tmp_path / "signs.py"
    path.write_text(code())
    source = find_objective(f"{path}:Signs")
    assert _problems(export_copy, source, tmp_path) == {"data": None, "test accuracy": None}
    # What the export tells of inputs and outputs, for those who call it.
    model = tuner.load_model(export_copy)
    (given,), (gives,) = model.manifest.inputs, model.manifest.outputs
    assert (gives.kind, gives.values) == ("classes", "logits")
    assert -5 < given.seen[0] < -1 < 1 < given.seen[1] < 5
    assert model.predict([[9.0, 0, 0], [-9.0, 0, 0]]).tolist() == ["positive", "negative"]
    with pytest.warns(UserWarning, match="goes from -900 to 0, in the training split it went from") as caught:
        assert model.predict_proba([[-900.0, 0, 0]]).argmax() == 0
    assert caught[0].filename == __file__
    with pytest.raises(TunerError, match="the model needs one array"):
        model.top_k({"x": [[0, 0, 0]]}, 1)

    accuracy = model.manifest.test["accuracy"]
    _changed(export_copy, test={"accuracy": accuracy - 2 / 40, "other": None, "gone": 0.5})
    assert _problems(export_copy, source, tmp_path) == {
        "data": None,
        "test accuracy": f"needs {accuracy - 2 / 40:.6g}, got {accuracy:.6g}",
        "test other": None,
        "test gone": "needs 0.5, got none that is finite",
    }
    _changed(export_copy, test={}, missing={"test": "it broke"})
    assert _problems(export_copy, source, tmp_path)["test"] == "the export has no figures: it broke"
    _changed(export_copy, data={"fingerprint": "0" * 64})
    problem = "needs the fingerprint 000000000000, got "
    assert _problems(export_copy, source, tmp_path)["data"].startswith(problem)

    path.write_text(code().replace("0.01, 0.1", "0.01, 0.2"))
    with pytest.raises(TunerError, match=r"made by other code of 'signs.py:Signs': .* pass --allow-code-change"):
        measure(export_copy, source, data_dir=tmp_path)
    assert list(_problems(export_copy, source, tmp_path, allow_code_change=True)) == ["data"]


def test_no_file_or_module_that_a_manifest_names_is_imported(export_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    for name in ("evil.py:Evil", "evil:Evil"):
        _changed(export_copy, objective=name)
        with pytest.raises(UsageError, match="a file of the one who made it; give yours: --objective path/to/evil"):
            source_of(export_copy, None)
    _changed(export_copy, objective="digits")
    assert source_of(export_copy, None).name == "digits"
    with pytest.raises(TunerError, match="is of the objective 'digits', got 'covertype'"):
        measure(export_copy, source_of(export_copy, "covertype"), data_dir=tmp_path)
