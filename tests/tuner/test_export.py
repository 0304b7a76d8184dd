import json
import os
import pickle
import shutil
import subprocess
import textwrap
import zipfile
from importlib.metadata import version
from pathlib import Path

import optuna
import pytest
import torch
from safetensors.torch import load_file, save_file

import tuner
from storage import open_engine, open_storage, studies
from tuner.data import tensors
from tuner.errors import TunerError
from tuner.export import check_output, export_study
from tuner.log import Log
from tuner.model import MANIFEST, PROGRAM, WEIGHTS, read_manifest, sha256_of
from tuner.registry import find_objective
from tuner.spec import Budget
from tuner.study import create_study, plan
from tuner.training import predict

OBJECTIVE = """
    import torch
    from torch import nn
    from tuner.data import Data, Split
    from tuner.objective import Objective

    KIND = "{kind}"

    class Model(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layers = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))

        def forward(self, x, y=None):
            return self.layers(x if y is None else torch.cat([x, y.float()], 1))

    class Signs(Objective):
        width: int = 4

        def suggest(self, trial):
            trial.suggest_float("lr", 0.01, 0.1)

        def load_data(self, root):
            splits = []
            for seed in range(3):
                x = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))
                pair = (x[:, :2], x[:, 2:].double())
                inputs = {{"tensor": x, "tuple": pair, "dict": dict(zip("xy", pair, strict=True))}}[KIND]
                splits.append(Split(inputs, (x[:, 0] > 0).long()))
            return Data(*splits, class_names=("negative", "positive"))

        def build_model(self, params):
            return Model(self.width)

    {more}
"""
FUNCTION = """
    def loss(trial):
        return trial.suggest_float("x", -1, 1) ** 2
"""


class Exporting:
    """A study with finished trials, and what export_study takes."""

    def __init__(self, database, tmp_path):
        self.database = database
        self.engine = open_engine(database)
        self.path = tmp_path / "mine.py"
        self.data_dir = tmp_path
        self.output = tmp_path / "model"

    def start(self, code, attribute="Signs", *, name="signs", epoch=2, values=(0.5, 0.9, 0.7), **options):
        self.path = self.path.with_stem(name)
        self.path.write_text(textwrap.dedent(code))
        self.source = find_objective(f"{self.path}:{attribute}")
        spec, self.objective = plan(
            self.source,
            self.source.load(),
            options=options,
            budget=Budget(trials=3),
            epochs=None,
            sampler="tpe",
            pruner="median",
            direction=None,
            seed=5,
        )
        self.study = create_study(self.engine, name, spec)
        in_optuna = optuna.load_study(study_name=name, storage=open_storage(self.database))
        for value in values:
            in_optuna.add_trial(
                optuna.trial.create_trial(
                    value=value,
                    params={"lr": 0.05},
                    distributions={"lr": optuna.distributions.FloatDistribution(0.01, 0.1)},
                    user_attrs={"epoch": epoch} if epoch else {},
                )
            )
        return self

    def __call__(self, output=None):
        return export_study(
            self.engine,
            self.study,
            self.source,
            output=output or self.output,
            data_dir=self.data_dir,
            device="cpu",
            log=Log(),
        )

    def recorded(self):
        return studies.list_exports(self.engine, self.study.study_id)


@pytest.fixture
def exporting(database, tmp_path):
    made = Exporting(database, tmp_path)
    yield made
    made.engine.dispose()


def code(kind="tensor", more=""):
    return textwrap.dedent(OBJECTIVE).format(kind=kind, more=textwrap.dedent(more))


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
    assert sorted(path.name for path in exporting.output.iterdir()) == sorted([WEIGHTS, PROGRAM, MANIFEST])
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
    assert exporting().manifest.trial == 3
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


@pytest.mark.parametrize(
    "forward",
    [
        "return torch.tensor(x.numpy().round()) @ self.layers[1].weight.T[:, :2]",
        "return self.layers(x) if x.sum() > 0 else self.layers(-x)",
    ],
)
def test_a_model_that_cannot_be_carried_by_torch_export_is_told(exporting, forward, capfd):
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
    with pytest.raises(TunerError, match=r"torch.export cannot export this model: \w+: ") as caught:
        exporting()
    assert "\n" not in str(caught.value)
    assert not exporting.output.exists()
    assert exporting.recorded() == []


def test_a_program_that_gives_other_outputs_is_refused(exporting):
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
    with pytest.raises(TunerError, match=r"model.pt2 needs to give the model's outputs, got a difference of 0\.\d"):
        exporting()
    assert not exporting.output.exists()
    assert exporting.recorded() == []


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
    with pytest.raises(TunerError, match=r"signs.py:loss is a plain function and has no model to export; write it as"):
        exporting()
    assert not exporting.output.exists()


def test_a_study_without_a_complete_trial_has_nothing_to_export(exporting):
    exporting.start(code(), values=())
    with pytest.raises(TunerError, match="study 'signs' has no complete trial yet"):
        exporting()
    assert not exporting.output.exists()


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


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where one export is kept for this module's tests to copy."""
    return tmp_path_factory.mktemp("kept") / "model"


@pytest.fixture
def export_copy(exporting, kept, tmp_path):
    """An export of the test's own."""
    if not kept.exists():
        exporting.start(code())
        exporting(kept)
    return shutil.copytree(kept, tmp_path / "copy")


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
    with pytest.raises(TunerError, match="needs to hold plain tensors and a program, got archive/data"):
        tuner.load_model(export_copy)


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


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_a_model_of_several_outputs_is_exported_as_its_prediction(exporting, kind):
    exporting.start(code(kind=kind, more=TWO_OUTPUTS), name=kind)
    exporting()
    inputs = exporting.objective.load_data(None).test.inputs
    loaded = tuner.load_model(exporting.output)
    found = loaded(**inputs) if kind == "dict" else loaded(*tensors(inputs))
    assert found.shape == (40, 2)
    assert "size.weight" in load_file(exporting.output / WEIGHTS)


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


def test_the_manifest_is_moved_last(exporting, monkeypatch):
    moved = []
    replace = os.replace

    def watch(source, target):
        moved.append((target.name, sha256_of(source)))
        replace(source, target)

    exporting.start(code())
    monkeypatch.setattr(os, "replace", watch)
    exporting()
    assert [name for name, _ in moved] == [WEIGHTS, PROGRAM, MANIFEST]


def test_a_second_export_takes_the_place_of_the_first_and_leaves_other_files(exporting):
    exporting.start(code())
    exporting()
    (exporting.output / "notes.txt").write_text("mine")
    before = read_manifest(exporting.output)
    assert exporting().manifest.files[WEIGHTS] == before.files[WEIGHTS]
    names = sorted(path.name for path in exporting.output.iterdir())
    assert names == sorted([WEIGHTS, PROGRAM, MANIFEST, "notes.txt"])
    tuner.load_model(exporting.output)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount program here")
    if done.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def _files(directory):
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _pages(*paths):
    return sum(-(-path.stat().st_size // os.sysconf("SC_PAGE_SIZE")) for path in paths)


@pytest.mark.parametrize(
    "fits", [(), (WEIGHTS,), (WEIGHTS, PROGRAM)], ids=["nothing", "the weights", "all but the manifest"]
)
def test_a_full_disk_leaves_the_old_export_and_nothing_half_written(exporting, small_disk, export_copy, fits):
    output = small_disk / "model"
    shutil.copytree(export_copy, output)
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        disk = os.statvfs(small_disk)
        free = disk.f_bavail - _pages(*(export_copy / name for name in fits))
        filler.write(b"x" * free * disk.f_frsize)
    before = _files(small_disk)
    exporting.start(code())
    with pytest.raises(TunerError) as caught:
        exporting(output)
    assert str(caught.value) == (
        f"cannot write the model to {output}: No space left on device; free some space or choose another --output"
    )
    assert _files(small_disk) == before
    assert sorted(path.name for path in output.iterdir()) == sorted([WEIGHTS, PROGRAM, MANIFEST])
    tuner.load_model(output)
    # Once the test split has been evaluated, that stays on record.
    assert len(exporting.recorded()) == (1 if PROGRAM in fits else 0)


def test_a_full_disk_without_an_old_export_leaves_nothing(exporting, small_disk):
    (small_disk / "filler").write_bytes(b"x" * 120_000)
    exporting.start(code())
    with pytest.raises(TunerError, match="No space left on device"):
        exporting(small_disk / "new" / "model")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_an_output_that_is_a_file_is_refused_before_training(exporting, tmp_path):
    (tmp_path / "file").touch()
    exporting.start(code())
    for output in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(TunerError, match=r"needs to be a directory, got .*file.*; choose another --output"):
            exporting(output)
    assert (tmp_path / "file").read_bytes() == b""


def test_an_output_that_cannot_be_written_is_refused():
    with pytest.raises(TunerError, match=r"cannot write to /proc: .*; choose another --output"):
        check_output(Path("/proc/model"))


def test_looking_at_an_output_leaves_nothing_behind(tmp_path):
    check_output(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
