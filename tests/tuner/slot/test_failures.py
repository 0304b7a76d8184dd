"""Trials that fail: by which class, and with which message."""

import functools
import gc
import math
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import optuna
import pytest
import torch
from attempts import Constant, Signs, a_spec, attempt
from optuna.trial import TrialState
from torch.utils.data import get_worker_info
from torchmetrics import MeanMetric

from storage.database.errors import LeaseLostError, UnreachableError
from tuner.data import Data, Samples
from tuner.seeds import derive_seed
from tuner.slot.attempt import MAX_MESSAGE_CHARS, TrialObjective, run_attempt
from tuner.slot.checked_trial import MAX_STEP, CheckedTrial, InvalidReportError
from tuner.training import DivergedError


@pytest.mark.parametrize("error", [UnreachableError("away"), LeaseLostError("lost"), optuna.TrialPruned()])
def test_a_plain_function_s_trial_is_not_failed_for_what_is_not_its_fault(study, error):
    def objective(trial):
        raise error

    if isinstance(error, optuna.TrialPruned):
        assert attempt(study, objective)[0].state == TrialState.PRUNED
    else:
        with pytest.raises(type(error)):
            attempt(study, objective)


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
        (lambda trial: trial.report(1.0, -1), "user_error", f"a whole number in 0..{MAX_STEP}, got -1"),
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


def test_what_a_function_returned_is_told_with_the_line_that_defines_it(study):
    def objective(trial):
        return "text"

    message = attempt(study, objective)[0].attrs["failure_message"]
    assert message.endswith(f"got 'text' ({__file__}, line {objective.__code__.co_firstlineno})")


def test_what_a_class_returned_is_not_laid_to_a_line_of_ours(study):
    message = attempt(study, WithoutEpochs())[0].attrs["failure_message"]
    assert message == "WithoutEpochs: fit needs to return the epochs that ended, got none"


def test_a_keyboard_interrupt_is_the_objectives_own_since_slots_hear_of_none(study):
    def objective(trial):
        raise KeyboardInterrupt

    assert attempt(study, objective)[0].attrs["failure"] == "user_error"


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


def test_a_report_is_checked_before_it_is_written(study):
    trial = CheckedTrial(study, study.ask()._trial_id, lambda: None)
    with pytest.raises(InvalidReportError):
        trial.report(1.0, -1)
    with pytest.raises(DivergedError):
        trial.report(math.nan, 1)
    trial.report(1.0, 0)
    assert study.trials[0].intermediate_values == {0: 1.0}


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
@pytest.mark.parametrize("metric", [math.nan, math.inf])
def test_a_metric_that_is_no_number_fails_the_trial_as_nan(study, metric):
    class Broken(Signs):
        def build_metrics(self, data):
            return {"accuracy": Constant(metric)}

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


@pytest.mark.parametrize(
    ("told", "kind", "poisoned"),
    [
        ("CUDA error: an illegal memory access was encountered", "infrastructure", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", "infrastructure", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", "infrastructure", True),
        ("CUDA error: device-side assert triggered", "user_error", True),
        ("Triton Error [CUDA]: out of memory", "oom", False),
        ("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)", "user_error", False),
    ],
)
def test_a_device_that_fails_is_told_from_a_trial_that_does_and_its_tensors_are_kept(study, told, kind, poisoned):
    tensors = []

    def objective(trial):
        tensor = torch.zeros(3)
        tensors.append(weakref.ref(tensor))
        raise RuntimeError(told)

    outcome, _ = attempt(study, objective)
    assert (outcome.failure, outcome.is_poisoned) == (kind, poisoned)
    assert told in outcome.message
    gc.collect()
    assert (tensors[0]() is not None) == poisoned  # to free them could end the process


class KilledReader:
    """Samples of which one ends the process that reads it while training, as a host out of memory does."""

    def __len__(self):
        return 1000

    def __getitem__(self, row):
        if row == 1 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(2), 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_reader_of_samples_that_was_killed_is_not_the_trial_s_fault(study):
    class Streamed(Signs):
        def load_data(self, root):
            data = super().load_data(root)
            return Data(Samples(KilledReader()), data.valid, data.test, data.class_names)

    outcome, _ = attempt(study, Streamed(), data="stream")
    assert (outcome.failure, outcome.is_poisoned) == ("infrastructure", True)
    assert "DeadReaderError: a process that reads samples was killed" in outcome.message
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL  # torch's handler would raise at any later moment


def on_cuda(study, objective):
    """Return how an attempt on a CUDA device ended, and how much memory it left in use that one before it had not."""
    what = TrialObjective.load(a_spec(), objective, Path(), torch.device("cuda", 0))
    run_attempt(what, CheckedTrial(study, study.ask()._trial_id, lambda: None))  # libraries keep some from then on
    before = torch.cuda.memory_allocated()
    outcome = run_attempt(what, CheckedTrial(study, study.ask()._trial_id, lambda: None))
    return outcome, torch.cuda.memory_allocated() - before


@pytest.mark.cuda
def test_out_of_memory_on_a_cuda_device_leaves_none_behind(study):
    class Huge(Signs):
        def build_loss(self, params, train):
            return lambda outputs, targets: outputs.sum() + torch.empty(1 << 50, device="cuda").sum()

    outcome, left = on_cuda(study, Huge())
    assert outcome.attrs["failure"] == "oom"
    assert left == 0


@pytest.mark.cuda
def test_a_trial_gives_its_memory_back_to_the_device(study):
    def objective(trial):
        cycle = [torch.empty(1 << 28, device="cuda")]
        cycle.append(cycle)
        return 1.0

    gc.collect()
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    gc.disable()  # or it may free it by chance
    try:
        outcome, left = on_cuda(study, objective)
    finally:
        gc.enable()
    assert (outcome.state, left) == (TrialState.COMPLETE, 0)
    assert torch.cuda.memory_reserved() - reserved < 1 << 28
    assert outcome.attrs["peak_reserved_mb"] >= outcome.attrs["peak_memory_mb"] > 1000


BROKEN = """
import sys
from pathlib import Path
import optuna
import torch
from attempts import a_spec
from tuner.slot.attempt import TrialObjective, run_attempt
from tuner.slot.checked_trial import CheckedTrial

def objective(trial):
    torch.arange(3, device="cuda")[torch.tensor([7], device="cuda")]
    pinned = torch.zeros(3, pin_memory=True)
    pinned.copy_(torch.zeros(3, device="cuda"), non_blocking=True)
    raise ValueError("of another kind")

study = optuna.create_study()
what = TrialObjective.load(a_spec(), objective, Path(), torch.device("cuda", 0))
outcome = run_attempt(what, CheckedTrial(study, study.ask()._trial_id, lambda: None))
print(outcome.failure, outcome.is_poisoned, "afterwards" in outcome.message, flush=True)
import os
os._exit(0)
"""


@pytest.mark.cuda
def test_a_device_that_is_broken_behind_an_error_of_another_kind_is_found_so():
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", BROKEN],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    # The error of the kernel itself where the host had it before the other.
    assert done.stdout.strip() in ("user_error True True", "user_error True False"), done.stderr


@pytest.mark.cuda
def test_libraries_that_find_no_memory_on_a_full_device_are_out_of_memory(study):
    def objective(trial):
        taken = []
        size = torch.cuda.mem_get_info()[0]
        while size > 1 << 20:
            try:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
        raise RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")

    outcome, left = on_cuda(study, objective)
    assert (outcome.failure, outcome.is_poisoned, left) == ("oom", False, 0)
