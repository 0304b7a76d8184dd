"""Plain functions with a loop of their own: what they ask of tuner by their trial, in a slot and outside of one."""

import collections
import io
import logging
import os
import random

import numpy as np
import optuna
import pytest
import torch
from attempts import attempt
from optuna.trial import FixedTrial, TrialState

import tuner
from storage.database.errors import StudyHaltedError
from tuner.errors import TunerError
from tuner.formats.program import load_program
from tuner.loops import _tell_nothing_kept
from tuner.slot.kept_model import packed, take, unpacked
from tuner.training import Interrupted


class Slow:
    """A loop that draws from each generator and keeps its state after each step, as its users write them."""

    def __init__(self, now=True, steps=6):
        self.now, self.steps, self.started_at = now, steps, []

    def __call__(self, trial):
        lr = trial.suggest_float("lr", 0.01, 0.1)
        model = torch.nn.Linear(2, 1).to(tuner.device(trial))
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        checkpoint = tuner.checkpoint(trial)
        state, first = checkpoint.load(), 0
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"] + 1
        self.started_at.append(first)
        for step in range(first, self.steps):
            loss = model(torch.randn(8, 2) + random.random() + np.random.random()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trial.report(loss.item(), step)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            checkpoint.save(state, now=self.now)
        return loss.item()


def raising_at(call, error=Interrupted):
    """Return a check that raises from that call on, as it does in a slot that is told to stop."""
    calls = []

    def check():
        calls.append(None)
        if len(calls) >= call:
            raise error("told to stop")

    return check


def a_study(**fixed):
    study = optuna.create_study(direction="minimize", pruner=optuna.pruners.NopPruner())
    study.enqueue_trial({"lr": 0.05, **fixed})
    return study


def interrupted(study, slow, path, **how):
    """Run the study's first trial until it is given back, and have it wait as the storage of a slot does."""
    with pytest.raises((Interrupted, StudyHaltedError)):
        attempt(study, slow, checkpoints=path, direction="minimize", **how)
    study.enqueue_trial({"lr": 0.05})


@pytest.fixture
def as_first(monkeypatch):
    """Number each trial 0: without a database a trial that was given back is not claimed again."""
    monkeypatch.setattr("tuner.slot.checked_trial.CheckedTrial.number", 0)


def test_a_trial_that_is_given_back_ends_as_if_it_had_not_been(tmp_path, as_first):
    whole, undisturbed = attempt(a_study(), Slow(), direction="minimize")
    study, slow = a_study(), Slow()
    interrupted(study, slow, tmp_path, check=raising_at(5))
    random.seed(7), np.random.seed(7)
    outcome, trial = attempt(study, slow, checkpoints=tmp_path, direction="minimize")
    assert slow.started_at == [0, 3]  # two calls a step: the report of the third was not its end, its save was
    assert outcome.value == whole.value
    assert trial.intermediate_values == undisturbed.intermediate_values
    assert sorted(trial.intermediate_values) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("error", [Interrupted, StudyHaltedError])
def test_a_state_is_saved_when_the_trial_is_given_back_though_none_was_due(tmp_path, as_first, error):
    study, slow = a_study(), Slow(now=False)
    interrupted(study, slow, tmp_path, check=raising_at(7, error))
    attempt(study, slow, checkpoints=tmp_path, direction="minimize")
    assert slow.started_at == [0, 4]


def test_a_report_puts_the_end_off_once_and_only_for_a_function_that_has_a_checkpoint(tmp_path, as_first):
    reported = []

    def reports(trial):
        if reported:
            tuner.checkpoint(trial).load()
        for step in range(9):
            reported.append(step)
            trial.report(0.0, step)

    study = a_study()
    for _ in range(2):
        interrupted(study, reports, tmp_path, check=raising_at(1))
    assert reported == [0, 0, 1]


def test_a_state_comes_back_as_it_was_with_its_tensors_on_the_cpu(tmp_path, as_first):
    state = {
        "tensor": torch.ones(2, dtype=torch.bfloat16),
        "best": np.float32(0.5),
        "history": [(1, 0.25), (2, None)],
        "seen": {3, 4},
        5: collections.OrderedDict(name=b"x", dtype=torch.float16),
    }
    found = []

    def keeps(trial):
        checkpoint = tuner.checkpoint(trial)
        found.append(checkpoint.load())
        checkpoint.save(state, now=True)
        assert tuner.checkpoint(trial) is checkpoint
        raise Interrupted

    study = a_study()
    for _ in range(2):
        interrupted(study, keeps, tmp_path)
    assert found[0] is None
    assert torch.equal(found[1].pop("tensor"), state["tensor"])
    assert found[1] == {key: value for key, value in state.items() if key != "tensor"}
    assert type(found[1]["best"]) is float


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ([1], "a checkpoint's state needs to be a dict, got list"),
        ({"rows": [np.zeros(2)]}, r"got ndarray as state\['rows'\]\[0\]: give torch.from_numpy of it"),
        ({"model": torch.nn.Linear(1, 1)}, r"got Linear as state\['model'\]"),
        ({"run": lambda: 0}, r"got function as state\['run'\]"),
    ],
)
def test_what_could_not_be_read_without_unpickling_is_refused_where_it_is_saved(state, told):
    outcome, _ = attempt(a_study(), lambda trial: tuner.checkpoint(trial).save(state))
    assert outcome.failure == "user_error"
    with pytest.raises(TunerError, match=told):
        raise TunerError(outcome.message)
    assert "test_loops.py, line" in outcome.message


def test_the_next_save_is_due_after_the_studys_time(tmp_path, as_first):
    seen = []

    def keeps(trial):
        checkpoint = tuner.checkpoint(trial)
        seen.append(checkpoint.is_due())
        checkpoint.save({"step": 1})
        seen.append(sum(1 for _ in tmp_path.glob("*")))
        return 0.0

    attempt(a_study(), keeps, checkpoints=tmp_path)
    assert seen == [False, 0]


def test_outside_of_a_slot_nothing_is_kept_and_that_is_told_once(caplog):
    _tell_nothing_kept.cache_clear()
    study = a_study()
    with caplog.at_level(logging.WARNING):
        study.optimize(Slow(), n_trials=2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    told = [record.message for record in caplog.records if record.name.startswith("tuner")]
    assert told == [
        "tuner.checkpoint keeps nothing outside of tuner's workers: 'tuner run file.py:FUNCTION' starts some"
    ]


def test_a_trial_that_does_not_run_here_is_refused():
    kept = []
    attempt(a_study(), lambda trial: kept.append(trial) or tuner.device(trial).index or 0.0)
    study = a_study()
    study.optimize(lambda trial: kept.append(trial) or 0.0, n_trials=1)
    for call in (tuner.checkpoint, tuner.device):
        with pytest.raises(TunerError, match="needs the trial that runs now, in the process that runs it, and trial 0"):
            call(kept[0])
        with pytest.raises(TunerError, match="got int"):
            call(3)
    with pytest.raises(TunerError, match=r"tuner.checkpoint needs a trial that runs, and trial 0 has ended"):
        tuner.checkpoint(kept[1])
    for trial in (FixedTrial({"lr": 0.1}), study.best_trial):
        with pytest.raises(TunerError, match=r"is given while it runs, got (FixedTrial|FrozenTrial)"):
            tuner.checkpoint(trial)
        assert tuner.device(trial).type in ("cpu", "cuda", "mps", "xpu")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # torch's threads, of which none is used
def test_another_process_has_no_part_in_the_trial():
    def forks(trial):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                tuner.checkpoint(trial)
            except TunerError as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        told.append(os.read(read, 999).decode())
        return 0.0

    told = []
    outcome, _ = attempt(a_study(), forks)
    assert outcome.message == ""
    assert "in the process that runs it" in told[0]


class Net(torch.nn.Module):
    """A model with what is kept in no state_dict, and with dropout."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 3)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x):
        return torch.nn.functional.dropout(self.layer(x) * self.scale, 0.5, self.training)


def test_what_is_kept_is_the_model_as_it_was_and_the_one_in_training_stays_as_it_is():
    seen = {}

    def keeps(trial):
        model, rows = Net(), torch.randn(40, 2)
        tuner.keep_model(trial, model, rows, class_names=["a", "b", "c"])
        seen["gave"] = model.eval()(rows[:32]).detach()
        state = torch.get_rng_state()
        with torch.no_grad():
            model.train().layer.weight.mul_(-1)
            model.scale.fill_(9)
        before = {name: its.clone() for name, its in model.state_dict().items()}
        seen["kept"] = unpacked(packed(trial.loop.kept))
        assert all(torch.equal(model.state_dict()[name], its) for name, its in before.items())
        assert model.training, "and in the mode that it was in"
        assert model.scale == 9
        assert torch.equal(torch.get_rng_state(), state)
        return 0.0

    outcome, _ = attempt(a_study(), keeps)
    assert outcome.message == ""
    kept = seen["kept"]
    program = load_program(io.BytesIO(kept.program), "model.pt2")
    assert torch.equal(program(kept.inputs), seen["gave"])
    assert torch.equal(kept.outputs, seen["gave"])
    assert (len(kept.inputs), kept.class_names, kept.missing, list(kept.weights)) == (
        32,
        ("a", "b", "c"),
        {},
        ["layer.weight", "layer.bias"],
    )


def test_a_model_that_torch_cannot_trace_is_kept_without_a_program():
    class Branches(Net):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x[:, :1].expand(-1, 3)

    kept = unpacked(packed(take(Branches(), torch.ones(3, 2))))
    assert kept.program is None
    assert "model.pt2" in kept.missing
    assert kept.weights["layer.weight"].shape == (3, 2)


def with_weight(value):
    model = Net()
    with torch.no_grad():
        model.layer.weight[0, 0] = value
    return model


ROWS = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("model", "inputs", "told"),
    [
        (torch.nn.Linear, ROWS, "keep_model needs a torch.nn.Module, got type"),
        (torch.nn.DataParallel(Net()), ROWS, "got it in a DataParallel: give model.module"),
        (torch.nn.LazyLinear(2), ROWS, "'weight' has no values yet"),
        (Net().to("meta"), ROWS, "has no values yet"),
        (with_weight(float("nan")), ROWS, "whose weight 'layer.weight' has NaN or infinity"),
        (Net(), ROWS.to("meta"), "needs example_inputs where the model is, on cpu, got them on meta"),
        (Net(), np.zeros((3, 2)), "got ndarray: torch.from_numpy"),
        (Net(), (ROWS, torch.zeros(2)), r"as many in each, got \[3, 2\], \[2\]"),
        (Net(), torch.zeros(0, 2), r"at least a row, as many in each, got \[0, 2\]"),
        (Net(), torch.zeros(3, 7), "cannot call the model on example_inputs: RuntimeError"),
        (Net(), {"y": ROWS}, "cannot call the model on example_inputs: TypeError"),
    ],
)
def test_a_model_that_cannot_be_kept_fails_its_trial_and_says_why(model, inputs, told):
    outcome, _ = attempt(a_study(), lambda trial: tuner.keep_model(trial, model, inputs) or 0.0)
    assert outcome.failure == ("nan" if "NaN" in told else "user_error")
    with pytest.raises(TunerError, match=told):
        raise TunerError(outcome.message)


def test_a_kept_model_outlives_the_attempt_that_kept_it(tmp_path, as_first):
    found = []

    def keeps_first(trial):
        checkpoint = tuner.checkpoint(trial)
        if checkpoint.load() is None:
            tuner.keep_model(trial, Net(), ROWS)
            checkpoint.save({"step": 1}, now=True)
            raise Interrupted
        found.append(unpacked(packed(trial.loop.kept)))
        return 0.0

    study = a_study()
    interrupted(study, keeps_first, tmp_path)
    outcome, _ = attempt(study, keeps_first, checkpoints=tmp_path, direction="minimize")
    assert outcome.message == ""
    assert found[0].program is not None


def test_outside_of_a_slot_a_model_is_checked_and_not_kept():
    study = a_study()
    study.optimize(lambda trial: tuner.keep_model(trial, Net(), ROWS) or 0.0, n_trials=1)
    with pytest.raises(TunerError, match="got ndarray"):
        study.optimize(lambda trial: tuner.keep_model(trial, Net(), np.zeros(2)), n_trials=1)
