"""A model as ONNX, for other runtimes: written by torch's exporter, and run by onnxruntime on the processor."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tuner.errors import FormatError, first_line
from tuner.formats.calling import Names, OnProcessor, onnx_names
from tuner.formats.names import require_onnx
from tuner.formats.program import Traced, reason_of
from tuner.places import own_place

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET: Final = 18
"""The version of ONNX's operators: the one that torch writes without converting (2.10 to 2.15)."""
_DOMAINS: Final = ("", "ai.onnx")
_MAX_BYTES: Final = (1 << 31) - 1  # of any message of protobuf
_OPERATOR: Final = re.compile(r"op='([\w.:]+)'|target=torch\.ops\.([\w.]+)")
_FRAME: Final = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


def write(traced: Traced) -> bytes:
    """Return the file of the model. Raises FormatError that names the operator which ONNX does not have."""
    names = onnx_names(traced.names)
    try:
        with _unheard():
            made = torch.onnx.export(
                traced.program,
                (),
                dynamo=True,
                input_names=list(map(str, names.inputs)),
                output_names=list(map(str, names.outputs)),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
        assert made is not None
        proto = made.model_proto
    except Exception as error:
        raise FormatError(_why_not(error, traced.program)) from error
    for node in _nodes(proto):
        node.ClearField("metadata_props")  # the lines of this machine's files
        node.ClearField("doc_string")
    if proto.ByteSize() > _MAX_BYTES:
        raise FormatError(f"a file of ONNX holds 2 GB, this model has {proto.ByteSize()} bytes")
    return _checked(proto.SerializeToString(), names, "the model")


def load(path: Path, names: Names) -> nn.Module:
    """Return the model in a file. Raises FormatError if it names other files, or operators that are not ONNX's own."""
    require_onnx(("onnx", "onnxruntime"))
    import onnxruntime

    its = onnx_names(names)
    data = _checked(path.read_bytes(), its, str(path))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise FormatError(f"{path} needs to be a model that onnxruntime runs, got: {first_line(error)}") from error

    def run(values: list[Tensor]) -> list[Tensor]:
        fed = {name: value.numpy() for name, value in zip(its.inputs, values, strict=True)}
        return [torch.from_numpy(found) for found in session.run(list(its.outputs), fed)]

    return OnProcessor(run, names)


def _checked(data: bytes, names: Names, what: str) -> bytes:
    """Return the model written anew, for a runtime to read. Raises FormatError for what a model of ours has not."""
    import onnx
    from google.protobuf.message import DecodeError

    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise FormatError(f"{what} needs to be a model of ONNX, got what cannot be read: {error}") from error
    foreign = [its.domain for its in (*_nodes(proto), *proto.opset_import) if its.domain not in _DOMAINS]
    if foreign or proto.functions or proto.training_info:
        got = f"those of {foreign[0]!r}" if foreign else "functions or a training of its own"
        raise FormatError(f"{what} needs to hold ONNX's own operators alone, got {got}")
    for its in _messages(proto):
        if its.DESCRIPTOR.name == "TensorProto" and (its.external_data or its.data_location):
            raise FormatError(f"{what} needs to hold its weights itself, got some that another file is to have")
    found = Names(
        inputs=tuple(its.name for its in proto.graph.input), outputs=tuple(its.name for its in proto.graph.output)
    )
    if found != names:
        raise FormatError(f"{what} needs the inputs and outputs {_shown(names)}, got {_shown(found)}")
    proto.ClearField("metadata_props")
    proto.DiscardUnknownFields()
    written: bytes = proto.SerializeToString()
    return written


def _shown(names: Names) -> str:
    return f"{', '.join(map(str, names.inputs))} and {', '.join(map(str, names.outputs))}"


def _nodes(proto: ModelProto) -> list[Any]:
    return [its for its in _messages(proto) if its.DESCRIPTOR.name == "NodeProto"]


def _messages(message: Any) -> Iterator[Any]:
    """Yield a message of protobuf and all that are in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for its in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(its)


def _why_not(error: Exception, program: ExportedProgram) -> str:
    """Return why there is no model in ONNX: as a rule an operator, and the line of the user's that calls it."""
    if isinstance(error, FormatError):
        return str(error)
    causes = [error]
    while isinstance(cause := causes[-1].__cause__, Exception):
        causes.append(cause)
    found = _OPERATOR.search(" ".join(map(str, reversed(causes))))  # the last one says it best
    if found is None:
        return reason_of(causes[-1])
    operator = (found[1] or found[2]).replace("::", ".")
    return f"ONNX has no form of the operator {operator}{_place(operator, program)}"


def _place(operator: str, program: ExportedProgram) -> str:
    for node in program.graph.nodes:
        if operator in str(node.target) and "stack_trace" in node.meta:
            frames = [
                traceback.FrameSummary(file, int(line), name)
                for file, line, name in _FRAME.findall(node.meta["stack_trace"])
            ]
            place = own_place(frames)
            return "" if place is None else f" ({place})"
    return ""


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keep off the terminal what the exporter tells of its steps."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
