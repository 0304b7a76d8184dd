"""Every format gives what the model gives, by the same names; what one cannot hold costs that one alone."""

import re
import shutil

import onnx
import pytest
import torch
from command import Tuner
from exporting import code

import tuner
from tuner.errors import TunerError
from tuner.formats.names import FILES
from tuner.model.card import loading_lines
from tuner.model.directory import CARD
from tuner.model.manifest import MANIFEST, read_manifest, sha256_of
from tuner.model.verifying import verify

FORMATS = ("safetensors", "pt2", "onnx", "torchscript")

# Two inputs by name, of which one has another type, and two outputs, of which one has an input's name.
TWO_OUTPUTS = """
    class Two(Model):
        def forward(self, y, x):
            classes = super().forward(x, y)
            return {"y": classes * 2, "classes": classes}

    def load_data(self, root):
        data = of_one(self, root)
        splits = [Split(its.inputs, {"y": its.targets, "classes": its.targets}) for _, its in data.splits()]
        return Data(*splits, class_names={"y": data.class_names, "classes": data.class_names})

    of_one, Signs.load_data = Signs.load_data, load_data
    Signs.build_model = lambda self, params: Two(4)
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "model"


@pytest.fixture
def every(exporting, kept):
    """An export in all formats that take no compiler, and what it was made by."""
    exporting.start(code("dict", TWO_OUTPUTS))
    if not kept.exists():
        exporting(kept, formats=FORMATS, in_fresh_process=True)
    exporting.output = shutil.copytree(kept, exporting.output)
    return exporting


def _without(directory, *names):
    manifest = read_manifest(directory)
    files = {name: its for name, its in manifest.files.items() if name not in {FILES[name] for name in names}}
    (directory / MANIFEST).write_text(manifest.model_copy(update={"files": files}).model_dump_json())


@pytest.mark.slow
def test_each_format_is_compared_in_a_process_of_its_own_and_loaded_by_its_name(every, start_python):
    manifest = read_manifest(every.output)
    assert manifest.missing == {}
    assert list(manifest.formats) == list(FORMATS)
    for name, check in manifest.formats.items():
        assert check.fresh_process == (name != "safetensors")
        assert check.relative_difference <= check.tolerance == 1e-4
        assert list(check.latency_ms) == ["1", "256"]
        assert check.bytes == (every.output / FILES[name]).stat().st_size
    assert manifest.formats["safetensors"].difference == 0
    assert manifest.formats["onnx"].opset == 18
    assert [its.name for its in manifest.outputs] == ["y", "classes"]
    inputs = every.objective.load_data(None).test.inputs
    rebuilt = tuner.rebuild(every.output, objective=f"{every.path}:Signs")
    with torch.no_grad():
        wanted = rebuilt(**inputs)
    for name in ("pt2", "onnx", "torchscript"):
        model = tuner.load_model(every.output, format=name)
        for n in (1, 2, 40):
            found = model(**{key: value[:n] for key, value in inputs.items()})
            torch.testing.assert_close(found, {key: value[:n] for key, value in wanted.items()})
        with pytest.raises(TunerError, match="for inference only"):
            model.train()
    with pytest.raises(TypeError, match="the model needs x, y, got a tensor, z"):
        tuner.load_model(every.output, format="onnx")(inputs["x"], z=inputs["y"])
    # What the card says, in one process: importing torch takes longest.
    lines = loading_lines(manifest)
    assert set(lines) == {"model.pt2", "model.pt2, without tuner", *(FILES[name] for name in FORMATS)}
    told = (every.output / CARD).read_text()
    program = f"import os, warnings\nwarnings.simplefilter('ignore')\nos.chdir({str(every.output)!r})\n"
    for name in ("onnx", "torchscript"):
        its = "\n".join(lines[FILES[name]])
        assert f"```python\n{its}\n```" in told
        program += f"{its}\nfound = outputs if isinstance(outputs, list) else outputs.values()\n"
        program += "print([list(its.shape) for its in found])\n"
    out, err = start_python(program).communicate(timeout=120)
    assert (out.splitlines(), err) == (["[[2, 2], [2, 2]]"] * 2, "")


@pytest.mark.slow
def test_what_is_code_is_loaded_only_by_its_name(every):
    with pytest.raises(TunerError, match="the format needs to be one of pt2, onnx, torchscript, aoti, got 'tflite'"):
        tuner.load_model(every.output, format="tflite")
    with pytest.raises(TunerError, match=r"no model.aoti.pt2 \(it was not asked for\); it has: pt2, onnx, torchscript"):
        tuner.load_model(every.output, format="aoti")
    with pytest.raises(TunerError, match=r"holds weights and no program: tuner.rebuild\("):
        tuner.load_model(every.output, format="safetensors")
    _without(every.output, "pt2")
    assert type(tuner.load_model(every.output).program).__name__ == "OnProcessor"
    _without(every.output, "onnx")
    with pytest.raises(TunerError, match="to run the code of who made it: format='torchscript'"):
        tuner.load_model(every.output)
    assert tuner.load_model(every.output, format="torchscript")


@pytest.mark.slow
def test_a_model_is_rebuilt_to_be_trained_further(every):
    with pytest.raises(TunerError, match=r"give yours: rebuild\('.*', objective='path/to/signs.py:Signs'\)"):
        tuner.rebuild(every.output)
    reference = f"{every.path}:Signs"
    model = tuner.rebuild(every.output, objective=reference)
    assert not model.training
    assert all(weight.requires_grad for weight in model.parameters())
    model.train()(**every.objective.load_data(None).train.inputs)["classes"].sum().backward()
    every.path.write_text(every.path.read_text() + "\n# other\n")
    with pytest.raises(TunerError, match="take the file of then, or allow_code_change=True"):
        tuner.rebuild(every.output, objective=reference)
    assert tuner.rebuild(every.output, objective=reference, allow_code_change=True)


@pytest.mark.slow
def test_verify_calls_the_formats_against_each_other(every):
    checks = {check.name: check.problem for check in verify(every.output, ["torchscript"])}
    assert set(checks.values()) == {None}
    assert {"model.onnx against model.pt2", "model.torchscript.pt against model.pt2"} < set(checks)
    path = every.output / FILES["onnx"]
    model = onnx.load(path)
    for weight in model.graph.initializer:
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 2, weight.name))
    onnx.save(model, path)
    manifest = read_manifest(every.output)
    files = {**manifest.files, FILES["onnx"]: sha256_of(path)}
    (every.output / MANIFEST).write_text(manifest.model_copy(update={"files": files}).model_dump_json())
    (wrong,) = [check for check in verify(every.output) if check.problem is not None]
    assert wrong.name == "model.onnx against model.pt2"
    assert "needs to give the model's outputs for 1 rows, got a difference of" in wrong.problem
    with pytest.raises(TunerError, match=r"has no model\.aoti\.pt2; it has: .*model\.onnx"):
        verify(every.output, ["aoti"])
    _without(every.output, "pt2")  # what is left is held against the wrong one
    (wrong,) = [check for check in verify(every.output, ["torchscript"]) if check.problem is not None]
    assert wrong.name == "model.torchscript.pt against model.onnx"


def test_a_model_that_is_built_otherwise_each_time_is_not_rebuilt(exporting):
    more = """
        class Drawn(Model):
            def forward(self, x):
                return self.layers(x) + self.drawn

        def build_model(self, params):
            model = Drawn(4)
            model.drawn = torch.rand(())
            return model

        Signs.build_model = build_model
    """
    exporting.start(code(more=more))
    manifest = exporting().manifest
    assert list(manifest.missing) == ["rebuild"]
    assert list(manifest.formats) == ["pt2"]
    with pytest.raises(TunerError, match=r"cannot be rebuilt, it lacks rebuild: .*: build_model draws something that"):
        tuner.rebuild(exporting.output, objective=f"{exporting.path}:Signs")


OWN_OPERATOR = """
    @torch.library.custom_op("signs::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @twice.register_fake
    def _(x):
        return torch.empty_like(x)

    class Odd(Model):
        def forward(self, x):
            if self.training:
                return self.layers(x)
            return torch.ops.signs.twice(self.layers(x))  # here

    Signs.build_model = lambda self, params: Odd(4)
"""


@pytest.mark.slow
def test_an_operator_that_no_format_holds_is_named_and_the_weights_are_there(exporting, capsys):
    text = code(more=OWN_OPERATOR)
    exporting.start(text)
    manifest = exporting(formats=FORMATS, in_fresh_process=True).manifest
    line = next(number for number, its in enumerate(text.splitlines(), 1) if its.endswith("# here"))
    assert "got the operator 'torch.ops.signs.twice.default'" in manifest.missing["model.pt2"]
    assert manifest.missing["model.onnx"] == (
        f"ONNX has no form of the operator signs.twice ({exporting.path}, line {line})"
    )
    assert re.search(r"in a fresh process: .*signs::twice", manifest.missing["model.torchscript.pt"])
    assert list(manifest.formats) == ["safetensors"]
    assert list(manifest.files) == ["model.safetensors"]
    told = capsys.readouterr().err
    assert f"the export has no model.onnx: {manifest.missing['model.onnx']}; it has model.safetensors\n" in told


def test_a_trial_and_epochs_of_choice_are_exported(exporting):
    exporting.start(code())
    manifest = exporting(trial=2, epochs=25).manifest
    assert (manifest.trial, manifest.epochs, manifest.validation) == (2, 25, 0.7)
    assert manifest.retraining.schedule_epochs == 25
    assert list(manifest.formats) == ["safetensors", "pt2"]
    assert not manifest.formats["pt2"].fresh_process
    with pytest.raises(TunerError, match="study 'signs' has no such trial; 'tuner trials signs' lists them"):
        exporting(trial=7)


@pytest.mark.slow
def test_wrong_formats_are_told_before_anything_starts(tmp_path):
    tuner_ = Tuner({"TUNER_STORAGE": "postgresql://nobody@127.0.0.1:1/none"}, tmp_path)
    for options, exit_code, told in [
        (("--formats", "onnx,tflite"), 2, "--formats needs names of safetensors, pt2, onnx, torchscript, aoti"),
        (("--epochs", "0"), 2, "--epochs needs a whole number above 0, got 0"),
        (("--epochs", "2", "--full-schedule"), 2, "--epochs and --full-schedule both say how long to train"),
        (("--formats", "aoti"), 1, "the format aoti needs a compiler of C++, got none: there is no /nowhere/g++"),
    ]:
        refused = tuner_("export", "x", *options, CXX="/nowhere/g++")
        assert (refused.code, told in refused.error()) == (exit_code, True), refused.error()
