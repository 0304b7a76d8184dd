"""Reading an exported model back: in one piece, in eval mode, and without unpickling."""

import json
import pickle
import zipfile

import pytest
import torch

import tuner
from tuner.errors import TunerError
from tuner.formats.program import PROGRAM
from tuner.formats.weights import WEIGHTS
from tuner.model.manifest import MANIFEST, read_manifest, sha256_of


# What a test does to an export that is whole.
def _cut(directory, name):
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[: len(content) // 2])


def _flip(directory, name):
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(content)


def _remove(directory, name):
    (directory / name).unlink()


@pytest.mark.slow
@pytest.mark.parametrize("name", [WEIGHTS, PROGRAM])
@pytest.mark.parametrize(
    ("damage", "told"), [(_cut, "needs the sha256"), (_flip, "needs the sha256"), (_remove, "cannot read")]
)
def test_a_damaged_file_is_refused(export_copy, damage, name, told):
    damage(export_copy, name)
    with pytest.raises(TunerError) as caught:
        tuner.load_model(export_copy)
    assert str(export_copy / name) in str(caught.value)
    assert told in str(caught.value)
    assert "run 'tuner export' again" in str(caught.value)


def test_an_export_without_its_manifest_is_none(export_copy):
    (export_copy / MANIFEST).unlink()
    with pytest.raises(TunerError) as caught:
        tuner.load_model(export_copy)
    assert str(caught.value) == f"no model in {export_copy}: it has no manifest.json; 'tuner export' writes one"


@pytest.mark.parametrize("path", ["missing", "copy/model.safetensors"])
def test_a_path_that_is_no_directory_of_an_export_is_told(export_copy, path):
    with pytest.raises(TunerError, match=r"no model in|Not a directory"):
        tuner.load_model(export_copy.parent / path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text[:50], "invalid json"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format: input should be 1"),
        (lambda text: text.replace('"metric"', '"metrik"'), "metric: field required"),
        (lambda text: "", "invalid json"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_told_in_one_line(export_copy, change, told):
    path = export_copy / MANIFEST
    path.write_text(change(path.read_text()))
    with pytest.raises(TunerError) as caught:
        tuner.load_model(export_copy)
    assert str(caught.value).startswith(f"cannot read {path}: {told}")
    assert "\n" not in str(caught.value)


def test_a_loaded_model_stays_in_eval_mode_and_takes_batches_of_any_size(export_copy):
    model = tuner.load_model(export_copy)
    assert model.eval() is model
    with pytest.raises(TunerError, match="for inference only"):
        model.train()
    assert not model.training
    rows = torch.randn(300, 3)
    with torch.inference_mode():
        together, one_by_one = model(rows), torch.cat([model(row[None]) for row in rows])
    torch.testing.assert_close(together, one_by_one)
    assert model.manifest.study == "signs"


class _Payload:
    def __reduce__(self):
        return pytest.fail, ("something was unpickled",)


def _with_sample_inputs(archive, pickled):
    archive["archive/data/sample_inputs/model.pt"] = pickled


def _with_a_pickled_weight(archive, pickled):
    name = "archive/data/weights/model_weights_config.json"
    config = json.loads(archive[name])
    meta = next(iter(config["config"].values()))
    meta["use_pickle"] = True
    archive |= {name: json.dumps(config).encode(), f"archive/data/weights/{meta['path_name']}": pickled}


def _with_a_pickled_constant(archive, pickled):
    archive["archive/data/constants/opaque_obj_0"] = pickled


def _with_compiled_code(archive, pickled):
    archive["archive/data/aotinductor/model/model.so"] = pickled


@pytest.mark.parametrize(
    "change", [_with_sample_inputs, _with_a_pickled_weight, _with_a_pickled_constant, _with_compiled_code]
)
def test_an_export_that_somebody_put_a_pickle_into_is_refused(export_copy, change):
    path = export_copy / PROGRAM
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    change(content, pickle.dumps(_Payload()))
    with zipfile.ZipFile(path, "w") as new:
        for name, value in content.items():
            new.writestr(name, value)
    manifest = read_manifest(export_copy)
    manifest.files[PROGRAM] = sha256_of(path)
    (export_copy / MANIFEST).write_text(manifest.model_dump_json())
    with pytest.raises(TunerError, match="needs to hold plain tensors and a program, got "):
        tuner.load_model(export_copy)
