"""A manifest of a model that was never trained: its inputs and outputs alone are of interest."""

from __future__ import annotations

from typing import Any

from tuner.model.manifest import Manifest, TensorDescription

__all__ = ["a_manifest", "an_input", "an_output"]


def an_input(*shape: int, name: str | None = None, dtype: str = "float32", **known: Any) -> TensorDescription:
    """An input whose rows have this shape."""
    return TensorDescription(name=name, shape=shape, dtype=dtype, **known)


def an_output(*shape: int, name: str | None = None, **known: Any) -> TensorDescription:
    """An output whose rows have this shape."""
    return an_input(*shape, name=name, **known)


def a_manifest(*inputs: TensorDescription, outputs: Any = (), class_names: Any = ()) -> Manifest:
    """A manifest with these inputs and outputs."""
    return Manifest.model_validate(
        {
            "study": "s",
            "study_id": 1,
            "trial": 0,
            "objective": "digits",
            "code_hash": "0",
            "options": {},
            "params": {},
            "metric": "accuracy",
            "direction": "maximize",
            "validation": None,
            "test": {},
            "epochs": 1,
            "seed": 0,
            "trained_on": "cpu",
            "data": {},
            "inputs": inputs or [an_input(3)],
            "outputs": outputs,
            "class_names": class_names,
            "versions": {},
            "created_at": "now",
            "files": {},
        }
    )
