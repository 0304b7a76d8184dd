import io
import subprocess
import sys

import pytest
import torch
from attempts import a_spec
from torch.utils._python_dispatch import TorchDispatchMode

from storage import PostgresStorage
from storage.optuna_storage.pruning import IndexedPercentilePruner
from storage.optuna_storage.rule_pruning import IndexedRulePruner
from tuner.errors import UsageError
from tuner.slot.orders import Orders
from tuner.slot.pruning import pruner_on
from tuner.slot.slot import Slot, SlotConfig
from tuner.spec import ObjectiveSpec, PrunerSpec
from tuner.study.joining import Study
from tuner.study.sampling import build_pruner, pruner_spec
from tuner.worker.slots import plan_slots


@pytest.fixture
def storage():
    """A storage that nothing connects."""
    storage = PostgresStorage("postgresql://nobody@localhost:1/none")
    yield storage
    storage.engine.dispose()


@pytest.mark.parametrize(
    "text",
    [
        "median",
        "median:n_startup_trials=1,n_warmup_steps=2,interval_steps=3,n_min_trials=4",
        "percentile",
        "percentile:percentile=10.0,n_startup_trials=0,n_min_trials=2",
    ],
)
def test_median_and_percentile_are_decided_from_an_index_with_the_specs_settings(storage, text):
    spec = pruner_spec(text, epochs=20)
    ours = pruner_on(storage, 1, spec)
    assert isinstance(ours, IndexedPercentilePruner)
    assert vars(ours).items() >= vars(build_pruner(spec)).items()


def test_rungs_are_decided_from_an_index_by_the_same_rule(storage):
    spec = pruner_spec("rungs:eta=2", epochs=20)
    ours = pruner_on(storage, 1, spec)
    assert (type(ours), ours.rule) == (IndexedRulePruner, build_pruner(spec).rule)


@pytest.mark.parametrize("name", ["hyperband", "asha", "none"])
def test_the_other_pruners_are_optunas(storage, name):
    spec = pruner_spec(name, epochs=20)
    assert type(pruner_on(storage, 1, spec)) is type(build_pruner(spec))


def test_a_setting_that_the_pruner_does_not_have_is_refused(storage):
    with pytest.raises(UsageError, match="--pruner median has no setting 'percentile'"):
        pruner_on(storage, 1, PrunerSpec(name="median", settings={"percentile": 10.0}))


class Multiplications(TorchDispatchMode):
    """Whether torch was deterministic at each multiplication of matrices."""

    def __init__(self):
        super().__init__()
        self.were_deterministic = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.were_deterministic.append(torch.are_deterministic_algorithms_enabled())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_slot_computes_nothing_before_it_is_deterministic(tmp_path, deterministic, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # not set for the tests after this one
    file = tmp_path / "mine.py"
    file.write_text("def objective(trial):\n    return 0.0\n")
    config = SlotConfig(
        storage="postgresql://nobody@localhost:1/none",
        study="s",
        worker="w",
        objective=f"{file}:objective",
        data_dir=tmp_path,
        device="cpu",
        allow_code_change=True,
    )
    searched = ObjectiveSpec(name="mine.py:objective", code_hash="0")
    spec = a_spec(deterministic=deterministic).model_copy(update={"objective": searched})
    study = Study(study_id=1, name="s", metrics=("value",), directions=("maximize",), spec=spec)
    torch.use_deterministic_algorithms(not deterministic)
    try:
        with Multiplications() as seen:
            Slot(config, lambda _: None, Orders(io.StringIO()))._load(study)
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(seen.were_deterministic) == {deterministic}


@pytest.mark.cuda
def test_a_slot_that_tried_its_device_can_train_deterministically_on_it():
    code = (
        "import torch; from tuner.slot.attempt import check_device; from tuner.seeds import set_deterministic;"
        "device = torch.device('cuda', 0); check_device(device); set_deterministic(True);"
        "ones = torch.ones(64, 64, device=device, requires_grad=True); (ones @ ones).sum().backward()"
    )
    (plan,) = plan_slots("cuda:0")
    done = subprocess.run(
        [sys.executable, "-c", code], env=plan.environment(1), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
