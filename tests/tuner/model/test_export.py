"""From a study to a model: what is exported, how it is tested, and what is refused."""

import json
import os
import re
import textwrap
from importlib.metadata import version

import optuna
import pytest
import torch
from exporting import FUNCTION, code
from safetensors.torch import load_file, save_file

import tuner
from storage import open_storage
from storage.coordination import studies
from tuner.data import tensors
from tuner.errors import TunerError
from tuner.formats.program import PROGRAM
from tuner.formats.weights import WEIGHTS
from tuner.model.directory import CARD
from tuner.model.manifest import MANIFEST, read_manifest, sha256_of
from tuner.training import predict

LOAD_WITHOUT_PICKLE = """
import json, pathlib, pickle, sys
import torch
from safetensors.torch import load_file

def refuse(*_, **__):
    raise SystemExit("something was unpickled")

class Refusing:
    __init__ = __new__ = refuse

pickle.load = pickle.loads = pickle._load = pickle._loads = torch.load = refuse
pickle.Unpickler = pickle._Unpickler = Refusing

import tuner
for directory in map(pathlib.Path, sys.argv[1:]):
    model = tuner.load_model(directory)
    rows = load_file(directory / "rows")
    with torch.inference_mode():
        outputs = model(**rows) if "x" in rows else model(*(rows[name] for name in sorted(rows)))
    print(json.dumps({"training": model.training, "outputs": outputs.tolist()}))
"""


DESCRIBED = {
    "tensor": [(None, (3,), "float32")],
    "tuple": [(None, (2,), "float32"), (None, (1,), "float64")],
    "dict": [("x", (2,), "float32"), ("y", (1,), "float64")],
}


@pytest.mark.slow
def test_a_fresh_process_gets_the_same_predictions_without_unpickling_anything(exporting, start_python, tmp_path):
    wanted = []
    for kind, described in DESCRIBED.items():
        exporting.start(code(kind), name=kind)
        manifest = exporting(tmp_path / "models" / kind).manifest
        assert [(its.name, its.shape, its.dtype) for its in manifest.inputs] == described
        inputs = exporting.objective.load_data(tmp_path).test.inputs
        named = inputs if isinstance(inputs, dict) else dict(zip("01", tensors(inputs), strict=False))
        save_file({name: its.contiguous() for name, its in named.items()}, tmp_path / "models" / kind / "rows")
        # The weights in a model that the objective builds give what the exported program gives.
        model = exporting.objective.build_model(manifest.params)
        model.load_state_dict(load_file(tmp_path / "models" / kind / WEIGHTS))
        wanted.append(predict(model, inputs))
    process = start_python(LOAD_WITHOUT_PICKLE, *(str(tmp_path / "models" / kind) for kind in DESCRIBED))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    for line, outputs in zip(out.splitlines(), wanted, strict=True):
        found = json.loads(line)
        assert not found["training"]
        torch.testing.assert_close(torch.tensor(found["outputs"]), outputs)


def test_the_manifest_says_what_the_model_is_and_where_it_comes_from(exporting):
    exporting.start(code(), width=6)
    manifest = exporting().manifest
    assert read_manifest(exporting.output) == manifest
    data = exporting.objective.load_data(None)
    assert (manifest.study, manifest.study_id, manifest.trial) == ("signs", exporting.study.study_id, 1)
    assert (manifest.objective, manifest.code_hash) == ("signs.py:Signs", exporting.source.code_hash())
    assert (manifest.params, manifest.options) == ({"lr": 0.05}, {"width": 6})
    assert (manifest.metric, manifest.direction, manifest.validation, manifest.epochs) == (
        "accuracy",
        "maximize",
        0.9,
        2,
    )
    assert manifest.data == {"fingerprint": data.fingerprint(), "train": 40, "valid": 40, "test": 40}
    assert manifest.class_names == ("negative", "positive")
    assert manifest.versions["torch"] == version("torch")
    assert manifest.trained_on == "cpu"
    assert manifest.hardware["cores"] == str(os.cpu_count())
    assert (manifest.study_seed, manifest.git_revision, manifest.data_license) == (5, None, None)
    assert manifest.search.trials["complete"] == 3
    details = manifest.test_details
    low, high = details.intervals["accuracy"]
    assert low <= manifest.test["accuracy"] <= high
    assert (details.rows, details.resamples) == (40, {"accuracy": 1000})
    (classes,) = details.classes.values()
    assert sum(map(sum, classes.confusion)) == 40
    assert 0 <= classes.calibration_error <= 1
    assert sorted(path.name for path in exporting.output.iterdir()) == sorted([CARD, WEIGHTS, PROGRAM, MANIFEST])
    assert manifest.files == {name: sha256_of(exporting.output / name) for name in (WEIGHTS, PROGRAM)}
    model = tuner.load_model(exporting.output)
    with torch.inference_mode():
        right = model(data.test.inputs).argmax(1) == data.test.targets
    assert manifest.test == {"accuracy": pytest.approx(float(right.float().mean()))}


def test_test_is_evaluated_once_for_the_same_weights(exporting, capsys, tmp_path):
    exporting.start(code())
    first = exporting()
    recorded = exporting.recorded()
    assert recorded == [(1, first.manifest.files[WEIGHTS], first.manifest.test)]
    # A figure that no evaluation gives shows that the recorded one is taken.
    other = {"accuracy": 0.123}
    studies.record_export(exporting.engine, exporting.study.study_id, 1, "0" * 64, other)
    again = exporting(tmp_path / "again")
    assert again.manifest.test == first.manifest.test
    assert again.manifest.files[WEIGHTS] == first.manifest.files[WEIGHTS]
    assert len(exporting.recorded()) == 2
    assert "was evaluated" not in capsys.readouterr().err


@pytest.mark.slow
def test_the_recorded_figures_are_those_that_the_manifest_says(exporting):
    exporting.start(code())
    sha256 = exporting().manifest.files[WEIGHTS]
    with exporting.engine.begin() as conn:
        conn.exec_driver_sql("""update tuner_exports set test_metrics = '{"accuracy": 0.125}'""")
    assert exporting().manifest.test == {"accuracy": 0.125}
    assert exporting.recorded() == [(1, sha256, {"accuracy": 0.125})]


def test_other_weights_are_tested_with_a_warning(exporting, capsys):
    exporting.start(code())
    exporting()
    in_optuna = optuna.load_study(study_name="signs", storage=open_storage(exporting.database))
    in_optuna.add_trial(optuna.trial.create_trial(value=0.99, user_attrs={"epoch": 1}))
    manifest = exporting().manifest
    assert manifest.trial == 3
    assert [(its.trial, its.weights_sha256) for its in manifest.tested_before] == [(1, exporting.recorded()[0][1])]
    assert "was used 1 times before" in (exporting.output / CARD).read_text()
    assert [number for number, _, _ in exporting.recorded()] == [1, 3]
    assert "the test split was evaluated 1 times before" in capsys.readouterr().err


def test_a_trial_that_says_no_epoch_is_retrained_for_all_of_them(exporting):
    exporting.start(code(), epoch=None)
    assert exporting().manifest.epochs == 20


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (
            "def build_model(self, params): return params['units']",
            "retraining trial 1 failed: KeyError: 'units' (FILE, line LINE)",
        ),
        (
            "def build_loss(self, params, train): return lambda outputs, targets: outputs.sum() * float('nan')",
            "retraining trial 1 failed: DivergedError: the training loss is nan in epoch 1",
        ),
        (
            "def load_data(self, root): raise OSError('no images here')",
            "Signs.load_data('DIR') failed: OSError: no images here (FILE, line LINE)",
        ),
    ],
)
def test_an_objective_that_fails_leaves_no_output_and_no_record(exporting, method, told):
    text = code() + f"\n    {method}\n"
    exporting.start(text)
    with pytest.raises(TunerError) as caught:
        exporting()
    told = told.replace("FILE", str(exporting.path)).replace("DIR", str(exporting.data_dir))
    assert told.replace("LINE", str(len(text.splitlines()))) in str(caught.value)
    assert not exporting.output.exists()
    assert exporting.recorded() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "forward",
    [
        "return torch.tensor(x.numpy().round()) @ self.layers[1].weight.T[:, :2]",
        "return self.layers(x) if x.sum() > 0 else self.layers(-x)",
    ],
)
def test_a_model_that_cannot_be_carried_by_torch_export_keeps_its_weights(exporting, forward, capfd):
    exporting.start(
        code(
            more=f"""
            class Odd(Model):
                def forward(self, x):
                    if self.training:
                        return self.layers(x)
                    {forward}

            Signs.build_model = lambda self, params: Odd(4)
            """
        )
    )
    manifest = exporting().manifest
    reason = manifest.missing[PROGRAM]
    assert re.fullmatch(rf"\w+: .+ \({re.escape(str(exporting.path))}, line \d+\)", reason), reason
    assert f"the export has no {PROGRAM}: {reason}" in capfd.readouterr().err
    _assert_without_program(exporting, manifest)
    with pytest.raises(TunerError) as caught:
        tuner.load_model(exporting.output)
    assert str(caught.value) == (
        f"{exporting.output} has no model.pt2 that could be called ({reason});"
        " its weights are in model.safetensors, for a model that signs.py:Signs builds from the manifest's params,"
        " as tuner.rebuild does"
    )


def _assert_without_program(exporting, manifest):
    """What an export without a program still has: weights, figures and the manifest."""
    assert sorted(path.name for path in exporting.output.iterdir()) == sorted([CARD, WEIGHTS, MANIFEST])
    assert manifest.files == {WEIGHTS: sha256_of(exporting.output / WEIGHTS)}
    assert read_manifest(exporting.output) == manifest
    exporting.objective.build_model(manifest.params).load_state_dict(load_file(exporting.output / WEIGHTS))
    assert exporting.recorded() == [(1, manifest.files[WEIGHTS], manifest.test)]


def test_an_earlier_program_does_not_stay_beside_weights_that_are_not_its(exporting, monkeypatch):
    exporting.start(code())
    exporting()
    (exporting.output / "notes.txt").touch()

    class Odd(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.zeros(len(x), 2)

    monkeypatch.setattr(exporting.source.load(), "build_model", lambda self, params: Odd(3, 2))
    assert PROGRAM in exporting().manifest.missing
    assert sorted(path.name for path in exporting.output.iterdir()) == sorted([CARD, WEIGHTS, MANIFEST, "notes.txt"])


def test_a_program_that_gives_other_outputs_is_left_out(exporting):
    exporting.start(
        code(
            more="""
            class Random(Model):
                def forward(self, x):
                    return self.layers(x) + torch.rand(())

            Signs.build_model = lambda self, params: Random(4)
            """
        )
    )
    manifest = exporting().manifest
    assert "gives other outputs for the same rows each time" in manifest.missing[PROGRAM]
    _assert_without_program(exporting, manifest)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_figure_that_is_no_number_is_null_and_can_be_exported_again(exporting, value, tmp_path):
    exporting.start(
        code(
            more=f"""
            from torchmetrics import Metric

            class Odd(Metric):
                def update(self, outputs, targets):
                    pass

                def compute(self):
                    return torch.tensor(float("{value}"))

            build = Signs.build_metrics
            Signs.build_metrics = lambda self, data: build(self, data) | {{"odd": Odd()}}
            """
        )
    )
    first = exporting().manifest
    assert first.test["odd"] is None
    assert 0 < first.test["accuracy"] <= 1
    assert json.loads((exporting.output / MANIFEST).read_text())["test"] == first.test
    assert exporting(tmp_path / "again").manifest.test == first.test
    assert exporting.recorded() == [(1, first.files[WEIGHTS], first.test)]
    assert tuner.load_model(exporting.output).manifest == first


def test_a_test_split_that_cannot_be_evaluated_costs_its_figures_alone(exporting):
    text = code(
        more="""
        from torchmetrics import Metric

        class Picky(Metric):
            def update(self, outputs, targets):
                raise ValueError("no rows of the class")  # here

            def compute(self):
                return torch.tensor(0.0)

        Signs.build_metrics = lambda self, data: {"accuracy": Picky()}
        """
    )
    exporting.start(text)
    manifest = exporting().manifest
    line = next(number for number, line in enumerate(text.splitlines(), 1) if line.endswith("# here"))
    assert manifest.test == {}
    assert manifest.missing == {
        "test": "the test split could not be evaluated: ValueError: no rows of the class, in Picky"
        f" ({exporting.path}, line {line})"
    }
    assert tuner.load_model(exporting.output)(torch.zeros(3, 3)).shape == (3, 2)
    assert exporting.recorded() == []


def test_what_safetensors_cannot_hold_is_told_and_the_rest_is_there(exporting):
    exporting.start(
        code(
            more="""
            class Odd(Model):
                def __init__(self, width):
                    super().__init__(width)
                    self.register_buffer("limits", torch.tensor([float("nan"), 1.0]))
                    self.register_buffer("fine", torch.ones(2, dtype=torch.complex128))

                def get_extra_state(self):
                    return {"words": ["a"]}

                def set_extra_state(self, state):
                    pass

            Signs.build_model = lambda self, params: Odd(4)
            """
        )
    )
    manifest = exporting().manifest
    assert manifest.missing == {
        "model.safetensors: fine": "safetensors holds no complex128",
        "model.safetensors: _extra_state": "it is dict and no tensor",
    }
    assert load_file(exporting.output / WEIGHTS)["limits"].isnan().tolist() == [True, False]
    assert tuner.load_model(exporting.output)(torch.zeros(3, 3)).shape == (3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_validation_rows_do_not_fix_the_batch_size(exporting, rows):
    more = f"""
        load = Signs.load_data
        def few(self, root):
            data = load(self, root)
            return Data(data.train, data.valid.rows(slice(0, {rows})), data.test, data.class_names)
        Signs.load_data = few
        """
    exporting.start(code(more=more))
    exporting()
    model = tuner.load_model(exporting.output)
    assert [len(model(torch.rand(n, 3))) for n in (1, 2, 7)] == [1, 2, 7]


def test_a_plain_function_has_no_model_and_says_so(exporting):
    exporting.start(FUNCTION, "loss")
    with pytest.raises(TunerError, match=r"signs.py:loss is a plain function and has no model to export: let it call"):
        exporting()
    assert not exporting.output.exists()


def test_a_study_without_a_complete_trial_has_nothing_to_export(exporting):
    exporting.start(code(), values=())
    with pytest.raises(TunerError, match="study 'signs' has no complete trial yet"):
        exporting()
    assert not exporting.output.exists()


def test_a_model_with_constants_and_buffers_is_exported(exporting):
    exporting.start(
        code(
            more="""
            class Scaled(Model):
                def __init__(self):
                    super().__init__(4)
                    self.scale = torch.tensor([2.0, 3.0])
                    self.register_buffer("shift", torch.ones(2), persistent=False)

                def forward(self, x):
                    return self.layers(x) * self.scale + self.shift * torch.tensor([0.5, 1.5])

            Signs.build_model = lambda self, params: Scaled()
            """
        )
    )
    exporting()
    assert tuner.load_model(exporting.output)(torch.zeros(3, 3)).shape == (3, 2)


TWO_OUTPUTS = """
    class Two(Model):
        def __init__(self):
            super().__init__(4)
            self.size = nn.Linear(3, 1)

        def forward(self, x, y=None):
            classes = super().forward(x, y)
            return {"classes": classes, "size": self.size(x if y is None else torch.cat([x, y.float()], 1))}

    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs["classes"], targets) + outputs["size"].square().mean()

    Signs.build_model = lambda self, params: Two()
    Signs.build_loss = lambda self, params, train: loss
    Signs.prediction = lambda self, outputs: outputs["classes"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_a_model_of_several_outputs_is_exported_as_its_prediction(exporting, kind):
    exporting.start(code(kind=kind, more=TWO_OUTPUTS), name=kind)
    exporting()
    inputs = exporting.objective.load_data(None).test.inputs
    loaded = tuner.load_model(exporting.output)
    found = loaded(**inputs) if kind == "dict" else loaded(*tensors(inputs))
    assert found.shape == (40, 2)
    assert "size.weight" in load_file(exporting.output / WEIGHTS)


@pytest.mark.slow
def test_an_objective_of_samples_is_exported_with_its_test_figure(exporting):
    exporting.start(
        code(
            more="""
            from tuner.data import Samples

            in_memory = Signs.load_data

            def load_data(self, root):
                data = in_memory(self, root)
                return Data(*(Samples(split) for _, split in data.splits()), class_names=data.class_names)

            Signs.load_data = load_data
            """
        )
    )
    manifest = exporting().manifest
    assert (manifest.data["train"], manifest.data["test"]) == (40, 40)
    assert 0 < manifest.test["accuracy"] <= 1
    assert [described.shape for described in manifest.inputs] == [(3,)]


WHERE = """
    from torchmetrics import Metric

    class OnCuda(Metric):
        def __init__(self):
            super().__init__()
            self.n = 0

        def update(self, outputs, targets):
            self.n += int(outputs.is_cuda and targets.is_cuda) * len(targets)

        def compute(self):
            return torch.tensor(float(self.n))

    in_memory = Signs.load_data
    Signs.build_metrics = lambda self, data: {"accuracy": OnCuda()}
"""

AS_SAMPLES = """
    def load_data(self, root):
        from tuner.data import Samples

        data = in_memory(self, root)
        return Data(data.train, data.valid, Samples(data.test), class_names=data.class_names)

    Signs.load_data = load_data
"""


@pytest.mark.cuda
@pytest.mark.parametrize("more", ["", AS_SAMPLES], ids=["tensors", "samples"])
def test_test_is_evaluated_where_the_model_was_trained(exporting, more):
    exporting.start(code(more=textwrap.dedent(WHERE) + textwrap.dedent(more)))
    manifest = exporting(device="cuda").manifest
    assert manifest.trained_on == "cuda:0"
    assert manifest.test == {"accuracy": 40.0}
    outputs = tuner.load_model(exporting.output)(torch.zeros(2, 3))
    assert (outputs.device.type, outputs.shape) == ("cpu", (2, 2))
