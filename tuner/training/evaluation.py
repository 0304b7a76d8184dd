"""Evaluate a model on all rows of a split, some at a time. Knows nothing of Optuna or of a database."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner.data import Batch, DataError, Inputs, Rows, Samples, Split, Tensors, concatenated, map_inputs, tensors
from tuner.errors import ObjectiveError
from tuner.spec import Precision
from tuner.training.batches import Batches, batches_of, readable
from tuner.training.memory import free_memory, is_out_of_memory
from tuner.training.steps import autocast, call, matrix_products

if TYPE_CHECKING:
    from torchmetrics import Metric

Predictions = Callable[[Any], Any]

# Evaluation needs no gradients, so bigger batches than training's fit; 4,096 rows of 784 floats are 13 MB.
EVALUATION_ROWS = 4096
EVALUATION_BYTES = {"cpu": 16 * 2**20, "mps": 64 * 2**20, "cuda": 256 * 2**20}
"""How large the inputs of one call may be, by type of device."""
OUTPUT_SHARE = 4
"""How many times as large may be what a layer gives: a language model's outputs are thousands of times its inputs."""
PROBED_ROWS = 8
"""On how many rows a model is called to see how large its outputs are, where a training takes no more at once."""


class Evaluation:
    """Evaluates one model on the same rows, after each epoch.

    The model is called on as many rows at once as is fit for its inputs and for the largest of its layers' outputs,
    which a first call shows, never on less than `at_least`; and on half as many from then on where memory runs out.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        device: torch.device,
        *,
        at_least: int = 1,
        predictions: Predictions | None = None,
        precision: Precision = "fp32",
        alive: Callable[[], None] = lambda: None,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._model = model
        self._rows = rows
        self._device = device
        self._at_least = at_least
        self._predictions = predictions
        self._precision = precision
        self._alive = alive
        self._log = log
        self._read_at_once = min(len(rows), _rows_by_inputs(rows, device, at_least))
        self._probed = min(self._read_at_once, max(at_least, PROBED_ROWS))
        self._batches: Batches = batches_of(rows, self._read_at_once, device)
        self._at_once: int | None = None

    def close(self) -> None:
        """End the processes that read the rows."""
        self._batches.close()

    @torch.no_grad()
    def metrics(self, metrics: Mapping[str, Metric]) -> dict[str, float]:
        """Return each metric over all rows - not a mean over batches - with the model in eval mode."""

        def update() -> None:
            for metric in metrics.values():
                metric.reset()
            for batch in self._calls():
                with autocast(self._device, self._precision):
                    predicted = _prediction(self._model, batch.inputs, self._predictions)
                if isinstance(batch.targets, Tensor) and not isinstance(predicted, Tensor):
                    raise ObjectiveError(
                        "metrics and export need one tensor of what the model returns, as there is one target, got"
                        f" {type(predicted).__name__}: override prediction(outputs)"
                    )
                predicted = map_inputs(_full, predicted)
                for metric in metrics.values():
                    metric.update(predicted, batch.targets)

        self._halving(update)
        computed: dict[str, Any] = {}
        for name, metric in metrics.items():
            found = metric.compute()
            computed |= found if isinstance(found, dict) else {name: found}  # ClasswiseWrapper's: one for each class
        return _numbers(computed)

    @torch.no_grad()
    def predicted(self) -> Tensors:
        """Return the model's predictions for all rows, in eval mode."""
        found: list[Tensors] = []

        def collect() -> None:
            found[:] = [_prediction(self._model, batch.inputs, self._predictions) for batch in self._calls()]

        self._halving(collect)
        return concatenated(found)

    def _halving(self, work: Callable[[], None]) -> None:
        """Do the work, from its beginning on half as many rows at once for each time that memory runs out."""
        self._model.eval()
        while True:
            try:
                if self._at_once is None:
                    self._at_once = min(self._read_at_once, self._rows_by_outputs())
                work()
                return
            except (RuntimeError, MemoryError) as error:
                at_once = self._at_once or self._probed
                if at_once <= 1 or not is_out_of_memory(error):
                    raise
                self._at_once = at_once // 2
            # Here the error is gone, and with it the frames that held the tensors.
            free_memory()
            self._log(f"evaluating {self._at_once} rows at once, as there is no memory for {at_once}")

    def _calls(self) -> Iterator[Batch]:
        """Yield what the model is called on: all rows, in order."""
        assert self._at_once is not None
        for batch in self._batches.in_order():
            self._alive()
            if batch.n_rows <= self._at_once:
                yield batch
                continue
            for start in range(0, batch.n_rows, self._at_once):
                rows = slice(start, start + self._at_once)
                yield batch.map(lambda tensor, rows=rows: tensor[rows])  # type: ignore[misc]

    def _rows_by_outputs(self) -> int:
        """Return for how many rows the outputs of the largest layer are small enough."""
        rows = self._rows.rows(slice(0, self._probed)).to(self._device)
        found = [1]

        def measure(_: nn.Module | None, __: Any, outputs: Any) -> None:
            found.append(sum(tensor.numel() * tensor.element_size() for tensor in _tensors(outputs)))

        with ExitStack() as hooks, autocast(self._device, self._precision):
            if not _is_compiled(self._model):  # a compiled model would keep the hooks
                for layer in self._model.modules():
                    hooks.callback(layer.register_forward_hook(measure).remove)
            measure(None, None, call(self._model, rows.inputs))
        return max(self._at_least, OUTPUT_SHARE * _bytes(self._device) * len(rows) // max(found))


def evaluate(
    model: nn.Module,
    rows: Rows,
    metrics: Mapping[str, Metric],
    predictions: Predictions | None = None,
    *,
    precision: Precision = "fp32",
) -> dict[str, float]:
    """Return each metric over all rows - not a mean over batches - with the model in eval mode."""
    device = device_of(model, rows)
    if isinstance(rows, Samples) and rows.readers is None:
        rows = readable(rows)  # of a test split, which nothing has placed
    evaluation = Evaluation(model, rows, device, predictions=predictions, precision=precision)
    with matrix_products(precision), closing(evaluation):
        return evaluation.metrics(metrics)


def predict(model: nn.Module, inputs: Inputs, predictions: Predictions | None = None) -> Tensors:
    """Return the model's predictions (n, ...) for all rows of `inputs`, in eval mode, on their device."""
    split = Split(inputs, tensors(inputs)[0])
    return Evaluation(model, split, split.device, predictions=predictions).predicted()


def device_of(model: nn.Module, rows: Rows) -> torch.device:
    """Return the model's device, or that of the rows for a model without tensors. Raises DataError if it has two."""
    found = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(found) > 1:
        raise DataError(f"a model needs to be on one device, got it on {', '.join(sorted(map(str, found)))}")
    if found:
        return found.pop()
    return rows.device if isinstance(rows, Split) else torch.device("cpu")


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return each value as a number, those on a CUDA device by one copy."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ObjectiveError(
                f"the metric {name!r} needs to compute one number, or a dict of them, got shape {list(value.shape)}:"
                " torchmetrics.ClasswiseWrapper makes a dict of those of each class"
            )
    far = {name: value for name, value in values.items() if isinstance(value, Tensor) and value.is_cuda}
    read = torch.stack([value.detach().double().flatten()[0] for value in far.values()]).tolist() if far else []
    return {name: float(value) for name, value in (values | dict(zip(far, read, strict=True))).items()}


def _prediction(model: nn.Module, inputs: Inputs, predictions: Predictions | None) -> Tensors:
    outputs = call(model, inputs)
    predicted: Tensors = outputs if predictions is None else predictions(outputs)
    parts = tensors(predicted) if isinstance(predicted, tuple | dict) else (predicted,)
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        found = type(predicted if len(parts) != 1 else parts[0]).__name__
        raise ObjectiveError(
            f"a prediction needs to be one tensor, got {found}: override prediction(outputs), which gives a tuple or a"
            " dict of tensors where there are several targets"
        )
    return predicted


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _rows_by_inputs(rows: Rows, device: torch.device, at_least: int) -> int:
    row = rows.rows(slice(0, 1))
    n_bytes = sum(4 * tensor.numel() for tensor in tensors(row.inputs))
    return max(at_least, min(EVALUATION_ROWS, _bytes(device) // max(1, n_bytes)))


def _is_compiled(model: nn.Module) -> bool:
    return any(
        hasattr(layer, "_orig_mod") or getattr(layer, "_compiled_call_impl", None) is not None
        for layer in model.modules()
    )


def _bytes(device: torch.device) -> int:
    return EVALUATION_BYTES.get(device.type, EVALUATION_BYTES["cuda"])


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors of what a layer gives, whatever it holds them in."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, list | tuple):
        for value in outputs:
            yield from _tensors(value)
