import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from searching import a_slice, counted, some_params, train
from sklearn import metrics as sk
from sklearn.datasets import fetch_california_housing
from torch import nn

from objectives.california_housing import CaliforniaHousing, WideAndDeep, WideAndDeepModel
from tuner.data import Data, Split
from tuner.errors import TunerError
from tuner.formats.weights import WEIGHTS
from tuner.slot.attempt import load_data
from tuner.study.sampling import discover
from tuner.training import EVALUATION_ROWS, predict

COMMON = {"loss": "mse", "lr": 3e-3, "weight_decay": 1e-4, "max_grad_norm": 1.0, "batch_size": 64}
LINEAR = {"layers": 0, **COMMON}
MLP = {"layers": 2, "units_0": 64, "units_1": 32, "dropout": 0.0, **COMMON}
WIDE_AND_DEEP = {**MLP, "auxiliary_share": 0.1}


@pytest.fixture(scope="module")
def data(real_data):
    return CaliforniaHousing().load_data(real_data)


@pytest.fixture(scope="module")
def named(real_data):
    return WideAndDeep().load_data(real_data)


def test_every_district_is_in_one_split(data, real_data):
    features, targets = fetch_california_housing(data_home=real_data / "scikit_learn", return_X_y=True)
    whole = Split(torch.tensor(features).float(), torch.tensor(targets).float())
    assert counted(*(split for _, split in data.splits())) == counted(whole)
    assert [len(split) for _, split in data.splits()] == [12384, 4128, 4128]
    for _, split in data.splits():
        assert (split.inputs.dtype, split.inputs.shape[1:]) == (torch.float32, (8,))
        assert (split.targets.dtype, split.targets.dim()) == (torch.float32, 1)


def test_wide_gets_the_first_five_features_and_deep_the_last_six(data, named):
    for (_, plain), (_, split) in zip(data.splits(), named.splits(), strict=True):
        assert split.inputs.keys() == {"wide", "deep"}
        assert torch.equal(split.inputs["wide"], plain.inputs[:, 0:5])
        assert torch.equal(split.inputs["deep"], plain.inputs[:, 2:8])


def test_the_splits_follow_from_the_study_s_seed(data, real_data):
    assert CaliforniaHousing().load_data(real_data).fingerprint() == data.fingerprint()
    assert counted(CaliforniaHousing(seed=1).load_data(real_data).test) != counted(data.test)


def test_features_are_standardised_by_the_training_rows_alone(data):
    others = Split(data.valid.inputs * 1000, data.valid.targets)
    for valid in (data.valid, others):
        model, _ = train(CaliforniaHousing(), Data(data.train, valid, others), LINEAR)
        standardised = model[0](data.train.inputs)
        assert standardised.mean(0).tolist() == pytest.approx([0] * 8, abs=1e-3)
        assert standardised.std(0, correction=0).tolist() == pytest.approx([1] * 8, rel=1e-3)


def test_both_inputs_are_standardised(named):
    model, _ = train(WideAndDeep(), named, WIDE_AND_DEEP)
    for layer, rows in ((model.wide, named.train.inputs["wide"]), (model.deep, named.train.inputs["deep"])):
        assert layer(rows).std(0, correction=0).tolist() == pytest.approx([1] * rows.shape[1], rel=1e-3)


def test_no_hidden_layer_makes_it_linear_regression(data):
    model, _ = train(CaliforniaHousing(), a_slice(data), LINEAR)
    assert [type(layer) for layer in model if list(layer.parameters())] == [nn.Linear]
    here, there = data.test.inputs[:10], data.test.inputs[10:20]
    torch.testing.assert_close(model((here + there) / 2), (model(here) + model(there)) / 2)


def test_a_linear_model_on_all_rows_at_once_is_least_squares(data):
    objective = CaliforniaHousing(batch="full", max_layers=0)
    assert discover(objective).keys() == {"layers"}
    model, history = train(objective, data, {"layers": 0}, epochs=4)
    features = [np.c_[split.inputs.double(), np.ones(len(split))] for split in (data.train, data.valid)]
    found, *_ = np.linalg.lstsq(features[0], data.train.targets.double().numpy())
    wanted = sk.root_mean_squared_error(data.valid.targets.double(), features[1] @ found)
    assert history[-1].metrics["rmse"] == pytest.approx(wanted, abs=1e-3)
    torch.testing.assert_close(
        predict(model, data.valid.inputs).double(), torch.tensor(features[1] @ found), atol=0.05, rtol=0
    )
    assert objective.batch_size({}) > len(data.train)


def test_full_batches_train_hidden_layers_too(data, named):
    for objective, rows in ((CaliforniaHousing(batch="full"), data), (WideAndDeep(batch="full"), named)):
        (params,) = some_params(objective, {"layers": 1})
        assert "dropout" not in params
        _, history = train(objective, a_slice(rows), params, epochs=2)
        assert history[1].train_loss < history[0].train_loss
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        WideAndDeep(max_layers=0)


@pytest.mark.parametrize("kind", [CaliforniaHousing, WideAndDeep])
def test_every_branch_of_the_space_trains(data, named, kind):
    objective, small = kind(), a_slice(data if kind is CaliforniaHousing else named)
    layers = range(objective.min_layers, 4)
    tried = some_params(objective, *({"layers": n} for n in layers), *({"loss": name} for name in ("mse", "huber")))
    assert set().union(*tried) == discover(objective).keys()
    assert {params["layers"] for params in tried} == set(layers)
    for params in tried:
        assert objective.max_grad_norm(params) == params["max_grad_norm"]
        _, history = train(objective, small, params)
        assert history[-1].metrics["rmse"] > 0


def test_the_rmse_is_that_of_scikit_learn_over_all_rows(data):
    model, history = train(CaliforniaHousing(), data, MLP)
    found, wanted = predict(model, data.valid.inputs), data.valid.targets
    assert history[-1].metrics["rmse"] == pytest.approx(sk.root_mean_squared_error(wanted, found))
    assert history[-1].metrics["mae"] == pytest.approx(sk.mean_absolute_error(wanted, found))
    # More than one batch of unequal sizes, for which the mean of the batches' RMSE is another number.
    batches = zip(found.split(EVALUATION_ROWS), wanted.split(EVALUATION_ROWS), strict=True)
    of_each = [sk.root_mean_squared_error(its_wanted, its) for its, its_wanted in batches]
    assert len(of_each) == 2
    assert history[-1].metrics["rmse"] != pytest.approx(sum(of_each) / 2, rel=1e-3)


@pytest.mark.parametrize(("loss", "of_one"), [("mse", nn.MSELoss()), ("huber", nn.HuberLoss())])
def test_the_auxiliary_output_has_its_share_of_the_loss(named, loss, of_one):
    main, auxiliary, targets = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    params = {**WIDE_AND_DEEP, "loss": loss, "auxiliary_share": 0.3}
    found = WideAndDeep().build_loss(params, named.train)((main, auxiliary), targets)
    assert float(found) == pytest.approx(0.7 * float(of_one(main, targets)) + 0.3 * float(of_one(auxiliary, targets)))


def test_the_main_output_is_linear_in_wide_and_the_prediction():
    model = WideAndDeepModel(WIDE_AND_DEEP).eval()
    wide, deep = torch.randn(2, 4, 5), torch.randn(4, 6)
    (one, auxiliary), (other, same) = model(wide[0], deep), model(wide[1], deep)
    assert torch.equal(auxiliary, same)
    torch.testing.assert_close(model(wide.mean(0), deep)[0], (one + other) / 2)
    assert WideAndDeep().prediction((one, auxiliary)) is one


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "params"), [(CaliforniaHousing, MLP), (WideAndDeep, WIDE_AND_DEEP)])
def test_a_few_epochs_reach_a_sane_rmse(data, named, kind, params):
    _, history = train(kind(), data if kind is CaliforniaHousing else named, params, epochs=6)
    assert history[-1].metrics["rmse"] < 0.68


@pytest.mark.slow
def test_the_exported_model_takes_two_named_inputs_and_gives_the_main_output(named, exported, tmp_path):
    loaded = exported("california_housing.py:WideAndDeep", WIDE_AND_DEEP)
    assert [(its.name, its.shape) for its in loaded.manifest.inputs] == [("wide", (5,)), ("deep", (6,))]
    model = WideAndDeep().build_model(WIDE_AND_DEEP)
    model.load_state_dict(load_file(tmp_path / "model" / WEIGHTS))
    wanted = predict(model, named.test.inputs, WideAndDeep().prediction)
    found = loaded(**named.test.inputs)
    torch.testing.assert_close(found, wanted)
    assert loaded.manifest.test["rmse"] == pytest.approx(sk.root_mean_squared_error(named.test.targets, found))


def test_missing_data_that_cannot_be_downloaded_is_told_in_one_line(tmp_path, offline):
    with pytest.raises(TunerError) as caught:
        load_data(CaliforniaHousing(), tmp_path)
    assert f"DataError: California housing is not in {tmp_path / 'scikit_learn'} and cannot be" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n_bytes", [0, 10, 1000, 3000])
@pytest.mark.parametrize("name", ["cal_housing_py3.pkz"])
def test_a_file_that_was_cut_off_is_told_with_its_directory(cut, offline, name, n_bytes):
    directory = cut(f"scikit_learn/{name}", n_bytes)
    with pytest.raises(TunerError) as caught:
        load_data(CaliforniaHousing(), directory)
    message = str(caught.value)
    assert message.startswith(
        f"CaliforniaHousing.load_data('{directory}') failed: DataError:"
        f" California housing in {directory}/scikit_learn is damaged or incomplete ("
    )
    assert "delete its files there, to have them downloaded" in message
    assert "\n" not in message
