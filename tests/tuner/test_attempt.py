import functools
import gc
import importlib.metadata
import math
import weakref

import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch import nn
from torchmetrics import MeanMetric, Metric

from storage.errors import LeaseLostError, StudyHaltedError, UnreachableError
from tuner.attempt import (
    MAX_MESSAGE_CHARS,
    MAX_STEP,
    CheckedTrial,
    InvalidReportError,
    TrialObjective,
    load_data,
    run_attempt,
)
from tuner.data import Data, Samples, Split, class_weights
from tuner.errors import TunerError
from tuner.objective import Objective
from tuner.seeds import derive_seed
from tuner.spec import Spec
from tuner.training import DivergedError, Epoch, Interrupted, best_epoch


def a_spec(*, epochs=3, metric="accuracy", direction="maximize", **training):
    return Spec.model_validate(
        {
            "objective": {"name": "signs", "code_hash": "0"},
            "metric": metric,
            "direction": direction,
            "budget": {"trials": 9},
            "epochs": epochs,
            "seed": 11,
            "training": training,
        }
    )


class Signs(Objective):
    """Tell negative numbers from positive ones."""

    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)

    def load_data(self, root):
        splits = []
        for seed in range(3):
            numbers = torch.randn(40, 2, generator=torch.Generator().manual_seed(seed))
            splits.append(Split(numbers, (numbers[:, 0] > 0).long()))
        return Data(*splits, class_names=("negative", "positive"))

    def build_model(self, params):
        return nn.Linear(2, 2)


@pytest.fixture
def study():
    return optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner())


def attempt(study, objective, *, check=lambda: None, checkpoints=None, log=print, **spec):
    """Run the study's next trial and tell its end, as a slot does."""
    cpu = torch.device("cpu")
    what = TrialObjective.load(a_spec(**spec), objective, "data", cpu, checkpoints=checkpoints, log=log)
    trial = CheckedTrial(study, study.ask()._trial_id, check)
    outcome = run_attempt(what, trial)
    study.tell(trial, outcome.value, outcome.state)
    return outcome, study.trials[-1]


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


class _PruneAt(optuna.pruners.BasePruner):
    def __init__(self, step):
        self.step = step

    def prune(self, study, trial):
        return trial.last_step >= self.step


@pytest.mark.parametrize(("step", "state"), [(1, TrialState.PRUNED), (2, TrialState.PRUNED), (3, TrialState.COMPLETE)])
def test_a_trial_is_pruned_after_a_report_but_not_after_its_last_epoch(study, step, state):
    study.pruner = _PruneAt(step)
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


@pytest.mark.parametrize("error", [UnreachableError("away"), LeaseLostError("lost"), optuna.TrialPruned()])
def test_a_plain_function_s_trial_is_not_failed_for_what_is_not_its_fault(study, error):
    def objective(trial):
        raise error

    if isinstance(error, optuna.TrialPruned):
        assert attempt(study, objective)[0].state == TrialState.PRUNED
    else:
        with pytest.raises(type(error)):
            attempt(study, objective)


class _Float:
    def __float__(self):
        return 2.5


@pytest.mark.parametrize("value", [2.5, torch.tensor(2.5), torch.tensor([2.5]), torch.tensor([[2.5]]), _Float()])
def test_a_plain_function_may_return_anything_that_is_one_number(study, value):
    outcome, trial = attempt(study, lambda _: value)
    assert (outcome.state, trial.value) == (TrialState.COMPLETE, 2.5)


@pytest.mark.parametrize(
    ("objective", "kind", "told"),
    [
        (lambda _: None, "user_error", "needs to return one number, got None"),
        (lambda _: "0.5", "user_error", "needs to return one number, got '0.5'"),
        (lambda _: (1.0, 2.0), "user_error", "got (1.0, 2.0)"),
        (lambda _: torch.ones(2), "user_error", "got tensor([1., 1.])"),
        (lambda _: 1 + 2j, "user_error", "got (1+2j)"),
        (lambda _: math.nan, "nan", "the objective returned nan"),
        (lambda _: torch.tensor(math.inf), "nan", "the objective returned inf"),
        (lambda trial: trial.report(math.nan, 1), "nan", "the reported value is nan at step 1"),
        (lambda trial: trial.report(-math.inf, 1), "nan", "the reported value is -inf at step 1"),
        (lambda trial: trial.report(1.0, -1), "user_error", f"a step needs to be in 0..{MAX_STEP}, got -1"),
        (lambda trial: trial.report(1.0, MAX_STEP + 1), "user_error", f"got {MAX_STEP + 1}"),
        (lambda _: [][1], "user_error", "IndexError: list index out of range"),
        (lambda _: bytearray(1 << 62), "oom", "out of memory"),
        (lambda trial: trial.suggest_float("x", 2, 1), "user_error", "ValueError"),
        (lambda _: exit(0), "user_error", "SystemExit: 0"),
        (functools.partial(lambda a, trial: a / 0, 1), "user_error", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_objective_that_fails_is_recorded_with_its_class_and_message(study, objective, kind, told):
    outcome, trial = attempt(study, objective)
    assert (trial.state, outcome.value, outcome.attrs["failure"]) == (TrialState.FAIL, None, kind)
    assert told in outcome.attrs["failure_message"]
    assert outcome.attrs["seed"] == derive_seed(11, "trial", 0)


def test_a_message_names_the_last_line_of_the_objective_s_own_file(study):
    def objective(trial):
        return trial.suggest_float("x", "a", "b")

    message = attempt(study, objective)[0].attrs["failure_message"]
    assert f"{__file__}, line {objective.__code__.co_firstlineno + 1})" in message


def test_a_message_is_what_the_database_can_hold(study):
    def objective(trial):
        raise ValueError("\0" + "x" * 9999)

    message = attempt(study, objective)[0].attrs["failure_message"]
    assert len(message) == MAX_MESSAGE_CHARS
    assert "\0" not in message


class Diverging(Signs):
    def build_loss(self, params, train):
        return lambda outputs, targets: outputs.sum() * float("nan")


class WithoutItsMetric(Signs):
    def build_metrics(self, data):
        return {"loss": MeanMetric()}


class WithoutEpochs(Signs):
    def fit(self, *args, **named):
        return []


class WithoutClasses(Signs):
    def load_data(self, root):
        data = super().load_data(root)
        return Data(data.train, data.valid, data.test)


@pytest.mark.parametrize(
    ("objective", "kind", "told"),
    [
        (Diverging(), "nan", "the training loss is nan in epoch 1"),
        (WithoutItsMetric(), "user_error", "build_metrics needs to return 'accuracy', the study's metric, got: loss"),
        (WithoutEpochs(), "user_error", "fit needs to return the epochs that ended, got none"),
        (WithoutClasses(), "user_error", "the default metric needs the names of the classes, got none"),
    ],
)
def test_a_trial_that_cannot_be_trained_fails_with_its_reason(study, objective, kind, told):
    outcome, _ = attempt(study, objective)
    assert (outcome.state, outcome.attrs["failure"]) == (TrialState.FAIL, kind)
    assert told in outcome.attrs["failure_message"]


class _Constant(Metric):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def update(self, outputs, targets):
        pass

    def compute(self):
        return torch.tensor(self.value)


class ManyMetrics(Signs):
    def build_metrics(self, data):
        # A name may be one that we record ourselves; NaN is not JSON.
        others = {name: _Constant(7.0) for name in ("epoch", "seed", "recall")}
        return {**super().build_metrics(data), **others, "broken": _Constant(math.nan)}


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_train_and_valid_are_on_the_device_and_test_stays_behind():
    what = TrialObjective.load(a_spec(), Signs(), "data", torch.device("cuda"))
    devices = [split.targets.device.type for _, split in what.data.splits()]
    assert devices == ["cuda", "cuda", "cpu"]


def test_data_that_cannot_be_loaded_are_told_with_the_line(tmp_path):
    class Broken(Signs):
        def load_data(self, root):
            return (root / "images.npy").read_bytes()

    with pytest.raises(TunerError) as caught:
        load_data(Broken(), tmp_path)
    message = str(caught.value)
    assert message.startswith(f"Broken.load_data('{tmp_path}') failed: FileNotFoundError: ")
    assert f"{__file__}, line " in message


def test_a_report_is_checked_before_it_is_written(study):
    trial = CheckedTrial(study, study.ask()._trial_id, lambda: None)
    with pytest.raises(InvalidReportError):
        trial.report(1.0, -1)
    with pytest.raises(DivergedError):
        trial.report(math.nan, 1)
    trial.report(1.0, 0)
    assert study.trials[0].intermediate_values == {0: 1.0}


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
    assert attrs["versions"]["torch"] == importlib.metadata.version("torch")
    assert 0 < attrs["train_s"] + attrs["evaluate_s"] <= attrs["seconds"]
    assert attrs["wait_s"] == 0


def test_a_pruned_trial_records_what_it_cost_too(study):
    study.pruner = _PruneAt(2)
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


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
@pytest.mark.parametrize("metric", [math.nan, math.inf])
def test_a_metric_that_is_no_number_fails_the_trial_as_nan(study, metric):
    class Broken(Signs):
        def build_metrics(self, data):
            return {"accuracy": _Constant(metric)}

    outcome, trial = attempt(study, Broken())
    assert (trial.state, outcome.attrs["failure"]) == (TrialState.FAIL, "nan")


def test_out_of_memory_is_told_apart_and_leaves_none_behind(study):
    models = []

    class Huge(Signs):
        def build_model(self, params):
            model = super().build_model(params)
            models.append(weakref.ref(model))
            return model

        def build_loss(self, params, train):
            return lambda outputs, targets: outputs.sum() + torch.empty(1 << 60).sum()

    gc.disable()  # or it may free them by chance
    try:
        outcome, _ = attempt(study, Huge())
    finally:
        gc.enable()
    assert outcome.attrs["failure"] == "oom"
    assert "\n" not in outcome.attrs["failure_message"]
    assert [model() for model in models] == [None]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_out_of_memory_on_a_cuda_device_leaves_none_behind(study):
    class Huge(Signs):
        def build_loss(self, params, train):
            return lambda outputs, targets: outputs.sum() + torch.empty(1 << 50, device="cuda").sum()

    what = TrialObjective.load(a_spec(), Huge(), "data", torch.device("cuda", 0))
    before = torch.cuda.memory_allocated()
    outcome = run_attempt(what, CheckedTrial(study, study.ask()._trial_id, lambda: None))
    assert outcome.attrs["failure"] == "oom"
    assert torch.cuda.memory_allocated() == before


class Read(Signs):
    """Signs whose rows are samples; one of them is broken."""

    def load_data(self, root):
        data = super().load_data(root)
        rows = data.train.inputs.clone()
        rows[33] = math.nan
        return Data(Samples(list(zip(rows, data.train.targets, strict=True))), data.valid, data.test, data.class_names)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_broken_samples_fail_the_trial_naming_objective_split_and_cause(study):
    outcome, _ = attempt(study, Read(), data="stream")
    assert outcome.attrs["failure"] == "user_error"
    assert outcome.attrs["failure_message"] == (
        "Read: the train split needs finite numbers, got NaN or infinity: clean the data"
    )


class _Raises:
    def __len__(self):
        return 8

    def __getitem__(self, row):
        return (torch.zeros(2), 0) if row == 0 else {}[f"no file {row}"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_what_a_data_set_raises_while_it_is_read_is_told_in_one_line(study):
    class Missing(Signs):
        def load_data(self, root):
            data = super().load_data(root)
            return Data(Samples(_Raises()), data.valid, data.test, data.class_names)

    message = attempt(study, Missing(), data="stream")[0].attrs["failure_message"]
    assert message.startswith("Missing: the train split cannot be read: KeyError: 'no file ")
    assert f"{__file__}, line " in message
    assert "\n" not in message


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_broken_samples_that_fit_are_found_before_the_first_epoch(study):
    with pytest.raises(TunerError, match=r"^Read: the train split needs finite numbers, got NaN or infinity"):
        attempt(study, Read())


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


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path.write_bytes(b"cut o"), "Broken.load_data("),
        (lambda path: path.mkdir(), "IsADirectoryError"),
        (lambda path: None, "FileNotFoundError"),
    ],
)
def test_a_data_directory_that_cannot_be_read_is_told_in_one_line(tmp_path, make, told):
    class Broken(Signs):
        def load_data(self, root):
            return torch.load(root / "rows.pt", weights_only=True)

    make(tmp_path / "rows.pt")
    with pytest.raises(TunerError) as caught:
        load_data(Broken(), tmp_path)
    assert told in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


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
