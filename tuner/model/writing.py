"""Writing a model in each format that was asked for, and comparing it; what one cannot hold costs that one alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

from safetensors.torch import load, save
from torch import Tensor, nn

from tuner.data import Rows, Tensors, tensors
from tuner.errors import FormatError, TunerError
from tuner.formats import aoti, onnx_program, program, torchscript
from tuner.formats.calling import names_of
from tuner.formats.names import FILES
from tuner.formats.parity import Parity, Sample, compared, compared_in_fresh_process
from tuner.formats.program import Traced
from tuner.formats.weights import WEIGHTS, differing, weights_file
from tuner.model.loading import LOADERS
from tuner.model.manifest import FormatCheck, TensorDescription
from tuner.model.rebuilding import REBUILT, built
from tuner.objective import Objective, Params
from tuner.slot.preflight import exported_form

WRITERS: Final[Mapping[str, Callable[[Traced], bytes]]] = {
    "pt2": program.write,
    "onnx": onnx_program.write,
    "torchscript": torchscript.write,
    "aoti": aoti.write,
}


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written: how each format compared, what is missing and why, and what a program gives if there is one."""

    formats: dict[str, FormatCheck] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    outputs: list[TensorDescription] = field(default_factory=list)


def write_formats(
    model: nn.Module,
    objective: Objective,
    params: Params,
    rows: Rows,
    directory: Path,
    formats: Sequence[str],
    *,
    in_fresh_process: bool,
) -> Written:
    """Write the model's weights, and it in each of the other formats that can hold it; compare each on these rows.

    The weights are read back bit by bit, and the objective builds the model again with them. The others are loaded
    `in_fresh_process`, or else in this one. Raises TunerError if the disk does not give the weights back.
    """
    written = Written()
    written.missing.update(_write_weights(model, directory))
    shown = exported_form(model, objective)
    sample = _sample(shown, rows, formats, written)
    if sample is None:
        return written
    if not written.missing:
        try:
            weights = load((directory / WEIGHTS).read_bytes())
            again = exported_form(built(objective, params, weights), objective)
            written.formats["safetensors"] = _check(WEIGHTS, directory, compared(REBUILT, again, sample), sample)
        except FormatError as error:
            written.missing[REBUILT] = (
                f"{error}: build_model draws something that is not in its state_dict, as register_buffer would put it"
                " there"
            )
        except TunerError as error:
            written.missing[REBUILT] = str(error)
    _write_all(formats, Traced(shown, rows), sample, directory, written, in_fresh_process=in_fresh_process)
    return written


class _Program(nn.Module):
    """A program that takes it that it is evaluated, as it always is."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program
        self.training = False

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.program(*args, **named)

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002 - as modules have it
        return self


def write_kept(
    weights: Mapping[str, Tensor],
    data: bytes | None,
    rows: Rows,
    directory: Path,
    formats: Sequence[str],
    *,
    in_fresh_process: bool,
) -> Written:
    """Write weights, and the program in `data` as it is; in the other formats what that gives, compared on these rows.

    Nothing is called without a program, which is then missing by a reason that the caller knows.
    """
    written = Written()
    (directory / WEIGHTS).write_bytes(save(dict(weights)))
    if data is None:
        return written
    model = _Program(program.load_program(io.BytesIO(data), FILES["pt2"]))
    sample = _sample(model, rows, formats, written)
    if sample is not None:
        given = {"pt2": data}
        _write_all(formats, Traced(model, rows), sample, directory, written, given, in_fresh_process=in_fresh_process)
    return written


def _sample(model: nn.Module, rows: Rows, formats: Sequence[str], written: Written) -> Sample | None:
    try:
        return Sample(model, rows)
    except FormatError as error:
        written.missing.update({FILES[name]: str(error) for name in formats if name in WRITERS})
    return None


def _write_all(
    formats: Sequence[str],
    traced: Traced,
    sample: Sample,
    directory: Path,
    written: Written,
    given: Mapping[str, bytes] = MappingProxyType({}),
    *,
    in_fresh_process: bool,
) -> None:
    """Write each of the programs, one that is `given` as it is."""
    for name in formats:
        if name in WRITERS:
            _write(name, traced, sample, directory, written, given.get(name), in_fresh_process=in_fresh_process)
    if written.formats.keys() & WRITERS.keys():
        written.outputs.extend(described(sample.wanted[0]))


def described(values: Tensors) -> list[TensorDescription]:
    """Return what inputs or outputs are."""
    return [
        TensorDescription(name=name, shape=tuple(tensor.shape[1:]), dtype=str(tensor.dtype).removeprefix("torch."))
        for name, tensor in zip(names_of(values), tensors(values), strict=True)
    ]


def _write(
    name: str,
    traced: Traced,
    sample: Sample,
    directory: Path,
    written: Written,
    given: bytes | None,
    *,
    in_fresh_process: bool,
) -> None:
    path = directory / FILES[name]
    try:
        path.write_bytes(WRITERS[name](traced) if given is None else given)
        if in_fresh_process:
            parity = compared_in_fresh_process(name, path, sample)
        else:
            parity = compared(path.name, LOADERS[name](path, sample.names), sample)
    except FormatError as error:
        path.unlink(missing_ok=True)
        written.missing[path.name] = str(error)
    else:
        written.formats[name] = _check(path.name, directory, parity, sample)


def _check(name: str, directory: Path, parity: Parity, sample: Sample) -> FormatCheck:
    return FormatCheck(
        file=name,
        bytes=(directory / name).stat().st_size,
        difference=parity.absolute,
        relative_difference=parity.relative,
        tolerance=sample.tolerance,
        latency_ms=dict(parity.latency_ms),
        fresh_process=parity.fresh_process,
        opset=onnx_program.OPSET if name == FILES["onnx"] else None,
    )


def _write_weights(model: nn.Module, directory: Path) -> dict[str, str]:
    """Write the weights and read them back; return why for what they lack. Raises TunerError for a faulty disk."""
    weights, left_out = weights_file(model)
    (directory / WEIGHTS).write_bytes(weights)
    if (name := differing((directory / WEIGHTS).read_bytes(), model)) is not None:
        raise TunerError(f"{WEIGHTS} does not give back the tensor {name!r}: the disk or its driver is at fault")
    return {f"{WEIGHTS}: {name}": reason for name, reason in left_out.items()}
