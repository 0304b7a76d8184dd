"""What a model does on the test split, beyond its figures: how sure they are, and where it errs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

from tuner.data import Data, Split, Tensors, map_inputs, tensors
from tuner.labels import Labels, LabelsOfEach
from tuner.model.describing import with_ranges
from tuner.model.manifest import ClassDetails, OfClass, TestDetails
from tuner.model.samples import N_EACH, Samples
from tuner.model.writing import described
from tuner.training.evaluation import Evaluation, device_of

RESAMPLES = 1000
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 15
MAX_VALUES = 1 << 28
"""How many numbers the predictions of the test split may be, for them to be kept at once."""
MAX_CONFUSED = 100
"""Classes that a confusion matrix is given of."""
_MAX_WORK, _MIN_RESAMPLES = 1 << 31, 100
_AT_ONCE = 1 << 24


def details_of_test(
    model: nn.Module,
    test: Split,
    data: Data,
    metrics: Mapping[str, Metric],
    class_names: Any,
    seed: int,
    *,
    show_rows: bool = True,
) -> TestDetails | None:
    """Return the details of a model's predictions on the test split; None where they are too many to be kept.

    `metrics` lie on the rows' device and are used up. The rows are drawn again, with replacement, as `seed` says. Some
    of them are among the details if they may be shown.
    """
    evaluation = Evaluation(model, test, device_of(model, test))
    with closing(evaluation):
        one = Evaluation(model, test.rows(slice(0, 1)), device_of(model, test)).predicted()
        if len(test) * sum(part.numel() for part in tensors(one)) > MAX_VALUES:
            return None
        predicted = map_inputs(lambda part: part.float() if part.is_floating_point() else part, evaluation.predicted())
    inputs = with_ranges(described(data.train.rows(slice(0, 1)).inputs), data.train)
    samples = Samples(test, inputs, seed, n_each=N_EACH if show_rows else 0)
    resamples, intervals = _bootstrap(metrics, predicted, test.targets, len(test), seed)
    details = TestDetails(rows=len(test), seed=seed, resamples=resamples, intervals=intervals)
    labels = data.train.labels
    of_each = labels.by_target if isinstance(labels, LabelsOfEach) else {"": labels}
    for target, its in of_each.items():
        outputs: Any = predicted if target == "" else predicted[target]  # type: ignore[index]
        targets: Any = test.targets if target == "" else test.targets[target]  # type: ignore[index]
        if isinstance(its, Labels):
            names = class_names[str(target)] if isinstance(class_names, Mapping) else class_names
            if (judged := _judged(outputs.cpu(), targets.cpu(), its)) is not None:
                details.classes[str(target)] = _of_classes(judged, its, names)
                if targets.ndim == 1:
                    found = samples.of_classes(judged.rows, judged.wanted, judged.given, judged.confidence, names)
                    details.wrong[str(target)], details.right[str(target)] = found
        elif isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.numel() == targets.numel():
            residuals = (outputs.reshape(targets.shape) - targets).cpu().double().reshape(len(test), -1)
            if residuals.isfinite().all():
                # torch.quantile takes 16 million numbers at most.
                drawn = residuals[:: max(1, residuals.numel() >> 23)]
                quantiles = torch.quantile(drawn, torch.tensor(QUANTILES, dtype=drawn.dtype), dim=0).T.tolist()
                details.residuals[str(target)] = quantiles
                if residuals.shape[1] == 1:
                    wanted = targets.cpu().double().flatten()
                    found = samples.of_numbers(wanted, wanted + residuals.flatten())
                    details.wrong[str(target)], details.right[str(target)] = found
    return details


def _bootstrap(
    metrics: Mapping[str, Metric], predicted: Tensors, targets: Tensors, n_rows: int, seed: int
) -> tuple[dict[str, int], dict[str, tuple[float, float] | None]]:
    """Return for each figure of how many resamples its interval is, and the interval that holds 95 % of them."""
    counts: dict[str, int] = {}
    found: dict[str, Tensor] = {}
    work = max(1, sum(part.numel() for part in (*tensors(predicted), *tensors(targets))))
    for name, metric in metrics.items():
        generator = torch.Generator().manual_seed(seed)
        if (shares := _of_each_row(metric, predicted, targets)) is not None:
            found[name] = _means(metric, *shares, generator)
            continue
        n_resamples = max(_MIN_RESAMPLES, min(RESAMPLES, _MAX_WORK // work))
        values: dict[str, list[float]] = {}
        for _ in range(n_resamples):
            rows = torch.randint(n_rows, (n_rows,), generator=generator).to(tensors(predicted)[0].device)
            metric.reset()
            metric.update(
                map_inputs(lambda part, rows=rows: part[rows], predicted),  # type: ignore[misc]
                map_inputs(lambda part, rows=rows: part[rows], targets),  # type: ignore[misc]
            )
            computed = metric.compute()
            for its, value in (computed if isinstance(computed, dict) else {name: computed}).items():
                values.setdefault(its, []).append(float(value))
        found |= {its: torch.tensor(drawn, dtype=torch.float64) for its, drawn in values.items()}
    intervals: dict[str, tuple[float, float] | None] = {}
    for name, drawn in found.items():
        counts[name] = len(drawn)
        low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
        intervals[name] = (low, high) if drawn.isfinite().all() else None
    return counts, intervals


def _of_each_row(metric: Metric, predicted: Any, targets: Any) -> tuple[Tensor, Tensor] | None:
    """Return what each row adds to the metric, and its weight, where it is a mean of that; it takes a second less.

    The metric's own figure of all rows is held against it.
    """
    if not isinstance(predicted, Tensor) or not isinstance(targets, Tensor):
        return None
    weights = torch.ones(len(targets), device=targets.device, dtype=torch.float64)
    if type(metric) is MulticlassAccuracy and metric.average == "micro" and metric.top_k == 1 and targets.ndim == 1:
        of_row = (predicted.argmax(1) == targets).double()
        if metric.ignore_index is not None:
            weights = (targets != metric.ignore_index).double()
    elif type(metric) in (MeanSquaredError, MeanAbsoluteError) and predicted.shape == targets.shape:
        errors = (predicted - targets).double().reshape(len(targets), -1)
        of_row = (errors.square() if type(metric) is MeanSquaredError else errors.abs()).mean(1)
    else:
        return None
    metric.reset()
    metric.update(predicted, targets)
    own, ours = metric.compute(), _figure(metric, (of_row * weights).sum() / weights.sum())
    if own.numel() != 1 or not torch.isclose(own.double(), ours, rtol=1e-4):
        return None
    return of_row.cpu(), weights.cpu()


def _figure(metric: Metric, mean: Tensor) -> Tensor:
    return mean.sqrt() if isinstance(metric, MeanSquaredError) and not metric.squared else mean


def _means(metric: Metric, of_row: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    drawn = []
    at_once = max(1, _AT_ONCE // len(of_row))
    for start in range(0, RESAMPLES, at_once):
        rows = torch.randint(
            len(of_row), (min(at_once, RESAMPLES - start), len(of_row)), generator=generator, dtype=torch.int32
        )
        drawn.append((of_row * weights)[rows].sum(1) / weights[rows].sum(1))
    return _figure(metric, torch.cat(drawn))


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """What a classifier gives for the rows whose class is known: numbers of classes, and how sure it is."""

    rows: Tensor
    wanted: Tensor
    given: Tensor
    confidence: Tensor


def _judged(outputs: Tensor, targets: Tensor, labels: Labels) -> _Judged | None:
    """Return it for logits, or probabilities, (n, classes, ...) and the numbers of classes (n, ...)."""
    if labels.form != "one" or outputs.ndim != targets.ndim + 1 or outputs.shape[1] != labels.n_classes:
        return None
    shown = outputs.movedim(1, -1).reshape(-1, labels.n_classes).double()
    wanted = targets.reshape(-1)
    known = labels.known(wanted)
    shown, wanted = shown[known], wanted[known]
    if len(wanted) == 0 or not shown.isfinite().all():
        return None
    is_share = bool(((shown >= 0) & (shown <= 1)).all()) and torch.allclose(shown.sum(1), torch.ones(1).double())
    confidence, given = (shown if is_share else shown.softmax(1)).max(1)
    rows = torch.arange(len(known))[known]
    return _Judged(rows=rows, wanted=wanted, given=given, confidence=confidence)


def _of_classes(judged: _Judged, labels: Labels, names: Any) -> ClassDetails:
    n, wanted, given = labels.n_classes, judged.wanted, judged.given
    confusion = torch.bincount(wanted * n + given, minlength=n * n).reshape(n, n)
    hits, of_class, as_class = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    by_class = {}
    for number in range(n):
        right, rows, called = int(hits[number]), int(of_class[number]), int(as_class[number])
        by_class[str(names[number])] = OfClass(
            rows=rows,
            recall=right / rows if rows else None,
            precision=right / called if called else None,
            f1=2 * right / (rows + called) if rows + called else None,
        )
    bins = (judged.confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, (given == wanted).double() - judged.confidence)
    return ClassDetails(
        by_class=by_class,
        confusion=confusion.tolist() if n <= MAX_CONFUSED else None,
        calibration_error=float(gaps.abs().sum() / len(wanted)),
    )
