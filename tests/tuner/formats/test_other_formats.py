"""ONNX, TorchScript and AOTInductor by themselves: what they refuse, and what is held against the model."""

import sys
import warnings

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from tuner.data import Split
from tuner.errors import FormatError, TunerError, UsageError
from tuner.formats import aoti, onnx_program, torchscript
from tuner.formats.calling import Names, onnx_names
from tuner.formats.names import chosen
from tuner.formats.parity import Sample, compared, compared_in_fresh_process
from tuner.formats.program import Predictor, Traced

ROWS = Split(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(9))
ONE = Names(inputs=(None,), outputs=(None,))


def _written(tmp_path, made_by, model, rows=ROWS):
    path = tmp_path / "model.pt2"
    path.write_bytes(made_by.write(Traced(model, rows)))
    return path


class Sums(nn.Linear):
    def forward(self, x, y):
        outputs = super().forward(torch.cat([x, y], 1))
        return outputs, outputs.sum(1)


class Loose(nn.Linear):
    def forward(self, *inputs, **named):
        return {"sums": super().forward(torch.cat([*inputs, *named.values()], 1))}


PAIR = (ROWS.inputs[:, :1], ROWS.inputs[:, 1:])


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [PAIR, dict(zip("xy", PAIR, strict=True))], ids=["in order", "by name"])
@pytest.mark.parametrize(
    "model", [Predictor(Sums(4, 2), lambda outputs: outputs[0]), Loose(4, 2)], ids=["one", "loose"]
)
def test_a_model_whose_arguments_have_no_names_of_their_own_is_held(tmp_path, inputs, model):
    rows = Split(inputs, ROWS.targets)
    sample, path = Sample(model.eval(), rows), _written(tmp_path, onnx_program, model, rows)
    assert compared("model.onnx", onnx_program.load(path, sample.names), sample).relative < 1e-5
    path = _written(tmp_path, torchscript, model, rows)
    assert compared("model.torchscript.pt", torchscript.load(path, sample.names), sample).relative < 1e-5


class CountsRows(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.ones(len(x)).sum() * torch.ones(4)


def test_a_trace_that_fixed_the_number_of_rows_is_refused(tmp_path):
    model = CountsRows(4, 4).eval()
    loaded = torchscript.load(_written(tmp_path, torchscript, model), ONE)
    with pytest.raises(FormatError, match=r"needs to give the model's outputs for 1 rows, got a difference of 3,"):
        compared("model.torchscript.pt", loaded, Sample(model, ROWS))


def test_a_format_that_gives_other_types_shapes_or_names_is_refused():
    sample = Sample(nn.Linear(4, 2).eval(), ROWS)
    for other, told in [
        (lambda x: x.double()[:, :2], r"\[1, 2\] of torch.float32, got \[1, 2\] of torch.float64"),
        (lambda x: x, r"\[1, 2\] of torch.float32, got \[1, 4\]"),
        (lambda x: {"a": x[:, :2]}, "needs the model's outputs, None, got a"),
        (lambda x: x[:, :2] * float("nan"), "a difference of inf"),
        (lambda x: x.missing, "cannot be called: AttributeError"),
    ]:
        loaded = nn.Module()
        loaded.forward = other
        with pytest.raises(FormatError, match=told):
            compared("it", loaded, sample)


def test_tracing_and_loading_a_trace_warn_of_nothing(tmp_path):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torchscript.load(_written(tmp_path, torchscript, nn.Linear(4, 2).eval()), ONE)
    assert told == []


def test_an_input_that_is_no_name_of_python_is_told():
    class Named(nn.Linear):
        def forward(self, **named):
            return super().forward(named["age-group"])

    rows = Split({"age-group": ROWS.inputs}, ROWS.targets)
    with pytest.raises(FormatError, match="TorchScript has arguments of Python's names, got age-group"):
        torchscript.write(Traced(Named(4, 2).eval(), rows))


def _model(domain="", **tensor):
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [2.0])
    for name, value in tensor.items():
        if name == "location":
            weight.ClearField("float_data")
            weight.data_location = TensorProto.EXTERNAL
            weight.external_data.add(key="location", value=value)
    shape = helper.make_tensor_value_info
    its = (shape(name, TensorProto.FLOAT, ["n", 1]) for name in ("input", "output"))
    node = helper.make_node("Mul", ["input", "w"], ["output"], domain=domain)
    graph = helper.make_graph([node], "it", [next(its)], [next(its)], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, 18)], ir_version=10)


def test_a_model_in_onnx_of_others_is_data(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(_model(), path)
    assert onnx_program.load(path, ONE)(torch.ones(3, 1)).tolist() == [[2.0]] * 3
    in_branch = _model()
    branch = helper.make_graph([helper.make_node("Evil", [], ["y"], domain="com.evil")], "b", [], [])
    in_branch.graph.node[0].attribute.append(helper.make_attribute("body", branch))
    own_function = _model()
    own_function.functions.append(helper.make_function("", "Mul", ["a", "b"], ["c"], [], [helper.make_opsetid("", 18)]))
    for model, told in [
        (_model(location="../secret"), "needs to hold its weights itself, got some that another file is to have"),
        (_model(domain="com.evil"), "needs to hold ONNX's own operators alone, got those of 'com.evil'"),
        (in_branch, "got those of 'com.evil'"),
        (own_function, "got functions"),
    ]:
        path.write_bytes(model.SerializeToString())
        with pytest.raises(FormatError, match=told):
            onnx_program.load(path, ONE)
    onnx.save(_model(), path)
    with pytest.raises(FormatError, match="needs the inputs and outputs a and output, got input and output"):
        onnx_program.load(path, Names(inputs=("a",), outputs=(None,)))
    path.write_bytes(b"\xff\xff")
    with pytest.raises(FormatError, match="needs to be a model of ONNX, got what cannot be read"):
        onnx_program.load(path, ONE)


def test_without_its_packages_onnx_is_refused_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not there
    with pytest.raises(TunerError, match=r"needs onnx, onnxruntime, got no onnxruntime: pip install 'tuner\[onnx\]'"):
        onnx_program.load(tmp_path / "model.onnx", ONE)


def test_names_in_onnx_are_those_of_the_model_and_no_two_the_same():
    assert onnx_names(ONE) == Names(inputs=("input",), outputs=("output",))
    several = Names(inputs=("a", "output_0"), outputs=("a", None))
    assert onnx_names(several) == Names(inputs=("a", "output_0"), outputs=("a_", "output_1"))


def test_formats_are_chosen_by_name_and_the_weights_are_always_there():
    assert chosen("onnx, pt2") == ("safetensors", "pt2", "onnx")
    with pytest.raises(UsageError, match="got 'ONNX'"):
        chosen("pt2,ONNX")


@pytest.mark.slow
def test_a_compiled_package_gives_the_models_outputs_by_name(tmp_path):
    class Two(nn.Linear):
        def forward(self, b, a):
            return {"x": super().forward(a) * b, "a": b}

    rows = Split({"a": ROWS.inputs, "b": torch.arange(9.0)[:, None]}, ROWS.targets)
    model = Two(4, 2).eval()
    path, sample = _written(tmp_path, aoti, model, rows), Sample(model, rows)
    assert compared_in_fresh_process("aoti", path, sample).fresh_process
    assert not compared("aoti", aoti.load(path, sample.names), sample).fresh_process
