"""Whether an export is what its manifest says, without its data.

Hashes, weights against program, calls of it, and what other formats give against what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from tuner.data import Inputs, Split, tensors
from tuner.errors import FormatError, TunerError, first_line
from tuner.formats.names import DATA, FILES
from tuner.formats.parity import Sample, compared
from tuner.formats.program import PROGRAM
from tuner.formats.weights import WEIGHTS
from tuner.model.directory import current
from tuner.model.loading import load_model
from tuner.model.manifest import Manifest, read_manifest, sha256_of
from tuner.training.steps import call

BATCH_SIZES = (1, 2, 257)


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something that was looked at, and why it is not as it should be; None where it is."""

    name: str
    problem: str | None


def verify(path: Path, formats: Sequence[str] = ()) -> list[Check]:
    """Return what was checked of the export in a directory. Raises TunerError if there is none.

    The program is called, or where there is none ONNX, and ONNX is compared with it wherever it can be run; `formats`
    are those to compare beside it, which may be code of who made the export.
    """
    directory = current(path)
    manifest = read_manifest(directory)
    for name in formats:
        if FILES[name] not in manifest.files:
            raise TunerError(f"{directory} has no {FILES[name]}; it has: {', '.join(sorted(manifest.files))}")
    checks = [
        Check(name=f"sha256 of {name}", problem=_hash(directory / name, its))
        for name, its in sorted(manifest.files.items())
    ]
    data = [name for name in DATA if FILES[name] in manifest.files and (name != "onnx" or _can_run_onnx())]
    if any(check.problem for check in checks) or not data:
        return checks
    base = FILES[data[0]]
    try:
        model = load_model(directory, format=data[0])
    except TunerError as error:
        return [*checks, Check(name=f"{base} can be loaded", problem=str(error))]
    if base == PROGRAM:
        problem = _weights(model.program, directory / WEIGHTS)
        checks.append(Check(name=f"{PROGRAM} has the weights of {WEIGHTS}", problem=problem))
    calls = [Check(name=f"{base} on {n} rows", problem=_call(model, manifest, n)) for n in BATCH_SIZES]
    others = [name for name in FILES if name != data[0] and name in (*formats, *data)]
    if others and not any(check.problem for check in calls):
        sample = Sample(model, Split(_drawn(manifest), torch.zeros(max(BATCH_SIZES))))
        calls += [
            Check(name=f"{FILES[name]} against {base}", problem=_compare(directory, name, sample)) for name in others
        ]
    return [*checks, *calls]


def _can_run_onnx() -> bool:
    return all(find_spec(package) is not None for package in ("onnx", "onnxruntime"))


def _compare(directory: Path, name: str, sample: Sample) -> str | None:
    try:
        compared(FILES[name], load_model(directory, format=name).program, sample)
    except (FormatError, TunerError) as error:
        return str(error)
    return None


def _drawn(manifest: Manifest) -> Inputs:
    """Return rows of the inputs' shapes: numbers around zero, any bytes, and zeros where only some may be meant."""
    generator = torch.Generator().manual_seed(0)

    def draw(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if dtype.is_floating_point:
            return torch.randn(size, generator=generator).to(dtype)
        return torch.randint(256 if dtype == torch.uint8 else 1, size, generator=generator, dtype=dtype)

    return _inputs(manifest, [draw((max(BATCH_SIZES), *its.shape), _dtype(its.dtype)) for its in manifest.inputs])


def _inputs(manifest: Manifest, rows: list[torch.Tensor]) -> Inputs:
    names = [its.name for its in manifest.inputs if its.name is not None]
    if names:
        return dict(zip(names, rows, strict=True))
    return rows[0] if len(rows) == 1 else tuple(rows)


def _hash(path: Path, expected: str) -> str | None:
    try:
        found = sha256_of(path)
    except TunerError as error:
        return str(error)
    return None if found == expected else f"needs {expected[:12]}, got {found[:12]}"


def _weights(program: nn.Module, path: Path) -> str | None:
    try:
        weights = load(path.read_bytes())
    except SafetensorError as error:
        return f"it cannot be read: {error}"
    held = {name.removeprefix("model."): tensor for name, tensor in program.state_dict().items()}
    for name, wanted in weights.items():
        found = held.get(name.removeprefix("model."))
        # What a forward does not use is no part of its program.
        if found is not None and not torch.equal(found.nan_to_num(), wanted.nan_to_num()):
            return f"another tensor {name!r}"
    return None


def _call(program: nn.Module, manifest: Manifest, n_rows: int) -> str | None:
    try:
        rows = [torch.zeros(n_rows, *its.shape, dtype=_dtype(its.dtype)) for its in manifest.inputs]
        with torch.no_grad():
            outputs = call(program, _inputs(manifest, rows))
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {first_line(error)}"
    wanted = [[n_rows, *its.shape] for its in manifest.outputs]
    found = [list(part.shape) for part in tensors(outputs)]
    return None if not wanted or found == wanted else f"needs outputs of {wanted}, got {found}"


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"there is no type {name!r} of tensors")
    return found
