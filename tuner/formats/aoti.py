"""A model as a package of AOTInductor: compiled for processors like this one."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.data import tensors
from tuner.errors import FormatError, first_line
from tuner.formats.calling import Names, OnProcessor, by_name
from tuner.formats.program import Traced, reason_of
from tuner.training.steps import call


def write(traced: Traced) -> bytes:
    """Return the file of the model, compiled, in seconds to minutes. Raises FormatError with torch's reason."""
    import torch._inductor as inductor
    from torch._inductor import config

    program, buffer = traced.program, io.BytesIO()
    try:
        # One thread: no process that compiles is left behind.
        with warnings.catch_warnings(), torch.no_grad(), config.patch(compile_threads=1), _unheard():
            warnings.simplefilter("ignore")
            inductor.aoti_compile_and_package(program, package_path=buffer)
    except Exception as error:
        raise FormatError(reason_of(error)) from error
    return buffer.getvalue()


def load(path: Path, names: Names) -> nn.Module:
    """Return the compiled model in a file. It is code of the machine. Raises FormatError if it cannot be loaded."""
    from torch._inductor import aoti_load_package

    try:
        compiled: Any = aoti_load_package(str(path))
    except RuntimeError as error:
        raise FormatError(
            f"{path} needs to hold a model compiled for this machine, got: {first_line(error)}"
        ) from error

    def run(values: list[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tensors(call(compiled, by_name(values, names.inputs)))

    return OnProcessor(run, names)


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keep what torch tells of its compiling off the terminal, such as that there is no CUDA."""
    loggers = [logging.getLogger(name) for name in ("torch._inductor", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
