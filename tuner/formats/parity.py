"""Whether a model in some format gives what the model gives, on real rows and in batches of any size; and how fast."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tuner import training
from tuner.data import Inputs, Rows, map_inputs, tensors
from tuner.errors import FormatError
from tuner.formats import fresh
from tuner.formats.calling import Names, names_of, onnx_names
from tuner.formats.program import MAX_REASON_CHARS, RANDOM, reason_of
from tuner.training.steps import call

BATCH_SIZES: Final = (1, 2, 257)
TIMED: Final = (1, 256)
TIMEOUT_S: Final = 600
TOLERANCE: Final = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}
"""By how much of an output's largest value any of its values may differ, by the output's type; others by nothing."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How a format compares: differences from the model's outputs, and how long a call takes by its rows.

    `relative` is the difference's share of the largest value of its output.
    """

    absolute: float
    relative: float
    latency_ms: Mapping[str, float]
    fresh_process: bool


class Sample:
    """Real rows, and what the model gives for them in batches of each size.

    Raises FormatError if the model cannot be called, or gives something else each time.
    """

    def __init__(self, model: nn.Module, rows: Rows) -> None:
        self.inputs = rows.rows(torch.arange(max(BATCH_SIZES)) % len(rows)).inputs
        try:
            self.wanted = [training.predict(model, self.cut(n)) for n in BATCH_SIZES]
            again = training.predict(model, self.cut(2))
        except Exception as error:
            raise FormatError(reason_of(error)) from error
        for one, other in zip(tensors(again), tensors(self.wanted[1]), strict=True):
            if _difference(one, other, other)[1] > _tolerance(other):
                raise FormatError(RANDOM)

    @property
    def names(self) -> Names:
        """What the model's inputs and outputs are called."""
        return Names(inputs=names_of(self.inputs), outputs=names_of(self.wanted[0]))

    @property
    def tolerance(self) -> float:
        """The largest relative difference that any of the outputs may have."""
        return max(map(_tolerance, tensors(self.wanted[0])))

    def cut(self, n: int) -> Inputs:
        """Return the first rows."""
        return map_inputs(lambda value: value[:n], self.inputs)

    @cached_property
    def written(self) -> bytes:
        """The rows for another process. Raises FormatError if they are of a type that cannot be handed over."""
        try:
            return save({str(number): its.clone().contiguous() for number, its in enumerate(tensors(self.inputs))})
        except (SafetensorError, KeyError, ValueError) as error:
            raise FormatError(f"the rows cannot be given to another process: {reason_of(error)}") from error


def compared(name: str, loaded: nn.Module, sample: Sample) -> Parity:
    """Compare a model that was loaded in this process. Raises FormatError if it gives something else."""

    def run(n: int) -> Any:
        return call(loaded, sample.cut(n))

    try:
        with torch.no_grad():
            outputs = [run(n) for n in BATCH_SIZES]
            took = {str(n): fresh.latency_ms(run, n) for n in TIMED}
    except Exception as error:
        raise FormatError(f"{name} cannot be called: {reason_of(error)}") from error
    absolute, relative = _differences(name, outputs, names_of(outputs[0]), sample.names.outputs, sample)
    return Parity(absolute=absolute, relative=relative, latency_ms=took, fresh_process=False)


def compared_in_fresh_process(kind: str, path: Path, sample: Sample) -> Parity:
    """Compare the model in a file as a process of Python loads it that has nothing of this project.

    Raises FormatError if it cannot be loaded there, or gives something else.
    """
    with tempfile.TemporaryDirectory(prefix="tuner-") as aside:
        rows, answer = Path(aside, "rows.safetensors"), Path(aside, "answer.safetensors")
        rows.write_bytes(sample.written)
        order = {"kind": kind, "path": str(path.absolute()), "rows": str(rows), "answer": str(answer)}
        order |= {"names": sample.names.inputs, "sizes": BATCH_SIZES, "timed": TIMED}  # type: ignore[dict-item]
        told = _asked(path.name, order)
        found = load(answer.read_bytes())
    count = len(told["names"])
    outputs = [tuple(found[f"{n}/{number}"] for number in range(count)) for n in BATCH_SIZES]
    wanted = (onnx_names(sample.names) if kind == "onnx" else sample.names).outputs
    absolute, relative = _differences(path.name, outputs, tuple(told["names"]), wanted, sample)
    return Parity(absolute=absolute, relative=relative, latency_ms=told["latency_ms"], fresh_process=True)


def _asked(name: str, order: Mapping[str, Any]) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", fresh.__file__],
            input=json.dumps(order),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise FormatError(f"{name} was not loaded and called within {TIMEOUT_S} s in a fresh process") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise FormatError(f"a fresh process that loads and calls {name} ends with code {done.returncode}: {last}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in told:
        raise FormatError(f"{name} cannot be used in a fresh process: {told['error'][:MAX_REASON_CHARS]}")
    return told


def _differences(
    name: str,
    outputs: Sequence[Any],
    found_names: tuple[str | None, ...],
    wanted_names: tuple[str | None, ...],
    sample: Sample,
) -> tuple[float, float]:
    """Return the largest absolute difference and the largest relative one. Raises FormatError above the tolerance."""
    if sorted(map(str, found_names)) != sorted(map(str, wanted_names)):
        shown = [", ".join(str(its) for its in names) for names in (wanted_names, found_names)]
        raise FormatError(f"{name} needs the model's outputs, {shown[0]}, got {shown[1]}")
    worst = (0.0, 0.0)
    for n, found, wanted in zip(BATCH_SIZES, outputs, sample.wanted, strict=True):
        of_found = dict(zip(found_names, tensors(found), strict=True)) if None not in found_names else None
        for number, (output, its) in enumerate(zip(wanted_names, tensors(wanted), strict=True)):
            got = tensors(found)[number] if of_found is None else of_found[output]
            if (got.shape, got.dtype) != (its.shape, its.dtype):
                shown = [f"{list(one.shape)} of {one.dtype}" for one in (its, got)]
                raise FormatError(f"{name} needs outputs as the model's for {n} rows, {shown[0]}, got {shown[1]}")
            absolute, relative = _difference(got, its, tensors(sample.wanted[-1])[number])
            if not relative <= _tolerance(its):
                raise FormatError(
                    f"{name} needs to give the model's outputs for {n} rows, got a difference of {absolute:.3g}, which"
                    f" is {relative:.3g} of the largest and more than {_tolerance(its):.0e}"
                )
            worst = (max(worst[0], absolute), max(worst[1], relative))
    return worst


def _difference(found: Tensor, wanted: Tensor, of_all: Tensor) -> tuple[float, float]:
    """Return the largest absolute difference, and its share of the largest value of all; infinite for a lone NaN."""
    if torch.equal(found, wanted):
        return 0.0, 0.0
    kind = torch.complex128 if wanted.is_complex() else torch.float64
    one, other = found.to(kind), wanted.to(kind)
    same = (one == other) | (one.isnan() & other.isnan())
    gaps = torch.where(same, 0.0, (one - other).abs())
    absolute = float(gaps.nan_to_num(nan=torch.inf).max())
    largest = float(torch.where(of_all.isfinite(), of_all.abs(), 0).max())
    return absolute, absolute / max(largest, 1e-6) if absolute else 0.0


def _tolerance(output: Tensor) -> float:
    return TOLERANCE.get(output.dtype, 0.0)
