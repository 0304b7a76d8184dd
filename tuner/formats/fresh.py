"""A script: load a model as somebody does who has nothing of this project, call it, and write down what it gives.

It is started by `tuner.formats.parity` as `python -I fresh.py`, imports nothing of tuner, and has nothing that could.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

OURS = ("tuner", "objectives", "storage")
REPEATS, AT_MOST_S = 20, 0.5


def torch_model(kind: str, path: str) -> Any:
    """Return the model in a file of a format that torch reads."""
    import torch

    torch.set_grad_enabled(False)
    if kind == "pt2":
        return torch.export.load(path).module()
    if kind == "torchscript":
        return torch.jit.load(path)
    from torch._inductor import aoti_load_package

    return aoti_load_package(path)


def in_torch(kind: str, path: str, rows: str, names: Sequence[str | None]) -> tuple[Any, Any, Any]:
    """Return a function that calls the model on rows, one that cuts rows out of all, and how tensors are written."""
    from safetensors.torch import load_file, save_file

    model, inputs = torch_model(kind, path), load_file(rows)
    values = [inputs[str(number)] for number in range(len(names))]

    def run(n: int) -> Any:
        cut = [value[:n] for value in values]
        named = {name: value for name, value in zip(names, cut, strict=True) if name is not None}
        return model(**named) if named else model(*cut)

    def write(found: Mapping[str, Any], answer: str) -> None:
        save_file({name: value.clone().contiguous() for name, value in found.items()}, answer)

    return run, flat, write


def in_onnxruntime(path: str, rows: str, names: Sequence[str | None]) -> tuple[Any, Any, Any]:
    """Return the same of a model in ONNX, by numpy and onnxruntime alone."""
    import numpy as np
    import onnxruntime
    from safetensors.numpy import load_file, save_file

    session, inputs = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), load_file(rows)
    fed = {its.name: inputs[str(number)] for number, its in enumerate(session.get_inputs())}
    assert len(fed) == len(names)

    def run(n: int) -> Any:
        return session.run(None, {name: value[:n] for name, value in fed.items()})

    def write(found: Mapping[str, Any], answer: str) -> None:
        save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, answer)

    return run, lambda outputs: ([its.name for its in session.get_outputs()], list(outputs)), write


def flat(outputs: Any) -> tuple[list[str | None], list[Any]]:
    """Return the names of outputs, None for those without, and the outputs."""
    if isinstance(outputs, Mapping):
        return list(outputs), list(outputs.values())
    several = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    return [None] * len(several), several


def latency_ms(run: Callable[[int], Any], n: int) -> float:
    """Return how long a call takes at least, of some after the first: others are what the machine did meanwhile."""
    run(n)
    took: list[float] = []
    while len(took) < REPEATS and sum(took) < AT_MOST_S:
        began = time.perf_counter()
        run(n)
        took.append(time.perf_counter() - began)
    return 1000 * min(took)


def main() -> None:
    """Answer one order, JSON on standard input, by a line of JSON and a file of the outputs."""
    for name in OURS:
        sys.modules[name] = None  # type: ignore[assignment]  # an installed one cannot be imported either
    order = json.load(sys.stdin)
    kind, path, rows, names = order["kind"], order["path"], order["rows"], order["names"]
    try:
        made = in_onnxruntime(path, rows, names) if kind == "onnx" else in_torch(kind, path, rows, names)
        run, flattened, write = made
        found: dict[str, Any] = {}
        outputs: list[str | None] = []
        for n in order["sizes"]:
            outputs, values = flattened(run(n))
            found |= {f"{n}/{number}": value for number, value in enumerate(values)}
        write(found, order["answer"])
        told = {"names": outputs, "latency_ms": {str(n): latency_ms(run, n) for n in order["timed"]}}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        told = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
