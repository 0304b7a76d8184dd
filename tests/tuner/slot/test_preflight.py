"""What is found before the first trial: what no trial can do is refused, what only an export cannot is told."""

import inspect
import itertools
import random
import re

import numpy as np
import optuna
import pytest
import torch
from attempts import Signs, a_spec, attempt
from torch import nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from tuner.data import Data, Samples, Split
from tuner.errors import TunerError
from tuner.slot.preflight import preflight
from tuner.study.sampling import build_sampler
from tuner.training import Epoch, Run

CPU = torch.device("cpu")
RUN = Run()


def _tried(objective, device=CPU, **spec):
    return preflight(objective, a_spec(**spec), objective.load_data(None), device)


def _line(kind):
    lines, first = inspect.getsourcelines(kind)
    return first + next(number for number, text in enumerate(lines) if text.rstrip().endswith("# here"))


class Linear(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)


def _with(model):
    class Some(Signs):
        def build_model(self, params):
            return model()

    return Some()


def test_what_works_is_told_nothing_and_leaves_no_trace():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert _tried(Signs()) == []
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


class NoModel(Signs):
    def build_model(self, params):
        return "linear"


class WrongShape(Signs):
    def build_model(self, params):
        return nn.Linear(3, 2)


class FailingModel(Signs):
    def build_model(self, params):
        return params["units"]  # here


class FailingSpace(Signs):
    def suggest(self, trial):
        trial.suggest_float("lr", 0.0, 0.1, log=True)  # here


class Diverges(Signs):
    def build_loss(self, params, train):
        return lambda outputs, targets: outputs.sum() * float("nan")


class Detached(Signs):
    def build_loss(self, params, train):
        return lambda outputs, targets: outputs.detach().sum()


class OtherWeight(Signs):
    def build_loss(self, params, train):
        own = nn.Parameter(torch.ones(()))
        return lambda outputs, targets: (outputs.detach().sum() * own) ** 2


class PickyMetric(Metric):
    def update(self, outputs, targets):
        raise ValueError("no such class")  # here

    def compute(self):
        return torch.tensor(0.0)


class FailingMetric(Signs):
    def build_metrics(self, data):
        return {"accuracy": PickyMetric()}


class OtherMetric(Signs):
    def build_metrics(self, data):
        return {"recall": MulticlassAccuracy(2)}


WIDTHS = itertools.count(2)


class NeverAlike(Signs):
    def build_model(self, params):
        width = next(WIDTHS)
        return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2))


@pytest.mark.parametrize(
    ("kind", "told", "where"),
    [
        (NoModel, "build_model needs to return a torch.nn.Module, got str", None),
        (WrongShape, "evaluating: RuntimeError: mat1 and mat2 shapes cannot be multiplied", None),
        (FailingModel, "build_model: KeyError: 'units'", FailingModel),
        (FailingSpace, "suggest: ValueError: ", FailingSpace),
        (Diverges, ": the training loss is nan in epoch 1", None),
        (Detached, ": the loss needs to follow from weights that are trained", None),
        (OtherWeight, "training: no gradient reaches a weight of the model", None),
        (FailingMetric, "metrics: ValueError: no such class", PickyMetric),
        (OtherMetric, "build_metrics needs to return 'accuracy', the study's metric, got: recall", None),
        (NeverAlike, "loading the weights into a new model: RuntimeError: Error(s) in loading state_dict", None),
    ],
)
def test_what_no_trial_can_do_is_refused_in_one_line_with_the_users_own(kind, told, where):
    with pytest.raises(TunerError) as caught:
        _tried(kind())
    message = str(caught.value)
    assert message.startswith(f"{kind.__name__} cannot be searched as it is: ")
    assert message.endswith("; --no-preflight tries anyway")
    assert told in message
    assert "\n" not in message
    if where is not None:
        assert f"({__file__}, line {_line(where)})" in message


class Random(Linear):
    def forward(self, x):
        return super().forward(x) + torch.rand(())


class Branches(Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


class Forgets(Linear):
    def __init__(self):
        super().__init__()
        self.shift = torch.rand(2)

    def forward(self, x):
        return super().forward(x) + self.shift


class Complex(Linear):
    def __init__(self):
        super().__init__()
        self.register_buffer("phases", torch.ones(2, dtype=torch.complex128))


class Stateful(Linear):
    def get_extra_state(self):
        return Stateful

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Random, ["gives other outputs for the same rows", "there would be no model.pt2", "a new model with these"]),
        (Branches, [f"there would be no model.pt2: GuardOnDataDependentSymNode: .*{__file__}, line "]),
        (Forgets, ["a new model with these weights gives other outputs"]),
        (Complex, ["model.safetensors would lack phases: safetensors holds no complex128"]),
        (Stateful, ["checkpoints cannot hold the model", "would lack _extra_state: it is type and no tensor"]),
    ],
)
def test_what_trials_can_do_without_is_told(model, told):
    lacks = _tried(_with(model))
    for line, part in zip(lacks, told, strict=True):
        assert re.search(part, line), line


def test_params_that_cannot_be_do_not_stand_for_all():
    class Sometimes(Signs):
        def suggest(self, trial):
            super().suggest(trial)
            if trial.number == 0:
                raise ValueError("these cannot be")

    assert _tried(Sometimes()) == []


def test_params_are_those_of_the_first_trial():
    seen = []

    class Seen(Signs):
        def build_model(self, params):
            seen.append((dict(params), torch.rand(()).item()))
            return super().build_model(params)

    _tried(Seen())
    spec = a_spec()
    study = optuna.create_study(direction="maximize", sampler=build_sampler(spec.sampler, spec.seed, 0))
    attempt(study, Seen())
    assert seen[-1] == seen[0]


class NeedsMany(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("n", torch.tensor(0))

    def update(self, outputs, targets):
        self.n += len(targets)

    def compute(self):
        if self.n < 30:
            raise ValueError("too few rows")
        return torch.tensor(1.0)


def test_what_needs_more_rows_gets_them():
    class Many(Signs):
        def build_metrics(self, data):
            return {"accuracy": NeedsMany()}

    assert _tried(Many()) == []


def test_a_rate_that_starts_at_zero_is_no_fault():
    class Warm(Signs):
        def build_scheduler(self, optimizer, params, epochs):
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: epoch / epochs)

    assert _tried(Warm()) == []


def test_a_schedule_is_made_for_the_epochs_that_the_params_say():
    seen = []

    class Long(Signs):
        def suggest(self, trial):
            super().suggest(trial)
            trial.suggest_int("epochs", 7, 7)

        def build_scheduler(self, optimizer, params, epochs):
            seen.append(epochs)

    assert _tried(Long()) == []
    assert set(seen) == {7}


def test_lazy_shared_and_undefined_weights_are_no_fault():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.LazyLinear(2)
            self.last = nn.Linear(2, 2)
            self.again = self.last
            self.register_buffer("limits", torch.tensor([float("nan"), float("inf")]))

        def forward(self, x):
            return self.again(self.last(self.first(x)))

    class Lazily(Signs):
        def build_model(self, params):
            return Odd()

        def build_optimizer(self, model, params):
            return torch.optim.SGD(model.parameters(), lr=0.1)

    assert _tried(Lazily()) == []


@pytest.mark.parametrize("random", [False, True])
def test_a_loop_of_ones_own_is_left_after_an_epoch(random):
    seen = []

    class Own(Signs):
        def load_data(self, root):
            data = super().load_data(root)
            return Data(Samples(data.train, random=random), data.valid, data.test, data.class_names)

        def fit(self, model, train, valid, params, *, metrics, epochs, seed, on_epoch=None, run=RUN):
            assert isinstance(train, Samples)
            history = []
            for number in range(1, epochs + 1):
                batch = train.rows(slice(0, 8))
                nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
                history.append(Epoch(number=number, train_loss=0.0, metrics={"accuracy": 0.0}))
                seen.append(number)
                on_epoch(history[-1])
            return history

    assert _tried(Own()) == []
    assert seen == [1]


def test_what_fails_on_the_cpu_as_it_may_only_there_is_no_refusal():
    class Kernel(Linear):
        def forward(self, x):
            raise RuntimeError("flash attention is only for CUDA tensors")

    (told,) = _tried(_with(Kernel), torch.device("cuda:1"))
    assert told.startswith("could not be tried on the CPU (evaluating: RuntimeError: flash attention")
    assert told.endswith("; trials run on cuda:1")
    with pytest.raises(TunerError, match="flash attention"):
        _tried(_with(Kernel))
    with pytest.raises(TunerError, match="shapes cannot be multiplied"):
        _tried(WrongShape(), torch.device("cuda:1"))


def test_few_rows_are_read_of_samples():
    class Counting:
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, row):
            read.append(row)
            return self.rows[row]

    class Streamed(Signs):
        def load_data(self, root):
            splits = [Split(split.inputs.repeat(9, 1), split.targets.repeat(9)) for _, split in small.splits()]
            return Data(*(Samples(Counting(split)) for split in splits), class_names=small.class_names)

    read, small = [], Signs().load_data(None)
    objective = Streamed()
    data = objective.load_data(None)
    read.clear()
    assert preflight(objective, a_spec(), data, CPU) == []
    assert len(read) <= 20
