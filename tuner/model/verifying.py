"""Whether an export is what its manifest says, without its data: hashes, weights against program, and calls of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from tuner.data import Inputs, tensors
from tuner.errors import TunerError, first_line
from tuner.formats.program import PROGRAM, load_program
from tuner.formats.weights import WEIGHTS
from tuner.model.directory import current
from tuner.model.manifest import Manifest, read_manifest, sha256_of
from tuner.training.steps import call

BATCH_SIZES = (1, 2, 257)


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something that was looked at, and why it is not as it should be; None where it is."""

    name: str
    problem: str | None


def verify(path: Path) -> list[Check]:
    """Return what was checked of the export in a directory. Raises TunerError if there is none."""
    directory = current(path)
    manifest = read_manifest(directory)
    checks = [
        Check(name=f"sha256 of {name}", problem=_hash(directory / name, its))
        for name, its in sorted(manifest.files.items())
    ]
    if any(check.problem for check in checks) or PROGRAM not in manifest.files:
        return checks
    try:
        program = load_program(directory / PROGRAM)
    except TunerError as error:
        return [*checks, Check(name=f"{PROGRAM} can be loaded", problem=str(error))]
    checks.append(Check(name=f"{PROGRAM} has the weights of {WEIGHTS}", problem=_weights(program, directory / WEIGHTS)))
    checks += [Check(name=f"{PROGRAM} on {n} rows", problem=_call(program, manifest, n)) for n in BATCH_SIZES]
    return checks


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
        names = [its.name for its in manifest.inputs if its.name is not None]
        inputs: Inputs = dict(zip(names, rows, strict=True)) if names else tuple(rows)
        with torch.no_grad():
            outputs = call(program, inputs)
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
