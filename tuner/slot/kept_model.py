"""A model that a plain function gave to keep: checked, with its weights of then, and as bytes that hold all of it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property
from typing import Any, Final

import torch
from safetensors.torch import load
from torch import Tensor, nn

from tuner import training
from tuner.data import Inputs, Split, Tensors, map_inputs, tensors
from tuner.errors import FormatError, TunerError, first_line
from tuner.formats.program import PROGRAM, load_program, program_file
from tuner.formats.weights import WEIGHTS, weights_file
from tuner.places import place_of
from tuner.slot.plain_model import plain
from tuner.training.checkpoint import generator_states, set_generator_states
from tuner.training.compiled import state_of
from tuner.training.evaluation import device_of
from tuner.training.record import count_weights

ROWS: Final = 32
"""How many of the example rows are kept, at most."""
TOLERANCE: Final = {"cpu": 1e-4}
OTHER_TOLERANCE: Final = 2e-2
"""By how much of its largest value an output may differ when the model is called again, on the CPU: for one of another
device by what its products of matrices in TF32 leave."""
_PREFIXES: Final = ("", "model.", "model.model.")
_PARALLEL: Final = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptModel:
    """A module, a copy of its weights and buffers on the CPU, by module and name, some rows, and what it gave for them.

    The module may be trained further, for all that is kept.
    """

    model: nn.Module
    form: nn.Module
    """The model as it is exported: itself, unless it takes or gives something else than tensors in order or by name."""
    held: Mapping[tuple[str, str, str], Tensor]
    inputs: Inputs
    outputs: Tensors
    class_names: tuple[str, ...]
    device: torch.device

    @cached_property
    def packed(self) -> bytes:
        """All of it as bytes, with the model's program where it has one; `unpacked` reads them."""
        missing: dict[str, str] = {}
        with _without_a_trace(self.device), _as_it_was(self.model, self.held):
            data, left_out = weights_file(self.model)
            missing |= {f"{WEIGHTS}: {name}": reason for name, reason in left_out.items()}
            program = self._program(missing)
        weights = load(data)
        state = {
            "format": 1,
            "names": [name for name in state_of(self.model) if name in weights],
            "weights": {name: its for name, its in weights.items() if not _is_in(program, name, its)},
            "program": None if program is None else torch.frombuffer(bytearray(program[0]), dtype=torch.uint8),
            "inputs": self.inputs,
            "outputs": self.outputs,
            "class_names": list(self.class_names),
            "device": str(self.device),
            "missing": missing,
            **count_weights(self.model),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    def _program(self, missing: dict[str, str]) -> tuple[bytes, dict[str, Tensor]] | None:
        """Return the model's program and its weights; None where there is none, and say why in `missing`."""
        try:
            model = self.form.eval()
            again = training.predict(model, self.inputs)
            tolerance = TOLERANCE.get(self.device.type, OTHER_TOLERANCE)
            if not _is_close(again, self.outputs, tolerance):
                raise FormatError(
                    "the model gives other outputs than when it was kept, with the same weights: its forward() uses"
                    " something that is neither weight nor buffer and has changed since"
                )
            data = program_file(model, _rows(self.inputs))
            return data, load_program(io.BytesIO(data), PROGRAM).state_dict()
        except FormatError as error:
            missing[PROGRAM] = str(error)
        except Exception as error:  # noqa: BLE001 - of the user's forward, now on the CPU
            missing[PROGRAM] = f"the model cannot be called on the CPU: {type(error).__name__}: {first_line(error)}"
        return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Unpacked:
    """A kept model as it is read back: weights by name, its program where there is one, rows and outputs."""

    weights: dict[str, Tensor]
    program: bytes | None
    inputs: Inputs
    outputs: Tensors
    class_names: tuple[str, ...]
    device: str
    parameters: int
    trained_parameters: int
    missing: dict[str, str] = field(default_factory=dict)


def take(model: Any, example_inputs: Any, class_names: Sequence[str] = ()) -> KeptModel:
    """Return the model as it is now, after a call of it in eval mode. Raises TunerError, or DivergedError for NaN."""
    _check_model(model)
    inputs = _checked_inputs(example_inputs)
    device = device_of(model, _rows(inputs))
    if (found := tensors(inputs)[0].device) != device:
        raise TunerError(
            f"keep_model needs example_inputs where the model is, on {device}, got them on {found}:"
            f" give example_inputs.to({str(device)!r})"
        )
    inputs = map_inputs(lambda tensor: tensor.detach()[:ROWS].clone(), inputs)
    with _without_a_trace(device), _evaluating(model):
        try:
            form = plain(model.eval(), inputs)
            outputs: Any = training.predict(form, inputs, _checked_outputs)
        except _OutputsError:
            raise
        except Exception as error:
            place = place_of(error)
            raise TunerError(
                f"keep_model cannot call the model on example_inputs: {type(error).__name__}: {first_line(error)}"
                f"{'' if place is None else f' ({place})'}; give what its forward takes: a tensor, or a tuple or dict"
            ) from error
    _check_rows(outputs, len(tensors(inputs)[0]))
    copies: dict[int, Tensor] = {}
    held = {}
    for key, tensor in _all_tensors(model):
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
        held[key] = copies[id(tensor)]
    return KeptModel(
        model=model,
        form=form,
        held=held,
        inputs=map_inputs(lambda tensor: tensor.cpu(), inputs),
        outputs=map_inputs(lambda tensor: tensor.detach().cpu(), outputs),
        class_names=_checked_names(class_names),
        device=device,
    )


def packed(kept: KeptModel | bytes) -> bytes:
    """Return a kept model as bytes; one of an earlier attempt is that already."""
    return kept if isinstance(kept, bytes) else kept.packed


def unpacked(data: bytes) -> Unpacked:
    """Read a kept model; nothing is unpickled that could be code. Raises TunerError if it is none."""
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        program = None if state["program"] is None else state["program"].numpy().tobytes()
        weights: dict[str, Tensor] = dict(state["weights"])
        if program is not None:
            inside = load_program(io.BytesIO(program), PROGRAM).state_dict()
            weights |= {name: _inside(inside, name) for name in state["names"] if name not in weights}
        return Unpacked(
            weights={name: weights[name].detach() for name in state["names"]},
            program=program,
            inputs=state["inputs"],
            outputs=state["outputs"],
            class_names=tuple(state["class_names"]),
            device=state["device"],
            parameters=state["parameters"],
            trained_parameters=state["trained_parameters"],
            missing=state["missing"],
        )
    except Exception as error:
        raise TunerError(f"the kept model cannot be read: {type(error).__name__}: {first_line(error)}") from error


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TunerError(f"keep_model needs a torch.nn.Module, got {type(model).__name__}")
    kind = type(model).__name__
    if kind in _PARALLEL:
        inner = "its module" if kind.startswith("Fully") else "model.module"
        raise TunerError(f"keep_model needs the model itself, got it in a {kind}: give {inner}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise TunerError(f"keep_model needs a model with weights, and {name!r} has no values yet: train it first")
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise training.DivergedError(f"keep_model got a model whose weight {name!r} has NaN or infinity in it")


class _OutputsError(TunerError):
    """A model's outputs cannot be kept."""


def _checked_inputs(given: Any) -> Inputs:
    if isinstance(given, list):
        given = tuple(given)
    if isinstance(given, Mapping):
        given = {name: part for name, part in given.items() if part is not None}  # as if it were not given
    parts = list(given.values()) if isinstance(given, dict) else list(given) if isinstance(given, tuple) else [given]
    for part in parts:
        if not isinstance(part, Tensor):
            raise TunerError(
                "keep_model needs example_inputs that are a tensor, or a tuple or dict of them,"
                f" got {type(part).__name__}: {_hint(part)}"
            )
    if not parts or any(part.dim() == 0 or len(part) == 0 for part in parts) or len({len(part) for part in parts}) > 1:
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise TunerError(
            f"keep_model needs example_inputs of one batch, at least a row, as many in each, got {shapes or 'none'}"
        )
    if len(found := {part.device for part in parts}) > 1:
        raise TunerError(f"keep_model needs example_inputs on one device, got {', '.join(sorted(map(str, found)))}")
    if isinstance(given, dict) and (odd := [name for name in given if not isinstance(name, str)]):
        raise TunerError(f"keep_model needs example_inputs by the names of forward's arguments, got {odd[0]!r}")
    inputs: Inputs = given
    return inputs


def _hint(part: Any) -> str:
    """Return what to give in the place of what is no tensor."""
    if part is None:
        return "give those that the model needs by their names, in a dict"
    if is_dataclass(part):
        return "vars() makes a dict of it"
    return "torch.from_numpy makes one of an array, torch.tensor of a list"


def _checked_outputs(outputs: Any) -> Any:
    """Return the model's outputs for some rows. Raises _OutputsError unless they are tensors with rows."""
    named = outputs if type(outputs) is dict else dict(enumerate(outputs if type(outputs) is tuple else (outputs,)))
    for name, part in named.items():
        if not isinstance(part, Tensor):
            raise _OutputsError(
                "keep_model needs a model that gives tensors, by name or in order,"
                f" got {type(part).__name__}: wrap it in a module whose forward returns its logits"
            )
        if part.dim() == 0:
            which = f"{name!r}" if type(outputs) is dict else "one"
            raise _OutputsError(
                f"keep_model needs a model that gives an output for each row, got {which} that is a single number;"
                " where it is a loss, leave the labels out of example_inputs"
            )
    if not named:
        raise _OutputsError("keep_model needs a model that gives a tensor, got none")
    return outputs


def _check_rows(outputs: Tensors, n_rows: int) -> None:
    for part in tensors(outputs):
        if len(part) != n_rows:
            raise TunerError(
                f"keep_model needs a model that gives an output for each of {n_rows} rows, got shape {list(part.shape)}"
            )


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TunerError(f"class_names need to be a list of names, got {names!r}")
    return tuple(map(str, names))


def _rows(inputs: Inputs) -> Split:
    first = tensors(inputs)[0]
    return Split(inputs, torch.zeros(len(first), device=first.device))


def _all_tensors(model: nn.Module) -> Iterator[tuple[tuple[str, str, str], Tensor]]:
    """Yield each weight and buffer, also those that are in no state_dict, by module, kind and name."""
    for path, module in model.named_modules():
        for kind in ("_parameters", "_buffers"):
            for name, tensor in getattr(module, kind).items():
                if tensor is not None:
                    yield (path, kind, name), tensor


@contextmanager
def _as_it_was(model: nn.Module, held: Mapping[tuple[str, str, str], Tensor]) -> Iterator[None]:
    """Have the model its kept weights, on the CPU, and its parts uncompiled; afterwards it is as it was before."""
    modules = dict(model.named_modules())
    before = [(getattr(modules[path], kind), name, tensor) for (path, kind, name), tensor in _all_tensors(model)]
    made: dict[int, Tensor] = {}
    children = [
        (module, name, child)
        for module in modules.values()
        for name, child in module._modules.items()
        if child is not None and type(child).__name__ == "OptimizedModule"
    ]
    try:
        with _evaluating(model):
            for (path, kind, name), tensor in held.items():
                place = getattr(modules[path], kind)
                if id(tensor) not in made:  # weights may be tied
                    is_weight = isinstance(place.get(name), nn.Parameter)
                    made[id(tensor)] = nn.Parameter(tensor, place[name].requires_grad) if is_weight else tensor
                place[name] = made[id(tensor)]
            for module, name, child in children:
                module._modules[name] = child.get_submodule("_orig_mod")
            yield
    finally:
        for module, name, child in children:
            module._modules[name] = child
        for place, name, tensor in before:
            place[name] = tensor


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _without_a_trace(device: torch.device) -> Iterator[None]:
    """Leave the random generators as they are, and compile nothing."""
    states = generator_states(device)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        set_generator_states(states, device)


def _is_in(program: tuple[bytes, dict[str, Tensor]] | None, name: str, weight: Tensor) -> bool:
    if program is None:
        return False
    found = _inside(program[1], name)
    return found is not None and found.dtype == weight.dtype and torch.equal(found, weight)


def _inside(state: Mapping[str, Tensor], name: str) -> Any:
    """Return a weight of a program, whose model is wrapped, maybe twice."""
    return next((state[found] for found in (f"{prefix}{name}" for prefix in _PREFIXES) if found in state), None)


def _is_close(one: Tensors, other: Tensors, tolerance: float) -> bool:
    for its, others in zip(tensors(one), tensors(other), strict=True):
        if its.is_floating_point():
            allowed = tolerance * max(float(others.abs().nan_to_num().max()), 1e-6)
            if not torch.allclose(its.double(), others.double(), rtol=0, atol=allowed, equal_nan=True):
                return False
        elif not torch.equal(its, others):
            return False
    return True
