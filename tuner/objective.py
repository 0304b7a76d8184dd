"""The base class that an objective's author meets."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from tuner import training
from tuner.data import Data, Rows
from tuner.errors import ObjectiveError
from tuner.training.classes import accuracies_of_classes, loss_of_classes
from tuner.training.steps import Loss, fastest, materialize
from tuner.training.targets import WeightedLoss, metric_of

if TYPE_CHECKING:
    import optuna
    from pydantic._internal._model_construction import ModelMetaclass
    from torchmetrics import Metric
else:
    ModelMetaclass = type(BaseModel)

__all__ = ["Loss", "Objective", "Params", "WeightedLoss", "fastest", "metric_of"]

Params = Mapping[str, Any]


class _ObjectiveType(ModelMetaclass):
    """Leaves what is pydantic's out of `dir`, and so out of `help` and of what an editor offers: 350 lines of 570."""

    def __dir__(cls) -> list[str]:  # noqa: N805 - of a metaclass
        own = {name for base in cls.__mro__ if base not in _OF_PYDANTIC for name in vars(base)}
        theirs = {name for base in _OF_PYDANTIC for name in vars(base)}
        hidden = {name for name in vars(cls) if name.startswith("__pydantic")} | (theirs - own) | _MADE_BY_PYDANTIC
        return [name for name in super().__dir__() if name not in hidden]


_OF_PYDANTIC = (BaseModel, ABC)
_MADE_BY_PYDANTIC = {"__abstractmethods__", "__class_vars__", "__private_attributes__", "__signature__", "_abc_impl"}
_MADE_BY_PYDANTIC |= {"__hash__", "__init_subclass__", "__weakref__", "__dict__", "__annotations__", "model_config"}


class Objective(BaseModel, ABC, metaclass=_ObjectiveType):
    """What to search, on which data, with which model.

    A subclass suggests params, loads data and builds a model; the rest has defaults to override. Its fields
    are its options: a field `max_units: int = 256` is set by `tuner run NAME --set max_units=128`, and checked
    as pydantic checks it. An instance is created once in a worker process and used for all of its trials.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    metric: ClassVar[str] = "accuracy"
    """The metric that the study optimizes: a key of what `build_metrics` returns."""
    direction: ClassVar[Literal["maximize", "minimize"]] = "maximize"
    epochs: ClassVar[int] = 20
    """Epochs of a trial, unless `--epochs` says otherwise, or the param `epochs` where suggested."""
    data_license: ClassVar[str | None] = None
    """The licence of the data, for the card of an exported model: an SPDX identifier, such as `CC-BY-4.0`, or text."""
    show_rows: ClassVar[bool] = True
    """Whether an export's manifest may hold some rows of the test split, for its report to show."""
    readers: ClassVar[int | None] = None
    """Processes that read `Samples` in each slot, unless `--readers` says otherwise: 0 for none, None for as many as
    it has cores."""
    prefetch: ClassVar[int | None] = None
    """Batches that each of them is ahead, unless `--prefetch` says otherwise; None for 4."""

    seed: int = Field(default=0, exclude=True)
    """The study's seed (`--seed`), for splitting the data; each trial is seeded before it runs."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # pydantic would make an option of it that nobody asks for, and Objective's own would stay in force.
        for name, annotation in inspect.get_annotations(cls).items():
            if hasattr(Objective, name) and "ClassVar" not in str(annotation):
                raise TypeError(
                    f"{cls.__name__}.{name} cannot be an option, as Objective has a {name!r} of its own:"
                    " override a method as a method, and write a value without an annotation"
                )
        super().__init_subclass__(**kwargs)

    @abstractmethod
    def suggest(self, trial: optuna.Trial) -> None:
        """Suggest the params of a trial by `trial.suggest_float`, `suggest_int` and `suggest_categorical`.

        Everything suggested reaches the other methods as `params`, by name. The space may be conditional:
        suggest a param only where another one's value asks for it.
        """

    @abstractmethod
    def load_data(self, root: Path) -> Data:
        """Return train, valid and test. `root` is the data directory, where downloads are kept."""

    @abstractmethod
    def build_model(self, params: Params) -> nn.Module:
        """Return a new model. It is called with the inputs as the data has them, such as pixels in uint8."""

    def build_loss(self, params: Params, train: Rows) -> Loss:
        """Return the loss of (what the model returns, targets), a mean over the rows.

        Default: cross entropy of class logits, with the param `label_smoothing` where suggested; binary where the
        labels are floats, of several classes a row or of one of two; the sum of each target's, times the param
        `weight_` and its name where suggested, where there are several (`tuner.objective.WeightedLoss`). `train` is
        for those that weigh classes by their share of it (`tuner.data.class_weights`).
        """
        return loss_of_classes(train, params)

    def prediction(self, outputs: Any) -> Any:
        """Return the prediction (n, ...), for metrics and for the exported model, from what the model returns.

        It is one tensor, or for several targets a dict or a tuple of them, as the targets are. Default: what the model
        returns, which has to be overridden for a model of more outputs than targets.
        """
        return outputs

    def build_optimizer(self, model: nn.Module, params: Params) -> Optimizer:
        """Return the optimizer; `tuner.objective.fastest` makes a fused one where there is one.

        Default: AdamW, with the params `lr` and `weight_decay` where suggested.
        """
        lr, weight_decay = params.get("lr", 1e-3), params.get("weight_decay", 0.01)
        return fastest(AdamW, model.parameters(), lr=lr, weight_decay=weight_decay)

    def build_scheduler(
        self,
        optimizer: Optimizer,
        params: Params,  # noqa: ARG002 - for those that override it
        epochs: int,
    ) -> LRScheduler | None:
        """Return the schedule of the learning rate, stepped once an epoch, or None for a constant one.

        One that follows a metric, whose `step` takes an argument, is stepped with the study's.

        Default: cosine annealing to 0 over the epochs (Loshchilov and Hutter 2017, equation 5, without restarts).
        """
        return CosineAnnealingLR(optimizer, epochs)

    def max_grad_norm(self, params: Params) -> float | None:
        """Return the norm that gradients are clipped to, None for no clipping. Default: the param of this name."""
        return params.get("max_grad_norm")

    def build_metrics(self, data: Data) -> dict[str, Metric]:
        """Return torchmetrics objects by name, `metric` among them. Default: the accuracy over all rows.

        Of several targets that is the mean of theirs, which are there as `accuracy_` and the target's name;
        `tuner.objective.metric_of` gives any metric the outputs and values of one of them. One that computes a dict
        gives a value for each of its names, as `ClasswiseWrapper` does for each class.
        """
        return accuracies_of_classes(data)

    def batch_size(self, params: Params) -> int:
        """Return the rows of one training step. Default: the param `batch_size` where suggested, else 64."""
        return int(params.get("batch_size", 64))

    def fit(
        self,
        model: nn.Module,
        train: Rows,
        valid: Rows | None,
        params: Params,
        *,
        metrics: Mapping[str, Metric],
        epochs: int,
        seed: int,
        on_epoch: Callable[[training.Epoch], None] | None = None,
        run: training.Run = training.Run(),  # noqa: B008 - frozen
    ) -> list[training.Epoch]:
        """Train the model in place, calling `on_epoch` after each epoch. Default: `tuner.training.fit`.

        Model, data and metrics are on the trial's device, where the data is a `Split`. An own loop lets what
        `on_epoch` raises pass, and returns the epochs that ended; without `valid` (retraining) their metrics are
        empty, and no epochs after `run.until` are wanted. What `run` says of precision, patience and checkpoints is
        then its own to do, or to leave.
        """
        materialize(model, train)  # optimizers may ask for the shapes of weights
        optimizer = self.build_optimizer(model, params)
        if not isinstance(optimizer, Optimizer):
            raise ObjectiveError(f"build_optimizer needs to return an Optimizer, got {type(optimizer).__name__}")
        scheduler = self.build_scheduler(optimizer, params, epochs)
        if scheduler is not None and not isinstance(scheduler, LRScheduler):
            raise ObjectiveError(f"build_scheduler needs to return an LRScheduler, got {type(scheduler).__name__}")
        loss = self.build_loss(params, train)
        if not callable(loss):
            raise ObjectiveError(f"build_loss needs to return a function or module, got {type(loss).__name__}")
        return training.fit(
            model,
            train,
            valid,
            optimizer=optimizer,
            scheduler=scheduler,
            loss=loss,
            metrics=metrics,
            epochs=epochs,
            batch_size=self.batch_size(params),
            seed=seed,
            max_grad_norm=self.max_grad_norm(params),
            predictions=self.prediction,
            on_epoch=on_epoch,
            run=run,
        )
