"""Where an objective failed, as its author knows it: a line of their own files, and the layer of the model."""

from __future__ import annotations

import inspect
import traceback

from pydantic import ValidationError
from torch import nn

from tuner.errors import first_line
from tuner.objective import Objective
from tuner.spec import first_problem
from tuner.study.places import last_place, original, own_place
from tuner.study.registry import FunctionObjective


def with_line(error: BaseException, objective: Objective | FunctionObjective) -> str:
    """Describe the error with the module that it was raised in, and the deepest line of the user's own files.

    Where it passed none, it is the `def` of the function, or of the `build_model` that made the module.
    """
    text = first_problem(error).partition("\n")[0] if isinstance(error, ValidationError) else first_line(error)
    told = original(error) or f"{type(error).__name__}: {text}"
    layer = _layer(error)
    if layer is not None:
        told += f", in {layer}"
    place = own_place(error, _file_of(objective)) or _definition(objective, has_layer=layer is not None)
    if place is None and not isinstance(objective, Objective):
        return told  # of a callable object, such as a functools.partial, and of what it returned
    file, line = place or last_place(error)
    return f"{told} ({file}, line {line})"


def _file_of(objective: Objective | FunctionObjective) -> str:
    try:
        return inspect.getfile(type(objective) if isinstance(objective, Objective) else objective)
    except TypeError:
        return ""


def _definition(objective: Objective | FunctionObjective, *, has_layer: bool) -> tuple[str, int] | None:
    made = type(objective).build_model if isinstance(objective, Objective) and has_layer else objective
    return (made.__code__.co_filename, made.__code__.co_firstlineno) if inspect.isfunction(made) else None


def _layer(error: BaseException) -> str | None:
    """Return the name, in the outermost module that was called, and the type of the innermost one; None without any."""
    called = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [its for its in called if isinstance(its, nn.Module)]
    if not modules:
        return None
    inner = modules[-1]
    kind = type(inner).__name__
    if type(inner).__module__.startswith("torch.nn."):  # its settings are told by torch, and not by the user's code
        kind += f"({inner.extra_repr()})"
    names = (name for outer in modules for name, its in outer.named_modules() if its is inner)
    name = next(names, "")
    return f"{name}: {kind}" if name else kind
