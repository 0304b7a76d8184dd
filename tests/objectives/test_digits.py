import inspect

import optuna
import pytest
import torch
from torch import nn

from objectives import digits
from objectives.digits import Digits
from tuner.data import tensors
from tuner.seeds import seed_everything
from tuner.study.sampling import discover

PARAMS = {"layers": 1, "units_0": 128, "dropout": 0.1, "lr": 3e-3, "batch_size": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Digits(seed=0).load_data(tmp_path_factory.mktemp("data"))


def rows_of(data):
    return [{tuple(row) for row in split.inputs.int().tolist()} for _, split in data.splits()]


def test_the_example_to_copy_is_short():
    assert len(inspect.getsource(digits).splitlines()) < 60


def test_all_images_are_used_and_in_one_split_each(data):
    assert [len(split) for _, split in data.splits()] == [1077, 360, 360]
    train, valid, test = rows_of(data)
    assert len(train | valid | test) == len(train) + len(valid) + len(test)


def test_every_split_has_every_digit_in_its_share(data):
    assert data.class_names == tuple("0123456789")
    for _, split in data.splits():
        shares = torch.bincount(split.targets, minlength=10) / len(split)
        assert shares.tolist() == pytest.approx([0.1] * 10, abs=0.01)


def test_the_splits_follow_from_the_study_s_seed(data, tmp_path):
    assert Digits(seed=0).load_data(tmp_path).fingerprint() == data.fingerprint()
    assert Digits(seed=1).load_data(tmp_path).fingerprint() != data.fingerprint()


@pytest.mark.parametrize(("max_layers", "units"), [(1, ["units_0"]), (3, ["units_0", "units_1", "units_2"])])
def test_a_layer_s_units_are_asked_for_where_the_layer_is(max_layers, units):
    found = discover(Digits(max_layers=max_layers))
    assert sorted(found) == sorted(["layers", "dropout", "lr", "batch_size", *units])
    study = optuna.create_study()
    study.enqueue_trial({"layers": 1})
    trial = study.ask()
    Digits(max_layers=max_layers).suggest(trial)
    assert [name for name in trial.params if name.startswith("units")] == ["units_0"]


@pytest.mark.parametrize("max_units", [16, 64, 100])
def test_an_option_bounds_the_units(max_units):
    trial = optuna.create_study().ask()
    Digits(max_units=max_units).suggest(trial)
    assert trial.params["units_0"] <= max_units


@pytest.mark.parametrize(("layers", "linear"), [(1, 2), (3, 4)])
def test_a_model_has_the_layers_of_its_params(layers, linear):
    model = Digits().build_model({"layers": layers, "dropout": 0.5, **{f"units_{n}": 16 + n for n in range(layers)}})
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [
        *(16 + n for n in range(layers)),
        10,
    ]
    assert sum(isinstance(layer, nn.Linear) for layer in model) == linear
    assert model(torch.rand(2, 64)).shape == (2, 10)


def test_a_few_epochs_give_a_sane_accuracy_and_the_same_again(data):
    def train():
        seed_everything(1)
        objective = Digits()
        model = objective.build_model(PARAMS)
        metrics = objective.build_metrics(data)
        return objective.fit(model, data.train, data.valid, PARAMS, metrics=metrics, epochs=4, seed=1)

    history = train()
    assert history[-1].metrics["accuracy"] > 0.94
    assert train() == history


def test_the_inputs_are_what_the_model_takes(data):
    assert [(tensor.dtype, tuple(tensor.shape[1:])) for tensor in tensors(data.train.inputs)] == [
        (torch.float32, (64,))
    ]
    assert data.train.targets.dtype == torch.int64
