import gzip

import pytest
import torch
from safetensors.torch import load_file
from searching import a_slice, counted, some_params, train
from sklearn import metrics as sk
from torch import nn
from torchvision import datasets

from objectives.fashion_mnist import FashionMNIST
from tuner.data import Split, split_in_two
from tuner.errors import TunerError
from tuner.formats.weights import WEIGHTS
from tuner.slot.attempt import load_data
from tuner.study.sampling import discover
from tuner.training import predict

COMMON = {
    "dropout": 0.1,
    "optimizer": "adam",
    "lr": 1e-3,
    "schedule": "cosine",
    "weight_decay": 1e-5,
    "label_smoothing": 0.05,
    "batch_size": 32,
}
MLP = {"model": "mlp", "layers": 2, "units_0": 300, "units_1": 100, **COMMON}
CNN = {"model": "cnn", "channels": 8, **COMMON}
BRANCHES = [
    *({"model": "mlp", "layers": layers} for layers in (1, 2, 3)),
    {"model": "cnn"},
    *({"optimizer": name, "model": "mlp"} for name in ("sgd", "momentum", "adam", "adamw")),
    *({"schedule": name, "model": "mlp"} for name in ("constant", "cosine")),
]


@pytest.fixture(scope="module")
def data(real_data):
    return FashionMNIST().load_data(real_data)


def test_images_stay_in_bytes(data):
    for _, split in data.splits():
        assert (split.inputs.dtype, split.inputs.shape[1:]) == (torch.uint8, (1, 28, 28))
        assert split.targets.dtype == torch.int64


def test_every_image_is_in_one_split(data, real_data):
    for is_train, splits in ((True, (data.train, data.valid)), (False, (data.test,))):
        files = datasets.FashionMNIST(real_data, train=is_train)
        assert counted(*splits) == counted(Split(files.data, files.targets))
    assert len(data.valid) == pytest.approx((len(data.train) + len(data.valid)) / 12, abs=1)


def test_the_whole_of_it_is_split_into_55_and_5_thousand():
    labels = torch.arange(60_000) % 10
    train_rows, valid = split_in_two(Split(labels, labels), 1 / 12, stratified=True)
    assert (len(train_rows), len(valid)) == (55_000, 5_000)
    assert valid.targets.bincount().tolist() == [500] * 10


def test_the_splits_follow_from_the_study_s_seed(data, real_data):
    assert FashionMNIST().load_data(real_data).fingerprint() == data.fingerprint()
    other = FashionMNIST(seed=1).load_data(real_data)
    assert counted(other.valid) != counted(data.valid)
    assert counted(other.test) == counted(data.test)


def test_the_textbook_s_own_space_is_an_option(data):
    objective = FashionMNIST(models="mlp")
    space = discover(objective)
    assert {name: (its.low, its.high, its.log) for name, its in space.items()} == {
        "lr": (1e-5, 1e-1, True),
        "units": (20, 300, False),
    }
    (params,) = some_params(objective, {"units": 20, "lr": 0.05})
    model, history = train(objective, a_slice(data), params, epochs=2)
    widths = [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert widths == [20, 20, 10]
    optimizer = objective.build_optimizer(model, params)
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0, 0)
    assert objective.build_scheduler(optimizer, params, 2) is None
    assert objective.batch_size(params) == 32
    assert history[1].train_loss < history[0].train_loss


def test_the_space_has_the_models_of_the_textbook():
    found = discover(FashionMNIST())
    for name, units in (("units_0", (300, 512)), ("units_1", (100, 512))):
        assert all(found[name]._contains(value) for value in units)
    assert {"channels", "momentum", "units_2"} <= found.keys()


def test_every_branch_of_the_space_trains(data):
    objective, small = FashionMNIST(), a_slice(data)
    tried = some_params(objective, *BRANCHES)
    assert set().union(*tried) == discover(objective).keys()
    for params in tried:
        _, history = train(objective, small, params)
        assert 0 < history[-1].train_loss < 100
        assert 0 <= history[-1].metrics["accuracy"] <= 1


@pytest.mark.parametrize(
    ("name", "kind", "momentum"),
    [("sgd", "SGD", 0), ("momentum", "SGD", 0.9), ("adam", "Adam", None), ("adamw", "AdamW", None)],
)
def test_the_optimizer_is_that_of_the_params(name, kind, momentum):
    params = {**MLP, "optimizer": name, **({"momentum": momentum} if momentum else {})}
    optimizer = FashionMNIST().build_optimizer(nn.Linear(2, 2), params)
    (group,) = optimizer.param_groups
    assert type(optimizer).__name__ == kind
    assert (group["lr"], group["weight_decay"], group.get("momentum")) == (1e-3, 1e-5, momentum)


def test_the_learning_rate_is_constant_or_falls_to_0():
    rates = {}
    for schedule in ("constant", "cosine"):
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
        scheduler = FashionMNIST().build_scheduler(optimizer, {"schedule": schedule}, 2)
        for _ in range(2 if scheduler else 0):
            optimizer.step()
            scheduler.step()
        rates[schedule] = optimizer.param_groups[0]["lr"]
    assert rates == {"constant": 0.1, "cosine": pytest.approx(0)}


@pytest.mark.parametrize("params", [MLP, CNN])
def test_a_model_scales_bytes_to_0_to_1(data, params):
    model = FashionMNIST().build_model(params).eval()
    images = data.valid.inputs[:8]
    torch.testing.assert_close(model(images), model[1:](images / 255))


def test_metrics_are_those_of_scikit_learn(data):
    model, history = train(FashionMNIST(), a_slice(data, 2000), MLP)
    valid = data.valid
    scores = predict(model, valid.inputs)
    found = history[-1].metrics
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(valid.targets, scores.argmax(1)))
    assert found["top_3_accuracy"] == pytest.approx(sk.top_k_accuracy_score(valid.targets, scores, k=3))
    of_each = sk.recall_score(valid.targets, scores.argmax(1), average=None)
    names = [f"accuracy {name}" for name in data.class_names]
    assert [found[name] for name in names] == pytest.approx(of_each.tolist())
    assert len(names) == 10


@pytest.mark.slow
@pytest.mark.parametrize(("params", "level"), [(MLP, 0.79), (CNN, 0.8)], ids=["mlp", "cnn"])
def test_two_epochs_reach_a_sane_accuracy(data, params, level):
    _, history = train(FashionMNIST(), data, params, epochs=2)
    assert history[-1].metrics["accuracy"] > level


@pytest.mark.slow
@pytest.mark.parametrize("params", [MLP, CNN], ids=["mlp", "cnn"])
def test_the_exported_model_takes_bytes_and_gives_the_model_s_outputs(data, exported, tmp_path, params):
    loaded = exported("fashion_mnist.py:FashionMNIST", params)
    (described,) = loaded.manifest.inputs
    assert (described.shape, described.dtype) == ((1, 28, 28), "uint8")
    assert {"accuracy", "top_3_accuracy", "accuracy Ankle boot"} <= loaded.manifest.test.keys()
    model = FashionMNIST().build_model(params)
    model.load_state_dict(load_file(tmp_path / "model" / WEIGHTS))
    images = data.test.inputs[:100]
    torch.testing.assert_close(loaded(images), predict(model, images))


def test_missing_data_that_cannot_be_downloaded_is_told_in_one_line(tmp_path, offline):
    with pytest.raises(TunerError) as caught:
        load_data(FashionMNIST(), tmp_path)
    message = str(caught.value)
    assert message.startswith(
        f"FashionMNIST.load_data('{tmp_path}') failed: DataError: Fashion-MNIST's training part is not in {tmp_path}"
    )
    assert "copy it there from a machine that has it" in message
    assert "\n" not in message


@pytest.mark.parametrize("n_bytes", [0, 3, 100, 4000])
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train-images-idx3-ubyte", "training"),
        ("train-labels-idx1-ubyte", "training"),
        ("t10k-images-idx3-ubyte", "test"),
        ("t10k-labels-idx1-ubyte", "test"),
    ],
)
def test_a_file_that_was_cut_off_is_told_with_its_part(cut, offline, name, part, n_bytes):
    directory = cut(f"FashionMNIST/raw/{name}", n_bytes)
    with pytest.raises(TunerError) as caught:
        load_data(FashionMNIST(), directory)
    message = str(caught.value)
    assert message.startswith(
        f"FashionMNIST.load_data('{directory}') failed: DataError:"
        f" Fashion-MNIST's {part} part in {directory} is damaged or incomplete ("
    )
    assert "delete its files there, to have them downloaded" in message
    assert "\n" not in message


def test_a_download_that_was_cut_off_is_not_taken_for_the_whole(real_data, tmp_path, offline):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (real_data / "FashionMNIST" / "raw").iterdir():
        (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1)[:1000])
    with pytest.raises(TunerError, match=r"Fashion-MNIST's training part is not in .* and cannot be downloaded"):
        load_data(FashionMNIST(), tmp_path)
