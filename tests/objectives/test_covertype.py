import pytest
import torch
from safetensors.torch import load_file
from searching import a_slice, counted, some_params, train
from sklearn import metrics as sk
from sklearn.datasets import fetch_covtype
from torch import nn

from objectives.covertype import COVERS, Covertype
from tuner.data import Data, Split, class_weights
from tuner.errors import TunerError
from tuner.formats.weights import WEIGHTS
from tuner.slot.attempt import load_data
from tuner.study.sampling import discover
from tuner.training import predict

PARAMS = {
    "layers": 2,
    "units_0": 128,
    "units_1": 64,
    "dropout": 0.1,
    "class_balance": 0.5,
    "lr": 5e-3,
    "weight_decay": 1e-3,
    "batch_size": 128,
}


@pytest.fixture(scope="module")
def data(real_data):
    return Covertype().load_data(real_data)


def test_every_row_is_in_one_split(data, real_data):
    features, covers = fetch_covtype(data_home=real_data / "scikit_learn", return_X_y=True)
    whole = Split(torch.tensor(features).float(), torch.tensor(covers) - 1)
    assert counted(*(split for _, split in data.splits())) == counted(whole)
    shares = [len(split) / len(whole) for _, split in data.splits()]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.001)


def test_inputs_are_ten_quantities_and_44_bytes_of_0_or_1(data):
    for _, split in data.splits():
        quantities, flags = split.inputs
        assert (quantities.dtype, quantities.shape[1:]) == (torch.float32, (10,))
        assert (flags.dtype, flags.shape[1:]) == (torch.uint8, (44,))
        assert set(flags.unique().tolist()) == {0, 1}
        assert split.targets.dtype == torch.int64


def test_every_split_has_every_class_in_its_share(data):
    assert data.class_names == COVERS
    shares = [split.targets.bincount(minlength=7) / len(split) for _, split in data.splits()]
    assert min(shares[0]) > 0
    for share in shares[1:]:
        assert share.tolist() == pytest.approx(shares[0].tolist(), abs=0.001)


def test_the_splits_follow_from_the_study_s_seed(data, real_data):
    assert Covertype().load_data(real_data).fingerprint() == data.fingerprint()
    assert counted(Covertype(seed=1).load_data(real_data).test) != counted(data.test)


def test_quantities_are_standardised_by_the_training_rows_alone(data):
    quantities, flags = data.valid.inputs
    others = Split((quantities * 1000, flags), data.valid.targets)
    model, _ = train(Covertype(), Data(data.train, others, others, COVERS), PARAMS)
    standardised = model.standardize(data.train.inputs[0])
    assert standardised.mean(0).tolist() == pytest.approx([0] * 10, abs=1e-3)
    assert standardised.std(0, correction=0).tolist() == pytest.approx([1] * 10, rel=1e-3)


def test_a_quantity_that_never_changes_does_no_harm(data):
    small = a_slice(data)
    for _, split in small.splits():
        split.inputs[0][:, 3] = 7
    model, history = train(Covertype(), small, PARAMS)
    assert model.standardize(small.train.inputs[0])[:, 3].tolist() == [0] * 200
    assert history[-1].metrics["accuracy"] > 0


def test_every_branch_of_the_space_trains(data):
    objective, small = Covertype(), a_slice(data)
    tried = some_params(objective, *({"layers": n, "class_balance": balance} for n in (1, 2, 3) for balance in (0, 1)))
    assert set().union(*tried) == discover(objective).keys()
    for params in tried:
        model, history = train(objective, small, params)
        assert sum(isinstance(layer, nn.BatchNorm1d) for layer in model.layers) == params["layers"]
        assert 0 < history[-1].train_loss < 100


@pytest.mark.parametrize("balance", [0.0, 0.4, 1.0])
def test_classes_weigh_between_all_the_same_and_inversely_to_their_share(balance):
    targets = torch.tensor([0] * 20 + [1] * 10 + [2, 3, 4, 5, 6])
    rows = Split((torch.zeros(35, 10), torch.zeros(35, 44)), targets)
    loss = Covertype().build_loss({"class_balance": balance}, rows)
    logits = torch.randn(35, 7, generator=torch.Generator().manual_seed(0))
    weights = (class_weights(rows, 7) ** balance)[targets]
    wanted = sk.log_loss(targets, logits.double().softmax(1), sample_weight=weights)
    assert float(loss(logits, targets)) == pytest.approx(wanted, rel=1e-5)


def test_metrics_are_those_of_scikit_learn(data):
    model, history = train(Covertype(), data, PARAMS)
    chosen = predict(model, data.valid.inputs).argmax(1)
    assert history[-1].metrics == {
        "accuracy": pytest.approx(sk.accuracy_score(data.valid.targets, chosen)),
        "macro_f1": pytest.approx(sk.f1_score(data.valid.targets, chosen, average="macro")),
    }


def test_a_few_epochs_reach_a_sane_accuracy(data):
    _, history = train(Covertype(), data, PARAMS, epochs=6)
    assert history[-1].metrics["accuracy"] > 0.72
    assert history[-1].metrics["macro_f1"] > 0.7


@pytest.mark.slow
def test_the_exported_model_takes_both_inputs_in_order(data, exported, tmp_path):
    loaded = exported("covertype.py:Covertype", PARAMS)
    assert [(its.name, its.shape, its.dtype) for its in loaded.manifest.inputs] == [
        (None, (10,), "float32"),
        (None, (44,), "uint8"),
    ]
    model = Covertype().build_model(PARAMS)
    model.load_state_dict(load_file(tmp_path / "model" / WEIGHTS))
    torch.testing.assert_close(loaded(*data.test.inputs), predict(model, data.test.inputs))
    assert loaded.manifest.test.keys() == {"accuracy", "macro_f1"}


def test_missing_data_that_cannot_be_downloaded_is_told_in_one_line(tmp_path, offline):
    with pytest.raises(TunerError) as caught:
        load_data(Covertype(), tmp_path)
    assert f"DataError: Covertype is not in {tmp_path / 'scikit_learn'} and cannot be downloaded" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n_bytes", [0, 10, 1000, 3000])
@pytest.mark.parametrize("name", ["covertype/samples_py3", "covertype/targets_py3"])
def test_a_file_that_was_cut_off_is_told_with_its_directory(cut, offline, name, n_bytes):
    directory = cut(f"scikit_learn/{name}", n_bytes)
    with pytest.raises(TunerError) as caught:
        load_data(Covertype(), directory)
    message = str(caught.value)
    assert message.startswith(
        f"Covertype.load_data('{directory}') failed: DataError:"
        f" Covertype in {directory}/scikit_learn is damaged or incomplete ("
    )
    assert "delete its files there, to have them downloaded" in message
    assert "\n" not in message
