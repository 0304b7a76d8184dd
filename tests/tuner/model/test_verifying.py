"""An export is checked without its data: what is whole passes, what was exchanged or damaged is named."""

import pytest
from command import Tuner
from safetensors.torch import load_file, save_file

from tuner.errors import TunerError
from tuner.formats.program import PROGRAM
from tuner.formats.weights import WEIGHTS
from tuner.model.manifest import MANIFEST, read_manifest, sha256_of
from tuner.model.verifying import verify


def _problems(directory):
    return {check.name: check.problem for check in verify(directory) if check.problem is not None}


def _as_of_now(directory, **fields):
    manifest = read_manifest(directory)
    files = {name: sha256_of(directory / name) for name in manifest.files}
    changed = manifest.model_copy(update={"files": files, **fields})
    (directory / MANIFEST).write_text(changed.model_dump_json())


@pytest.mark.slow
def test_an_export_as_it_was_made_passes_and_is_shown(export_copy, tmp_path):
    assert _problems(export_copy) == {}
    assert len(verify(export_copy)) == 6
    # A directory needs no database.
    tuner = Tuner({"TUNER_STORAGE": "postgresql://nobody@127.0.0.1:1/none"}, tmp_path)
    shown = tuner("show", "copy/", "--json")
    assert (shown.code, shown.json()["study"]) == (0, "signs")
    lines = dict(line.split(maxsplit=1) for line in tuner("show", "./copy").stdout.splitlines())
    assert (lines["metric"], lines["params.lr"], lines["test_details.rows"]) == ("accuracy", "0.05", "40")
    assert tuner("show", "copy").code == 3  # a study's name
    (export_copy / WEIGHTS).write_bytes(b"")
    found = tuner("verify", "copy")
    assert found.code == 1
    assert "sha256 of model.pt2: ok" in found.stdout.splitlines()
    told = f"tuner: {tmp_path / 'copy'} is not what its manifest says: sha256 of {WEIGHTS}: needs"
    assert found.error().startswith(told)


def test_weights_that_are_not_the_programs_are_told(export_copy):
    weights = load_file(export_copy / WEIGHTS)
    weights["layers.1.bias"] += 1
    save_file(weights, export_copy / WEIGHTS)
    _as_of_now(export_copy)
    assert _problems(export_copy) == {f"{PROGRAM} has the weights of {WEIGHTS}": "another tensor 'layers.1.bias'"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shape": (4,)}, "Error"),
        ({"dtype": "load"}, "there is no type 'load' of tensors"),
    ],
)
def test_a_manifest_that_is_not_the_programs_is_told(export_copy, change, told):
    inputs = [its.model_copy(update=change) for its in read_manifest(export_copy).inputs]
    _as_of_now(export_copy, inputs=inputs)
    found = _problems(export_copy)
    assert list(found) == [f"{PROGRAM} on {n} rows" for n in (1, 2, 257)]
    assert all(told in problem for problem in found.values())


def test_a_manifest_names_files_of_its_directory_alone(export_copy):
    text = (export_copy / MANIFEST).read_text()
    for name in ("../mine.py", "/etc/passwd", "a/b", ".ssh"):
        (export_copy / MANIFEST).write_text(text.replace(f'"{WEIGHTS}":', f'"{name}":'))
        with pytest.raises(TunerError, match=r"cannot read .*manifest\.json: files"):
            verify(export_copy)
