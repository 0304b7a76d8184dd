"""A model as a program of `torch.export`: called on batches of any size, and read back without unpickling."""

from __future__ import annotations

import contextlib
import inspect
import io
import keyword
import logging
import re
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tuner import training
from tuner.data import Inputs, Rows, Tensors, tensors
from tuner.errors import FormatError, TunerError
from tuner.formats.calling import Names, names_of
from tuner.formats.names import FILES
from tuner.formats.plain_program import plain_archive
from tuner.places import own_place, place_of
from tuner.training.steps import call

PROGRAM: Final = FILES["pt2"]
CHECKED_ROWS = 256
"""How many rows a program that was read back is compared with the model on."""
MAX_REASON_CHARS = 600
RANDOM: Final = (
    "the model gives other outputs for the same rows each time, in eval mode too, so that no program can be compared"
    " with it: let it be random only while self.training"
)

_SHAPES = "torch.fx.experimental.symbolic_shapes"
"""The logger by which torch tells of each condition on a size at the moment that the code makes it (2.10 to 2.15)."""
# Where torch's reason ends and its advice to those who debug torch begins.
_ADVICE = re.compile(
    r"^(Suggested fixes|The error above|The following call|Caused by|To fix the error|(For|If) .*|consider using .*)$"
    r"|For more information.*$",
    re.MULTILINE,
)


class Predictor(nn.Module):
    """A model of several outputs as the one that is exported: it gives the objective's prediction."""

    def __init__(self, model: nn.Module, prediction: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model = model
        self._prediction = prediction

    def forward(self, *args: Any, **named: Any) -> Any:
        return self._prediction(self.model(*args, **named))


def with_arguments(model: nn.Module, names: Sequence[str], *, by_name: bool) -> nn.Module | None:
    """Return a model whose forward has exactly these arguments, as traces take names and order of them from it.

    The model gets them by name or in order. None where one cannot be the name of an argument.
    """
    if any(not name.isidentifier() or keyword.iskeyword(name) for name in names):
        return None

    def forward(this: Predictor, *values: Any, **named: Any) -> Any:
        named |= dict(zip(names, values, strict=False))
        return Predictor.forward(this, **named) if by_name else Predictor.forward(this, *map(named.get, names))

    its = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(its)  # type: ignore[attr-defined]
    kind = type("Predictor", (Predictor,), {"forward": forward})
    parts = (model.model, model._prediction) if isinstance(model, Predictor) else (model, _same)
    made: Predictor = kind(*parts)
    return made.train(model.training)


def _same(outputs: Any) -> Any:
    return outputs


class Traced:
    """A model and rows, and what was made of them for several formats: the program of `torch.export`, traced once.

    The model is in eval mode, and on the CPU as the rows are.
    """

    def __init__(self, model: nn.Module, rows: Rows) -> None:
        self.model = model
        self.rows = rows
        self.inputs = rows.rows(torch.arange(4) % len(rows)).inputs  # one row would be taken for a fixed size

    @cached_property
    def names(self) -> Names:
        """What the model takes and gives is called. Raises FormatError if it cannot be called."""
        try:
            outputs = training.predict(self.model, self.inputs)
        except Exception as error:
            raise FormatError(reason_of(error)) from error
        return Names(inputs=names_of(self.inputs), outputs=names_of(outputs))

    @cached_property
    def program(self) -> ExportedProgram:
        """The program. Raises FormatError with torch's reason and the line of the user's that it is about."""
        return _traced(self.model, self.inputs)


def write(traced: Traced) -> bytes:
    """Return the file of the model's program, which was read back and gives the model's outputs on its rows.

    Raises FormatError with torch's reason and the line of the user's that it is about, where torch tells or shows it.
    """
    data = _saved(traced.program)
    inputs = traced.rows.rows(slice(0, CHECKED_ROWS)).inputs
    _compare(load_program(io.BytesIO(data), PROGRAM), traced.model, inputs)
    return data


def program_file(model: nn.Module, rows: Rows) -> bytes:
    """Return the file of the program of a model that is nothing else's, as `write` does."""
    return write(Traced(model, rows))


def load_program(file: Path | io.BytesIO, name: str | None = None) -> nn.Module:
    """Return the exported program in a file. Raises FormatError if reading it could run or unpickle a part of it.

    A call of it that raises leaves gradients on or off as they were.
    """
    archive = plain_archive(file, name or str(file))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # torch's own, up to 2.11
        try:
            program = torch.export.load(archive).module()
        except Exception as error:
            raise FormatError(f"{name or file} needs to hold a program, got parts that make none: {error!r}") from error
    program.register_forward_pre_hook(_keep_gradient_mode, prepend=True)
    program.register_forward_hook(_restore_gradient_mode, always_call=True)
    return program


# What stands under no_grad() in a model is a pair of calls in its program, of which an error between them skips the
# second (torch 2.10 to 2.15): gradients would stay off in the process that called it.
_modes = threading.local()


def _keep_gradient_mode(*_: Any) -> None:
    if not hasattr(_modes, "before"):
        _modes.before = []
    _modes.before.append(torch.is_grad_enabled())


def _restore_gradient_mode(*_: Any) -> None:
    before = _modes.before.pop()
    if torch.is_grad_enabled() != before:
        torch.set_grad_enabled(before)


def _traced(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tensors(inputs), {})
    sizes = {0: torch.export.Dim("batch", min=1)}
    shapes: Any = dict.fromkeys(inputs, sizes) if isinstance(inputs, dict) else tuple(sizes for _ in tensors(inputs))
    if any(its.kind in (its.VAR_POSITIONAL, its.VAR_KEYWORD) for its in _arguments(model)):
        # What torch makes of a program for ONNX finds no argument that is one of *args or **named (2.14, 2026-11).
        names = [*inputs] if isinstance(inputs, dict) else [f"input_{number}" for number, _ in enumerate(args)]
        model = with_arguments(model, names, by_name=isinstance(inputs, dict)) or model
    with _watching_sizes() as conditions:
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise FormatError(reason_of(error, conditions)) from error


def _arguments(model: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # written in C
        return []


def _saved(program: ExportedProgram) -> bytes:
    buffer = io.BytesIO()  # torch's own writer ends the process on a full disk (torch 2.15, 2026-11)
    examples = program.example_inputs
    program.example_inputs = None  # they would be pickled
    try:
        with _watching_sizes() as conditions:
            torch.export.save(program, buffer)
    except Exception as error:
        raise FormatError(reason_of(error, conditions)) from error
    finally:
        program.example_inputs = examples
    return buffer.getvalue()


def _compare(program: nn.Module, model: nn.Module, inputs: Inputs) -> None:
    try:
        wanted, again = training.predict(model, inputs), training.predict(model, inputs)
        with torch.no_grad():
            found = call(program, inputs)
    except Exception as error:
        raise FormatError(reason_of(error)) from error
    if not _is_close(again, wanted):
        raise FormatError(RANDOM)
    if _shapes(found) != _shapes(wanted):
        raise FormatError(f"{PROGRAM} gives outputs of shape {_shapes(found)}, the model of {_shapes(wanted)}")
    if not _is_close(found, wanted):
        pairs = zip(tensors(found), tensors(wanted), strict=True)
        difference = max(float((its.double() - other.double()).abs().max()) for its, other in pairs)
        raise FormatError(
            f"{PROGRAM} needs to give the model's outputs, got a difference of {difference:.3g}:"
            " its forward() does something that torch.export cannot carry"
        )


def _shapes(outputs: Tensors) -> Any:
    """Return the shape of one output, or those of several in order or by name."""
    if isinstance(outputs, Tensor):
        return list(outputs.shape)
    return (
        {name: _shapes(its) for name, its in outputs.items()} if isinstance(outputs, dict) else [*map(_shapes, outputs)]
    )


def _is_close(found: Tensors, wanted: Tensors) -> bool:
    try:
        torch.testing.assert_close(found, wanted, equal_nan=True)
    except AssertionError:
        return False
    return True


@contextlib.contextmanager
def _watching_sizes() -> Iterator[list[str]]:
    """Let the block trace a model in silence; yield where in the user's files sizes of the batch were decided on."""
    places: list[str] = []

    def watch(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "[guard added]" in text and "[guard suppressed]" not in text:
            place = own_place(traceback.extract_stack())
            if place is not None:
                places.append(place)
        return False

    logger = logging.getLogger(_SHAPES)
    level = logger.level
    logger.addFilter(watch)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # it prints what it traced so far
            warnings.simplefilter("ignore")
            yield places
    finally:
        logger.setLevel(level)
        logger.removeFilter(watch)


def reason_of(error: Exception, conditions: Sequence[str] = ()) -> str:
    """Return torch's first reason in one line, with the line of the user's that it is about."""
    if isinstance(error, TunerError):
        return str(error)
    text = str(error).strip()
    reason, _, rest = text.partition("\n  - ")  # the others follow from the first
    first = rest.partition("\n  - ")[0].partition("\nSuggested fixes")[0]
    reason = " ".join(_ADVICE.split(reason)[0].split())
    told = " ".join(f"{reason} {' '.join(first.split())}".split())
    if len(told) > MAX_REASON_CHARS:
        told = told[: MAX_REASON_CHARS - 3] + "..."
    place = place_of(error) or (conditions[0] if conditions else None)
    return f"{type(error).__name__}: {told}{'' if place is None else f' ({place})'}"
