"""The formats of an export by name, and what each needs of the machine; without importing torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Final

from tuner.errors import TunerError, UsageError

FILES: Final = {
    "safetensors": "model.safetensors",
    "pt2": "model.pt2",
    "onnx": "model.onnx",
    "torchscript": "model.torchscript.pt",
    "aoti": "model.aoti.pt2",
}
"""The file of each format."""
DEFAULT: Final = ("safetensors", "pt2")
DATA: Final = ("pt2", "onnx")
"""Formats that are checked before anything of them is used: loading one runs no code that came with it."""
CODE: Final = ("torchscript", "aoti")
"""Formats that are code: loading one runs what its author put into it."""
EXTRA: Final = ("onnx", "onnxscript", "onnxruntime")
"""The packages of the extra `onnx`."""


def chosen(text: str) -> tuple[str, ...]:
    """Return the formats of a list such as `pt2,onnx`, the weights always first. Raises UsageError for another."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in FILES]:
        raise UsageError(f"--formats needs names of {', '.join(FILES)} with commas between them, got {unknown[0]!r}")
    return tuple(name for name in FILES if name in {"safetensors", *names})


def require(names: Sequence[str]) -> None:
    """Raise TunerError if this machine lacks what one of the formats is written by."""
    if "onnx" in names:
        require_onnx(EXTRA)
    if "aoti" in names:
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch looks for it
        if shutil.which(compiler) is None:
            raise TunerError(
                f"the format aoti needs a compiler of C++, got none: there is no {compiler};"
                " install one (apt install g++), name it in CXX, or leave aoti out of --formats"
            )


def require_onnx(packages: Sequence[str]) -> None:
    """Raise TunerError if one of these packages of the extra is not installed."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise TunerError(f"the format onnx needs {', '.join(packages)}, got no {missing[0]}: pip install 'tuner[onnx]'")
