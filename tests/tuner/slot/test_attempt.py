"""One attempt at a trial: training, reports, pruning, checkpoints, and what is recorded."""

import dataclasses
import importlib.metadata
import math
from pathlib import Path

import optuna
import pytest
import torch
from attempts import Constant, PruneAt, Signs, a_spec, attempt
from optuna.trial import TrialState
from torch import nn
from torchmetrics import Metric

from storage.database.errors import LeaseLostError, StudyHaltedError, UnreachableError
from tuner.data import Data, Samples, Split, class_weights
from tuner.objective import Objective
from tuner.seeds import derive_seed
from tuner.slot.attempt import TrialObjective, check_device, warm_up
from tuner.training import Epoch, Interrupted, Options, best_epoch


def test_a_trial_reports_every_epoch_and_ends_with_its_best(study):
    outcome, trial = attempt(study, Signs(), epochs=5)
    values = trial.intermediate_values
    assert sorted(values) == [1, 2, 3, 4, 5]
    assert (trial.state, trial.value) == (TrialState.COMPLETE, max(values.values()))
    assert outcome.attrs["epoch"] == min(step for step, value in values.items() if value == trial.value)
    assert outcome.attrs["epochs"] == 5
    assert (outcome.attrs["seed"], outcome.attrs["device"]) == (derive_seed(11, "trial", 0), "cpu")
    assert outcome.attrs["train_loss"] > 0
    assert outcome.attrs["seconds"] >= 0


def test_a_trial_run_again_gives_the_same_values():
    def run():
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
        return [attempt(study, Signs())[1].intermediate_values for _ in range(2)]

    first = run()
    torch.rand(7)
    assert run() == first
    assert first[0] != first[1]


@pytest.mark.parametrize(("step", "state"), [(1, TrialState.PRUNED), (2, TrialState.PRUNED), (3, TrialState.COMPLETE)])
def test_a_trial_is_pruned_after_a_report_but_not_after_its_last_epoch(study, step, state):
    study.pruner = PruneAt(step)
    outcome, trial = attempt(study, Signs(), epochs=3)
    assert (outcome.state, max(trial.intermediate_values)) == (state, step)


def test_an_interrupted_attempt_raises_and_reports_no_more(study):
    def check():
        if study.trials[0].intermediate_values:
            raise Interrupted

    with pytest.raises(Interrupted):
        attempt(study, Signs(), check=check)
    assert study.trials[0].state == TrialState.RUNNING
    assert sorted(study.trials[0].intermediate_values) == [1]


class _Float:
    def __float__(self):
        return 2.5


@pytest.mark.parametrize("value", [2.5, torch.tensor(2.5), torch.tensor([2.5]), torch.tensor([[2.5]]), _Float()])
def test_a_plain_function_may_return_anything_that_is_one_number(study, value):
    outcome, trial = attempt(study, lambda _: value)
    assert (outcome.state, trial.value) == (TrialState.COMPLETE, 2.5)


class ManyMetrics(Signs):
    def build_metrics(self, data):
        # NaN is not JSON.
        return {**super().build_metrics(data), "recall": Constant(7.0), "broken": Constant(math.nan)}


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_other_metrics_are_recorded_beside_what_tuner_records(study):
    attrs = attempt(study, ManyMetrics())[0].attrs
    assert attrs["recall"] == 7.0
    assert attrs["epoch"] in (1, 2, 3)
    assert attrs["seed"] == derive_seed(11, "trial", 0)
    assert "broken" not in attrs


@pytest.mark.parametrize(
    ("values", "direction", "number"),
    [
        ([0.1, 0.3, 0.2], "maximize", 2),
        ([0.1, 0.3, 0.2], "minimize", 1),
        ([0.3, 0.3, 0.3], "maximize", 1),
        ([0.3, 0.1, 0.1], "minimize", 2),
    ],
)
def test_the_best_epoch_is_the_earliest_of_the_best(values, direction, number):
    history = [Epoch(number=n, train_loss=0, metrics={"m": value}) for n, value in enumerate(values, 1)]
    assert best_epoch(history, "m", direction).number == number


@pytest.mark.cuda
def test_train_and_valid_are_on_the_device_and_test_stays_behind():
    what = TrialObjective.load(a_spec(), Signs(), Path(), torch.device("cuda"))
    devices = [split.targets.device.type for _, split in what.data.splits()]
    assert devices == ["cuda", "cuda", "cpu"]


@pytest.mark.cuda
def test_a_device_that_was_warmed_up_has_its_random_numbers_as_they_were():
    device = torch.device("cuda", 0)
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state()
    check_device(device)
    warm_up(device)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    warm_up(torch.device("cpu"))


def interrupt_in_epoch(study, number):
    def check():
        if len(study.trials[-1].intermediate_values) == number:
            raise Interrupted

    return check


class Regularized(Signs):
    def build_model(self, params):
        return nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.2), nn.Linear(8, 2))


def test_a_trial_that_was_given_back_goes_on_and_reports_its_history_without_asking_the_pruner(tmp_path):
    def a_study():
        study = optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner())
        study.enqueue_trial({"lr": 0.05})
        return study

    asked = []

    class Remembers(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            asked.append(trial.last_step)
            return False

    wanted = attempt(a_study(), Regularized(), epochs=6)[1]
    first = a_study()
    with pytest.raises(Interrupted):
        attempt(first, Regularized(), epochs=6, check=interrupt_in_epoch(first, 3), checkpoints=tmp_path)
    again = a_study()  # a released trial's reports are deleted
    again.pruner = Remembers()
    lines = []
    outcome, trial = attempt(again, Regularized(), epochs=6, checkpoints=tmp_path, log=lines.append)
    assert trial.intermediate_values == wanted.intermediate_values
    assert trial.value == wanted.value
    assert asked == [4, 5]
    assert outcome.attrs["epochs"] == 6
    assert "trial 0: resumed after epoch 3, batch 0" in lines


@pytest.mark.parametrize("changed", [{"params": {"lr": 0.06}}, {"epochs": 5}, {"precision": "bf16"}])
def test_a_checkpoint_that_another_trial_left_is_not_gone_on_from(tmp_path, changed):
    def a_study(params):
        study = optuna.create_study(direction="maximize")
        study.enqueue_trial(params)
        return study

    first = a_study({"lr": 0.05})
    with pytest.raises(Interrupted):
        attempt(first, Signs(), epochs=6, check=interrupt_in_epoch(first, 3), checkpoints=tmp_path)
    lines = []
    study = a_study(changed.pop("params", {"lr": 0.05}))
    attempt(study, Signs(), **{"epochs": 6, **changed}, checkpoints=tmp_path, log=lines.append)
    assert f"cannot use the checkpoint {tmp_path / 'trial-0.pt'}: it is of another training; starting again" in lines


def test_a_trial_records_what_it_cost(study):
    attrs = attempt(study, Signs(), epochs=2)[0].attrs
    assert attrs["samples_per_s"] > 0
    assert attrs["peak_memory_mb"] > 100
    assert "peak_reserved_mb" not in attrs  # of a CPU
    assert attrs["versions"]["torch"] == importlib.metadata.version("torch")
    assert 0 < attrs["train_s"] + attrs["evaluate_s"] <= attrs["seconds"]
    assert attrs["wait_s"] == 0


def test_a_pruned_trial_records_what_it_cost_too(study):
    study.pruner = PruneAt(2)
    attrs = attempt(study, Signs(), epochs=5)[0].attrs
    assert attrs["epochs"] == 2
    assert attrs["samples_per_s"] > 0


def test_a_trial_that_stops_improving_ends_early_with_its_best(study):
    class Forgets(Signs):
        def build_metrics(self, data):
            return {"accuracy": _Falling()}

    outcome, trial = attempt(study, Forgets(), epochs=20, patience=3)
    assert sorted(trial.intermediate_values) == [1, 2, 3, 4]
    assert (outcome.value, outcome.attrs["epoch"], outcome.attrs["epochs"]) == (-1.0, 1, 4)


class _Falling(Metric):
    n = 0

    def update(self, outputs, targets):
        self.n -= 1

    def compute(self):
        return torch.tensor(float(self.n))


@pytest.fixture
def put_back():
    yield
    torch.use_deterministic_algorithms(False)


def test_determinism_is_turned_on_for_a_study_that_asks_for_it(study, put_back, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    attempt(study, Signs(), deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    attempt(study, Signs())
    assert not torch.are_deterministic_algorithms_enabled()


class Several(Signs):
    """Two inputs by name, two outputs, and a loss of both."""

    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)
        if trial.suggest_categorical("clips", [True, False]):
            trial.suggest_float("max_grad_norm", 0.1, 1.0)

    def load_data(self, root):
        data = super().load_data(root)
        splits = [
            Split({"x": split.inputs[:, :1], "y": split.inputs[:, 1:]}, split.targets) for _, split in data.splits()
        ]
        return Data(*splits, class_names=data.class_names)

    def build_model(self, params):
        return _Two()

    def build_loss(self, params, train):
        weights = class_weights(train, 2).to(train.targets.device)

        def loss(outputs, targets):
            classes, size = outputs
            return nn.functional.cross_entropy(classes, targets, weights) + 0.1 * size.square().mean()

        return loss

    def prediction(self, outputs):
        return outputs[0]


class _Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, *, x, y):
        outputs = self.layer(torch.cat([x, y], 1))
        return outputs[:, :2], outputs[:, 2]


@pytest.mark.parametrize("clips", [True, False])
def test_an_objective_of_several_inputs_and_outputs_needs_no_loop_of_its_own(study, clips):
    study.enqueue_trial({"lr": 0.1, "clips": clips, "max_grad_norm": 0.5})
    outcome, trial = attempt(study, Several(), epochs=8)
    assert trial.state == TrialState.COMPLETE
    assert ("max_grad_norm" in trial.params) == clips
    assert outcome.value > 0.8


def test_a_model_of_several_outputs_without_a_prediction_is_told_what_to_override(study):
    class NoPrediction(Several):
        prediction = Objective.prediction

    outcome, _ = attempt(study, NoPrediction())
    assert "got tuple: override prediction(outputs)" in outcome.attrs["failure_message"]


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (Interrupted(), True),
        (StudyHaltedError("paused"), True),
        (UnreachableError("away"), True),
        (LeaseLostError("lost"), False),  # whoever has the trial now writes its checkpoint
    ],
)
def test_a_trial_that_another_worker_will_resume_leaves_its_checkpoint(study, tmp_path, error, kept):
    def check():
        if study.trials[-1].intermediate_values:
            raise error

    with pytest.raises(type(error)):
        attempt(study, Signs(), check=check, checkpoints=tmp_path)
    assert (tmp_path / "trial-0.pt").exists() == kept


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"compile": True},
        {"cuda_graphs": True},
        {"deterministic": True},
        {"patience": 2},
        {"data": "resident"},
        {"data": "stream"},
    ],
    ids=str,
)
def test_what_the_spec_says_of_training_reaches_the_loop(study, put_back, training):
    seen = []

    class Watched(Signs):
        def fit(self, model, train, valid, params, **others):
            seen.append((others["run"].options, type(train), type(valid)))
            return [Epoch(number=1, train_loss=0.5, metrics={"accuracy": 0.5})]

    attempt(study, Watched(), **training)
    kind = Samples if training.get("data") == "stream" else Split
    assert seen == [(Options(**training), kind, kind)]


class SoManyEpochs(Signs):
    epochs_param: object = 2

    def suggest(self, trial):
        super().suggest(trial)
        trial.suggest_categorical("epochs", [self.epochs_param])

    def build_scheduler(self, optimizer, params, epochs):
        assert epochs == params["epochs"]
        return super().build_scheduler(optimizer, params, epochs)


def test_the_param_epochs_is_how_many_epochs_a_trial_has(study):
    outcome, trial = attempt(study, SoManyEpochs(epochs_param=5), epochs=3)
    assert list(trial.intermediate_values) == [1, 2, 3, 4, 5]
    assert outcome.attrs["epochs"] == 5


@pytest.mark.parametrize("epochs", [0, 2.5, "ten"])
def test_epochs_that_are_no_number_of_them_fail_their_trial(study, epochs):
    outcome, _ = attempt(study, SoManyEpochs(epochs_param=epochs))
    assert outcome.message == (
        f"SoManyEpochs: the param 'epochs' needs a whole number above 0, got {epochs!r}: use suggest_int"
    )


def test_a_last_epoch_by_its_param_is_not_pruned():
    study = optuna.create_study(direction="maximize", pruner=PruneAt(2))
    outcome, _ = attempt(study, SoManyEpochs(epochs_param=2), epochs=9)
    assert outcome.state == TrialState.COMPLETE


class HalfTrained(Signs):
    def build_model(self, params):
        model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
        model[1].requires_grad_(False)
        return model


def test_the_parameters_of_a_model_are_counted(study):
    outcome, _ = attempt(study, HalfTrained())
    assert (outcome.attrs["parameters"], outcome.attrs["trained_parameters"]) == (22, 12)


class Leaking(Signs):
    def load_data(self, root):
        data = super().load_data(root)
        test = Split(torch.cat([data.test.inputs[:10], data.train.inputs[:7]]), data.test.targets[:17])
        return dataclasses.replace(data, test=test)


def test_rows_that_stand_in_two_splits_are_told(study):
    lines = []
    attempt(study, Leaking(), log=lines.append)
    assert [line for line in lines if "split have inputs" in line] == [
        "7 of 17 rows of the test split have inputs that stand in train too: it tells too much of what was learned by"
        " heart, unless load_data means them to"
    ]
    lines.clear()
    attempt(study, Signs(), log=lines.append)
    assert not any("stand in" in line for line in lines)
