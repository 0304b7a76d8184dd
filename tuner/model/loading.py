"""Reading an exported model back: checked against its manifest, and without unpickling."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuner.data import Tensors
from tuner.errors import TunerError
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


def load_model(path: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Return the exported model in directory `path`, in eval mode, without unpickling anything.

    Each file is checked against the manifest's sha256 first. Raises TunerError if the directory holds no
    export, one that is damaged or incomplete, or one without a program, as its model has none.
    """
    directory = current(Path(path))
    manifest = read_manifest(directory)
    for name, expected in manifest.files.items():
        found = sha256_of(directory / name)
        if found != expected:
            raise TunerError(
                f"{directory / name} needs the sha256 {expected[:12]} of its manifest, got {found[:12]}:"
                " the export is damaged or incomplete; run 'tuner export' again"
            )
    if PROGRAM not in manifest.files:
        raise TunerError(
            f"{directory} has no {PROGRAM} that could be called ({manifest.missing.get(PROGRAM, 'it was left out')});"
            f" its weights are in {WEIGHTS}, for a model that {manifest.objective} builds from the manifest's params"
        )
    return LoadedModel(load_program(directory / PROGRAM), manifest).to(device).requires_grad_(False)
