"""Before a study's first trial: one model of the first params is taken through all that is needed in the end.

On the CPU, with a few rows, and leaving no trace: random generators are as they were, and each trial is seeded anew.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import optuna
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from torchmetrics import Metric

from tuner import training
from tuner.data import Data, DataError, Rows, Samples, Split, Tensors, tensors
from tuner.errors import FormatError, ObjectiveError, TunerError, first_line
from tuner.formats.program import PROGRAM, Predictor, program_file
from tuner.formats.weights import WEIGHTS, weights_file
from tuner.objective import Objective
from tuner.places import place_of
from tuner.seeds import derive_seed, seed_everything
from tuner.slot.attempt import built_metrics, built_model, epochs_of
from tuner.spec import Spec
from tuner.study.sampling import build_sampler
from tuner.training.checkpoint import generator_states, set_generator_states
from tuner.training.compiled import load_state, state_of, uncompiled

TRIES = 3
"""How many params are tried: some of a space may be beyond the model, and what can run at all is to be told."""
ROWS, MORE_ROWS = 8, 4096
"""How many rows of a split are taken, and how many where those were too few for something."""
MAX_CHARS = 400
_CPU = torch.device("cpu")
_OF_DEVICE = ("cpu", "cuda", "device", "triton", "mps", "xpu", "not implemented")
"""What errors tell of that may come of trying on the CPU what is to run elsewhere."""


class _CannotWorkError(Exception):
    """What no trial can do, in one line."""


class _EndedError(Exception):
    """The one epoch has ended."""


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """A model of some params, and some rows for it."""

    objective: Objective
    spec: Spec
    params: dict[str, Any]
    model: nn.Module
    train: Rows
    valid: Split
    metrics: dict[str, Metric]
    seed: int


def exported_form(model: nn.Module, objective: Objective) -> nn.Module:
    """Return the model as the one that is exported, in eval mode: it gives the objective's prediction."""
    is_prediction = type(objective).prediction is Objective.prediction
    return (model if is_prediction else Predictor(model, objective.prediction)).eval()


def refuse_leak(objective: Objective, identical: tuple[str, str]) -> None:
    """Raise TunerError that two splits, whose names these are, have the same rows."""
    first, second = identical
    raise TunerError(
        f"{type(objective).__name__} cannot be searched as it is: the {second} split has the very rows of {first}, so"
        " that its figures tell what was learned by heart: let load_data give it other rows; --allow-leak goes on with"
        " them"
    )


def preflight(objective: Objective, spec: Spec, data: Data, device: torch.device) -> list[str]:
    """Return a line for each thing that trials can do without, such as what an export would lack.

    `device` is what trials run on: what fails on the CPU as it may only there is such a line. Raises TunerError, with
    the user's own line, if the first params cannot be trained, evaluated, saved and loaded, nor can the next ones.
    """
    problems: list[str] = []
    study = optuna.create_study(direction=spec.direction)
    with _without_a_trace():
        for number in range(TRIES):
            try:
                return _try_params(objective, spec, data, study, number)
            except _CannotWorkError as error:
                problems.append(str(error))
    problem = problems[0]
    if device.type != "cpu" and any(part in problem.lower() for part in _OF_DEVICE):
        return [f"could not be tried on the CPU ({problem}); trials run on {device}"]
    raise TunerError(f"{type(objective).__name__} cannot be searched as it is: {problem}; --no-preflight tries anyway")


def _try_params(objective: Objective, spec: Spec, data: Data, study: optuna.Study, number: int) -> list[str]:
    seed = derive_seed(spec.seed, "trial", number)
    seed_everything(seed)
    study.sampler = build_sampler(spec.sampler, spec.seed, number)
    trial = study.ask()
    with _told("suggest"):
        objective.suggest(trial)
    params = trial.params
    model = _built(objective, params)
    with _told("build_metrics"):
        metrics = built_metrics(objective, data, spec.metric)
    rows = min(ROWS, max(2, _batch_size(objective, params)))
    for n, is_last in ((rows, False), (MORE_ROWS, True)):
        tried = _Tried(
            objective=objective,
            spec=spec,
            params=params,
            model=model,
            train=_some(data.train, n, seed, as_samples=type(objective).fit is not Objective.fit),
            valid=_on_cpu(data.valid, n, seed),
            metrics=metrics,
            seed=seed,
        )
        try:
            return [*_evaluate(tried), *_train(tried), *_save(tried)]
        except _CannotWorkError:
            # A class that none of a few rows is of, a batch that is too small: more rows tell.
            if is_last or n >= max(len(data.train), len(data.valid)):
                raise
            model = _built(objective, params)
    raise AssertionError("the last try raises or returns")


def _batch_size(objective: Objective, params: dict[str, Any]) -> int:
    with _told("batch_size"):
        return objective.batch_size(params)


def _built(objective: Objective, params: dict[str, Any]) -> nn.Module:
    with _told("build_model"):
        return built_model(objective, params, _CPU)


def _evaluate(tried: _Tried) -> list[str]:
    """Evaluate twice, and compute the metrics."""
    objective, lacks = tried.objective, []
    with _told("evaluating"):
        one, other = (training.predict(tried.model, tried.valid.inputs, objective.prediction) for _ in range(2))
    if not _is_close(one, other):
        lacks.append(
            f"the model gives other outputs for the same rows each time, in eval mode too: values would differ by"
            f" chance, and there would be no {PROGRAM}; let it be random only while self.training"
        )
    with _told("metrics"):
        values = training.evaluate(tried.model, tried.valid, tried.metrics, objective.prediction)
        if tried.spec.metric not in values:
            raise ObjectiveError(f"metrics need {tried.spec.metric!r}, the study's, got: {', '.join(values) or 'none'}")
    return lacks


def _train(tried: _Tried) -> list[str]:
    """Take the model through an epoch of few rows, as a trial does."""
    is_own_loop = type(tried.objective).fit is not Objective.fit
    reached: list[bool] = []

    def reach(weight: Tensor) -> None:
        reached.append(weight.grad is not None)

    def end(_: training.Epoch) -> None:
        if is_own_loop:  # which need not look at `Run.until`
            raise _EndedError

    hooks = [weight.register_post_accumulate_grad_hook(reach) for weight in tried.model.parameters() if weight.is_leaf]
    with _told("training"), suppress(_EndedError):
        tried.objective.fit(
            tried.model,
            tried.train,
            tried.valid,
            tried.params,
            metrics=tried.metrics,
            epochs=epochs_of(tried.params, tried.spec),
            seed=tried.seed,
            on_epoch=end,
            run=training.Run(until=1, metric=tried.spec.metric, direction=tried.spec.direction),
        )
    for hook in hooks:
        hook.remove()
    if not reached and not is_own_loop and hooks:
        raise _CannotWorkError("training: no gradient reaches a weight of the model: look for detach() and no_grad()")
    return []


def _save(tried: _Tried) -> list[str]:
    """Save the model as checkpoints and exports do, and load it into a new one."""
    lacks = []
    model = uncompiled(tried.model).eval()
    state = state_of(model)
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    except Exception as error:  # noqa: BLE001 - of pickle, and of what the model puts into its state
        lacks.append(f"checkpoints cannot hold the model, so that trials start again: {first_line(error)}")
    new = uncompiled(_built(tried.objective, tried.params))
    with _told("loading the weights into a new model"):
        load_state(new, state)
    _, left_out = weights_file(model)
    lacks += [f"{WEIGHTS} would lack {name}: {reason}" for name, reason in left_out.items()]
    try:
        program_file(exported_form(model, tried.objective), tried.valid)
    except FormatError as error:
        lacks.append(f"there would be no {PROGRAM}: {error}")
    with _told("evaluating a new model with these weights"):
        one, other = (
            training.predict(its, tried.valid.inputs, tried.objective.prediction) for its in (model, new.eval())
        )
    if not _is_close(one, other):
        lacks.append(
            "a new model with these weights gives other outputs: build_model draws something that is not in its"
            " state_dict, as register_buffer would put it there"
        )
    return lacks


def _some(rows: Rows, n: int, seed: int, *, as_samples: bool) -> Rows:
    if isinstance(rows, Samples) and as_samples:  # a loop of one's own may read them itself
        return replace(rows, dataset=Subset(rows.dataset, _index(rows, n, seed).tolist()))  # type: ignore[arg-type]
    return _on_cpu(rows, n, seed)


def _on_cpu(rows: Rows, n: int, seed: int) -> Split:
    return rows.rows(_index(rows, n, seed)).to(_CPU)


def _index(rows: Rows, n: int, seed: int) -> Tensor:
    """Return the numbers of some rows, drawn, as data may be sorted by class."""
    return torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n]


def _is_close(one: Tensors, other: Tensors) -> bool:
    return all(
        torch.allclose(its.double(), others.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
        for its, others in zip(tensors(one), tensors(other), strict=True)
    )


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Tell what fails in the block in one line, with the user's own."""
    try:
        yield
    except (_EndedError, _CannotWorkError):
        raise
    except (ObjectiveError, DataError, TunerError, training.DivergedError) as error:  # they name it themselves
        raise _CannotWorkError(str(error)) from error
    except Exception as error:
        place = place_of(error)
        shown = f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_CHARS]}"
        raise _CannotWorkError(f"{what}: {shown}{'' if place is None else f' ({place})'}") from error


@contextmanager
def _without_a_trace() -> Iterator[None]:
    states = generator_states(_CPU)
    try:
        # What the objective compiles would take longer than all the rest.
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")  # a trial gives them again
            yield
    finally:
        set_generator_states(states, _CPU)
