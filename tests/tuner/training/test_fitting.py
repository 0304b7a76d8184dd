import copy
import math

import pytest
import torch
from sklearn import metrics as sk
from torch import nn
from torchmetrics import ClasswiseWrapper, MeanMetric, MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassRecall

from tuner.data import Samples, Split
from tuner.errors import ObjectiveError
from tuner.training import DivergedError, Options, Run, evaluate, evaluation, fit, predict
from tuner.training.steps import call


def rows_of(n=70, features=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Split(torch.randn(n, features, generator=generator), torch.randint(classes, (n,), generator=generator))


def a_model(seed=0, *, batch_norm=True):
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8) if batch_norm else nn.Identity(), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def accuracy():
    return {"accuracy": MulticlassAccuracy(3, average="micro")}


def train(model, rows, valid=None, **changes):
    given = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "loss": nn.CrossEntropyLoss(),
        "metrics": accuracy(),
        "epochs": 3,
        "batch_size": 16,
        "seed": 5,
    }
    return fit(model, rows, valid, **{**given, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 16, 24, 70, 500])
@pytest.mark.parametrize("n", [64, 70])
def test_training_is_the_plain_loop_bit_for_bit(n, batch_size):
    rows, valid = rows_of(n), rows_of(33, seed=1)
    ours, plain = (a_model(batch_norm=False) for _ in range(2))
    torch.manual_seed(9)
    history = train(ours, rows, valid, batch_size=batch_size)

    torch.manual_seed(9)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    order = torch.Generator().manual_seed(5)
    losses, accuracies = [], []
    for _ in range(3):
        plain.train()
        total = 0.0
        permutation = torch.randperm(n, generator=order)
        for start in range(0, n, batch_size):
            batch = permutation[start : start + batch_size]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(plain(rows.inputs[batch]), rows.targets[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / n)
        plain.eval()
        with torch.no_grad():
            accuracies.append((plain(valid.inputs).argmax(1) == valid.targets).float().mean().item())

    for name, tensor in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert [epoch.number for epoch in history] == [1, 2, 3]
    assert [epoch.train_loss for epoch in history] == pytest.approx(losses)
    assert [epoch.metrics["accuracy"] for epoch in history] == pytest.approx(accuracies)


@pytest.mark.slow
def test_training_learns():
    rows = rows_of(200)
    rows = Split(rows.inputs, (rows.inputs[:, 0] > 0).long())
    history = train(a_model(), rows, rows, epochs=10)
    assert history[-1].metrics["accuracy"] > 0.95
    assert history[-1].train_loss < history[0].train_loss / 2


@pytest.mark.parametrize(("n", "batch_size"), [(17, 16), (33, 16), (5, 4)])
def test_a_last_batch_of_one_row_does_not_break_batch_norm(n, batch_size):
    seen = []
    model = a_model()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    history = train(model, rows_of(n), epochs=2, batch_size=batch_size)
    assert seen == [batch_size] * (n // batch_size) * 2
    assert all(0 < epoch.train_loss < 3 for epoch in history)


@pytest.mark.parametrize(("n", "batch_size"), [(1, 16), (1, 1), (3, 1)])
def test_rows_that_come_one_by_one_are_trained_on(n, batch_size):
    seen = []
    model = a_model(batch_norm=False)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    train(model, rows_of(n), epochs=2, batch_size=batch_size)
    assert seen == [1] * n * 2


def test_the_mean_loss_is_over_the_rows_that_were_trained_on():
    rows = Split(torch.zeros(17, 4), torch.zeros(17, dtype=torch.long))
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.bias)
    (epoch,) = train(model, rows, epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    assert epoch.train_loss == pytest.approx(math.log(3))


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_order_of_the_rows_follows_from_the_seed_alone(seed):
    def order(seed):
        seen = []
        model = nn.Linear(4, 3)
        model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0][:, 0].tolist()))
        torch.rand(3)  # the global generator has no part in it
        train(model, rows_of(), epochs=2, seed=seed)
        return seen

    first = order(seed)
    assert order(seed) == first
    assert order(seed - 1 if seed else 1) != first
    assert first[:70] != first[70:]
    assert sorted(first[:70]) == sorted(first[70:])


def test_the_scheduler_is_stepped_once_an_epoch():
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rates = []
    train(
        model,
        rows_of(),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        on_epoch=lambda _: rates.append(optimizer.param_groups[0]["lr"]),
    )
    assert rates == [0.5, 0.25, 0.125]


def test_without_a_validation_split_the_metrics_are_empty():
    assert [epoch.metrics for epoch in train(a_model(), rows_of())] == [{}, {}, {}]


def test_what_the_callback_raises_ends_the_training_and_passes_through():
    told = []

    def prune(epoch):
        told.append(epoch.number)
        if epoch.number == 2:
            raise KeyError("pruned")

    with pytest.raises(KeyError, match="pruned"):
        train(a_model(), rows_of(), rows_of(9), on_epoch=prune)
    assert told == [1, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_training_with_its_epoch(value):
    losses = iter([1.0] * 5 + [value] * 99)
    with pytest.raises(DivergedError, match=rf"the training loss is {value} in epoch 2"):
        train(a_model(), rows_of(), loss=lambda outputs, _: outputs.sum() * 0 + next(losses))


@pytest.mark.parametrize("rows_at_once", [7, 100, 4096])
def test_metrics_are_those_of_scikit_learn_over_the_whole_split(monkeypatch, rows_at_once):
    monkeypatch.setattr(evaluation, "EVALUATION_ROWS", rows_at_once)
    model, split = a_model(), rows_of(250, seed=2)
    ours = evaluate(
        model,
        split,
        {
            **accuracy(),
            "f1": MulticlassF1Score(3, average="macro"),
            "recall": MulticlassRecall(3, average="macro"),
        },
    )
    guessed = predict(model, split.inputs).argmax(1)
    assert len(guessed.unique()) > 1
    assert ours == pytest.approx(
        {
            "accuracy": sk.accuracy_score(split.targets, guessed),
            "f1": sk.f1_score(split.targets, guessed, average="macro"),
            "recall": sk.recall_score(split.targets, guessed, average="macro"),
        }
    )


def test_a_regression_metric_is_not_a_mean_over_batches(monkeypatch):
    monkeypatch.setattr(evaluation, "EVALUATION_ROWS", 64)
    split = Split(torch.arange(65.0).reshape(65, 1), torch.zeros(65, 1))
    found = evaluate(nn.Identity(), split, {"rmse": MeanSquaredError(squared=False)})
    assert found["rmse"] == pytest.approx(sk.root_mean_squared_error(split.targets, split.inputs))


def test_a_metric_that_computes_a_dict_gives_a_value_for_each_name():
    model, split = a_model(), rows_of(250, seed=2)
    recall = ClasswiseWrapper(MulticlassRecall(3, average=None), labels=["a", "b", "c"], prefix="recall ")
    found = evaluate(model, split, {**accuracy(), "by class": recall})
    wanted = sk.recall_score(split.targets, predict(model, split.inputs).argmax(1), average=None)
    assert list(found) == ["accuracy", "recall a", "recall b", "recall c"]
    assert list(found.values())[1:] == pytest.approx(wanted.tolist())


def test_evaluating_twice_gives_the_same_and_changes_nothing():
    model, split, metrics = a_model().train(), rows_of(), accuracy()
    before = copy.deepcopy(model.state_dict())
    assert evaluate(model, split, metrics) == evaluate(model, split, metrics)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not model.training


class _Sum(nn.Module):
    def forward(self, x, y):
        return x - 2 * y


@pytest.mark.parametrize("rows_at_once", [2, 4096])
@pytest.mark.parametrize("kind", [tuple, dict])
def test_a_model_of_several_inputs_gets_a_tuple_in_order_and_a_dict_by_name(monkeypatch, kind, rows_at_once):
    monkeypatch.setattr(evaluation, "EVALUATION_ROWS", rows_at_once)
    x, y = torch.rand(5, 2), torch.rand(5, 2)
    inputs = (x, y) if kind is tuple else {"y": y, "x": x}
    assert torch.equal(call(_Sum(), inputs), x - 2 * y)
    assert torch.equal(predict(_Sum(), inputs), x - 2 * y)


def ends(accuracies, *, patience, direction="maximize", metric="accuracy", epochs=9):
    """Train with a validation whose values are these, and return how many epochs ran."""
    values = iter(accuracies)

    class Told(MeanMetric):
        def update(self, outputs, targets):
            super().update(next(values))

    run = Run(options=Options(patience=patience), metric=metric, direction=direction)
    rows = rows_of(8)
    return len(
        train(nn.Linear(4, 3), rows, rows, metrics={"accuracy": Told(nan_strategy="disable")}, epochs=epochs, run=run)
    )


@pytest.mark.parametrize(
    ("accuracies", "patience", "direction", "count"),
    [
        ([0.1, 0.5, 0.4, 0.5, 0.9], 2, "maximize", 4),
        ([0.1, 0.5, 0.4, 0.6, 0.5, 0.5], 2, "maximize", 6),
        ([0.5, 0.1, 0.4, 0.2], 2, "minimize", 4),
        ([0.5, 0.4], 1, "maximize", 2),
        ([math.nan, math.nan, 0.1, math.nan, math.nan], 2, "maximize", 5),
        ([0.5] * 9, None, "maximize", 9),
    ],
)
def test_training_ends_when_no_epoch_was_better_for_so_many(accuracies, patience, direction, count):
    assert ends(accuracies, patience=patience, direction=direction) == count


def test_a_loss_that_is_no_number_ends_the_epoch_at_its_batch():
    losses = iter([1.0] * 2 + [float("nan")] * 99)
    trained = []

    def loss(outputs, _):
        trained.append(1)
        return outputs.sum() * 0 + next(losses)

    with pytest.raises(DivergedError, match="the training loss is nan in epoch 1"):
        train(a_model(), rows_of(), loss=loss)
    assert len(trained) == 3


def test_the_schedule_may_follow_the_metric():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rows = rows_of(8)
    train(
        model,
        rows,
        rows,
        metrics={"zero": MeanMetric(nan_strategy="disable")},
        predictions=lambda outputs: outputs[:, 0] * 0,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5),
        run=Run(metric="zero"),
    )
    assert optimizer.param_groups[0]["lr"] == 0.25


class _Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x)
        return {"classes": y[:, :3], "size": y[:, 3]}


def test_a_loss_gets_all_that_a_model_returns_and_metrics_get_the_prediction():
    rows, seen = rows_of(), set()

    def loss(outputs, targets):
        seen.update(outputs)
        sizes = nn.functional.mse_loss(outputs["size"], targets.float())
        return nn.functional.cross_entropy(outputs["classes"], targets) + 0.1 * sizes

    model = _Pair()
    history = train(model, rows, rows, loss=loss, predictions=lambda outputs: outputs["classes"])
    assert seen == {"classes", "size"}
    guessed = predict(model, rows.inputs, lambda outputs: outputs["classes"]).argmax(1)
    assert history[-1].metrics["accuracy"] == pytest.approx(float((guessed == rows.targets).float().mean()))


def rows_of_calls(model):
    """The numbers of rows that the model is called on, as they come."""
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize(("n_bytes", "rows_at_once"), [(16, 1), (160, 10), (2**30, 50)])
def test_evaluation_takes_as_many_rows_as_fit(monkeypatch, n_bytes, rows_at_once):
    monkeypatch.setitem(evaluation.EVALUATION_BYTES, "cpu", n_bytes)
    model = nn.Linear(4, 3)
    seen = rows_of_calls(model)
    evaluate(model, rows_of(50), accuracy())
    assert seen == [min(rows_at_once, 8)] + [rows_at_once] * (50 // rows_at_once)


class _Words(nn.Module):
    """Scores of many words at each of four places, in one of the shapes that models give them in."""

    def __init__(self, give):
        super().__init__()
        self.layer = nn.Linear(1, 500)
        self.give = give

    def forward(self, x):
        return self.give(self.layer(x.unsqueeze(2)))


GIVEN = {
    "tensor": (lambda scores: scores, lambda outputs: outputs),
    "dict": (lambda scores: {"more": [scores]}, lambda outputs: outputs["more"][0]),
    "tuple": (lambda scores: (scores, None), lambda outputs: outputs[0]),
    "inside": (lambda scores: scores.amax((1, 2)), lambda outputs: outputs),
}


@pytest.mark.parametrize("kind", [lambda rows: rows, Samples], ids=["resident", "streamed"])
@pytest.mark.parametrize("given", GIVEN)
def test_evaluation_takes_no_more_rows_than_the_largest_outputs_allow(monkeypatch, given, kind):
    monkeypatch.setitem(evaluation.EVALUATION_BYTES, "cpu", 10 * 4 * 500 * 4 // evaluation.OUTPUT_SHARE)
    give, predictions = GIVEN[given]
    model, rows = _Words(give), rows_of(50)
    seen = rows_of_calls(model)
    found = evaluate(model, kind(rows), {"mean": MeanMetricOf()}, predictions)
    assert seen == [8] + [10] * 5
    assert found["mean"] == pytest.approx(float(predictions(model(rows.inputs)).mean().detach()), abs=1e-6)


def test_a_model_that_gives_no_tensor_is_told_so():
    class Nothing(nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(ObjectiveError, match="a prediction needs to be one tensor, got NoneType"):
        predict(Nothing(), rows_of().inputs)


class MeanMetricOf(MeanMetric):
    """The mean of all predictions."""

    def update(self, outputs, _):
        super().update(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [lambda rows: rows, Samples], ids=["resident", "streamed"])
@pytest.mark.parametrize("where", ["model", "metric"])
def test_where_memory_runs_out_evaluation_goes_on_with_half_as_many_rows(where, kind):
    def use(n):
        if n > 15:
            torch.empty(2**62, dtype=torch.uint8)  # more than there is

    class Hungry(nn.Linear):
        def forward(self, x):
            if where == "model" and not self.training:
                use(len(x))
            return super().forward(x)

    class HungryMetric(MulticlassAccuracy):
        def update(self, outputs, targets):
            super().update(outputs, targets)
            if where == "metric":
                use(len(outputs))

    model, rows, lines = Hungry(4, 3), kind(rows_of(50)), []
    seen = rows_of_calls(model)
    metrics = {"accuracy": HungryMetric(3, average="micro")}
    history = train(model, rows, rows, metrics=metrics, epochs=2, batch_size=8, run=Run(log=lines.append))
    assert seen[-5:] == [12] * 4 + [2]
    assert lines == [
        "evaluating 25 rows at once, as there is no memory for 50",
        "evaluating 12 rows at once, as there is no memory for 25",
    ]
    guessed = predict(model, rows_of(50).inputs).argmax(1)
    assert history[-1].metrics["accuracy"] == pytest.approx(float((guessed == rows_of(50).targets).float().mean()))


def test_what_does_not_fit_by_single_rows_is_out_of_memory():
    model = nn.Linear(4, 3)
    model.register_forward_hook(lambda *_: torch.empty(2**62, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="memory"):
        evaluate(model, rows_of(50), accuracy())


def test_an_epoch_tells_how_many_rows_it_took_and_how_long():
    epochs = train(a_model(), rows_of(33), rows_of(5), batch_size=16)
    assert [epoch.rows for epoch in epochs] == [32, 32, 32]
    assert all(epoch.train_s > 0 and epoch.evaluate_s > 0 and epoch.wait_s == 0 for epoch in epochs)


class _Caching(nn.Module):
    """Keeps what it multiplied by, as layers with rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.kept = torch.zeros(0, 1)

    def forward(self, x):
        if len(self.kept) < len(x):
            self.kept = torch.ones(len(x), 1)
        return self.layer(x) * self.kept[: len(x)]


def test_what_a_model_keeps_of_an_evaluation_can_be_trained_with():
    model = _Caching()
    assert len(train(model, rows_of(), rows_of(), epochs=2)) == 2
    predict(model, rows_of(500).inputs)
    assert len(train(model, rows_of(), epochs=1)) == 1


def test_evaluation_needs_no_gradients_and_is_in_eval_mode():
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    rows = Split(torch.rand(8, 3), torch.zeros(8, dtype=torch.int64))
    seen = []

    def prediction(outputs):
        seen.append((outputs.requires_grad, model.training))
        return outputs

    model.train()
    evaluate(model, rows, {}, prediction)
    assert seen == [(False, False)]
