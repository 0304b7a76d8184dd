"""Reading an exported model back: checked against its manifest, and without unpickling."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from tuner.data import Tensors
from tuner.errors import TunerError
from tuner.formats import aoti, onnx_program, torchscript
from tuner.formats.calling import Names
from tuner.formats.names import DATA, FILES
from tuner.formats.program import PROGRAM, load_program
from tuner.formats.weights import WEIGHTS
from tuner.model.directory import current
from tuner.model.inputs import far_out, model_inputs
from tuner.model.manifest import Manifest, read_manifest, sha256_of
from tuner.model.predicting import outputs_of, predictions, probabilities, top_k


class LoadedModel(nn.Module):
    """An exported model in eval mode. It is called as the objective's model is, on batches of any size."""

    def __init__(self, program: nn.Module, manifest: Manifest) -> None:
        super().__init__()
        self.program = program
        self.manifest = manifest
        self.training = False

    def forward(self, *inputs: torch.Tensor, **named: torch.Tensor) -> Any:
        """Return the model's outputs for a batch, one row of outputs a row."""
        return self.program(*inputs, **named)

    def predict(self, x: Any) -> Any:
        """Return the name of each row's class, or its numbers, of arrays, tensors or lists that are the inputs.

        A row that may have several classes gets a tuple of names; several targets are a dict by name. Raises TunerError
        for inputs that are not those of the manifest, and warns of values far from all that it was trained on.
        """
        return predictions(self._outputs(x), self.manifest)

    def predict_proba(self, x: Any) -> Any:
        """Return the probabilities (n, classes) in the order of the manifest's `class_names`, as `predict` takes x."""
        return probabilities(self._outputs(x), self.manifest)

    def top_k(self, x: Any, k: int) -> Any:
        """Return for each row its `k` most probable classes, each as (name, probability), as `predict` takes x."""
        return top_k(self._outputs(x), self.manifest, k)

    def _outputs(self, x: Any) -> Tensors:
        inputs = model_inputs(x, self.manifest)
        if (told := far_out(inputs, self.manifest)) is not None:
            warnings.warn(told, stacklevel=3)
        return outputs_of(self, inputs)

    def train(self, mode: bool = True) -> LoadedModel:
        """Stay in eval mode. Raises TunerError for `train(True)`: an exported program has no training mode."""
        if mode:
            raise TunerError("an exported model is for inference only; to train, build it with its objective")
        return self


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    format: str | None = None,  # noqa: A002 - as `tuner export --formats` calls it
) -> LoadedModel:
    """Return the exported model in directory `path`, in eval mode, without unpickling anything.

    Each file is checked against the manifest's sha256 first. `format` is `pt2`, or `onnx` where there is no program,
    unless it says otherwise; `torchscript` and `aoti` are code of whoever made the file, and are loaded only when they
    are named. ONNX and AOTInductor compute on the processor, whatever the `device`. Raises TunerError if the directory
    holds no export, one that is damaged or incomplete, or one without the format.
    """
    directory, manifest = checked(Path(path))
    name = _format(directory, manifest, format)
    names = Names(
        inputs=tuple(its.name for its in manifest.inputs), outputs=tuple(its.name for its in manifest.outputs)
    )
    model = LOADERS[name](directory / FILES[name], names)
    return LoadedModel(model, manifest).to(device).requires_grad_(False)


def checked(path: Path) -> tuple[Path, Manifest]:
    """Return where an export lies and its manifest. Raises TunerError if a file of it is not the manifest's."""
    directory = current(path)
    manifest = read_manifest(directory)
    for name, expected in manifest.files.items():
        found = sha256_of(directory / name)
        if found != expected:
            raise TunerError(
                f"{directory / name} needs the sha256 {expected[:12]} of its manifest, got {found[:12]}:"
                " the export is damaged or incomplete; run 'tuner export' again"
            )
    return directory, manifest


LOADERS: Final[Mapping[str, Callable[[Path, Names], nn.Module]]] = {
    "pt2": lambda path, _: load_program(path),
    "onnx": onnx_program.load,
    "torchscript": torchscript.load,
    "aoti": aoti.load,
}


def _format(directory: Path, manifest: Manifest, wanted: str | None) -> str:
    """Return the format to load. Raises TunerError if the export does not have it."""
    there = [name for name in LOADERS if FILES[name] in manifest.files]
    if wanted is None:
        for name in DATA:
            if name in there:
                return name
        code = f"; to run the code of who made it: format={there[0]!r}" if there else ""
        builds = f"for a model that {manifest.objective} builds from the manifest's params"
        builds += "" if manifest.kept is not None else ", as tuner.rebuild does"
        raise TunerError(
            f"{directory} has no {PROGRAM} that could be called ({manifest.missing.get(PROGRAM, 'it was left out')});"
            f" its weights are in {WEIGHTS}, {builds}{code}"
        )
    if wanted == "safetensors":
        builds = "" if manifest.kept is not None else f": tuner.rebuild({str(directory)!r}) builds the model"
        raise TunerError(f"{WEIGHTS} holds weights and no program{builds}")
    if wanted not in LOADERS:
        raise TunerError(f"the format needs to be one of {', '.join(LOADERS)}, got {wanted!r}")
    if wanted not in there:
        why = manifest.missing.get(FILES[wanted], "it was not asked for")
        raise TunerError(f"{directory} has no {FILES[wanted]} ({why}); it has: {', '.join(there) or 'no program'}")
    return wanted
