"""The model card: the README.md of an export, with the block of metadata that model hubs read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tuner.formats.calling import Names, onnx_names
from tuner.formats.names import FILES
from tuner.model.manifest import Manifest
from tuner.text import duration, number_text, params_text, printable

SPLITS = ("train", "valid", "test")
_OTHERS = {
    "onnx": ("import numpy, onnxruntime", "session = onnxruntime.InferenceSession({})"),
    "torchscript": ("import torch", "model = torch.jit.load({})"),
    "aoti": ("import torch, torch._inductor", "model = torch._inductor.aoti_load_package({})"),
}
_ZEROS = "torch.zeros({shape}, dtype=torch.{dtype})"


def card(manifest: Manifest) -> str:
    """Return the README.md of an export."""
    return "\n".join(["---", *_metadata(manifest), "---", "", *_text(manifest)]) + "\n"


def loading_lines(manifest: Manifest) -> dict[str, list[str]]:
    """Return by file of the export the lines of Python that load it, run from its directory, and call it if it can be.

    Those of `model.pt2` by torch alone are there as well, under "model.pt2, without tuner".
    """
    lines = {}
    if "model.pt2" in manifest.files:
        call = _call(manifest)
        lines["model.pt2"] = ["import torch, tuner", 'model = tuner.load_model(".")', f"outputs = model({call})"]
        lines["model.pt2, without tuner"] = [
            "import torch",
            'model = torch.export.load("model.pt2").module()',
            f"outputs = model({call})",
        ]
    if "model.safetensors" in manifest.files:
        lines["model.safetensors"] = [
            "from safetensors.torch import load_file",
            'weights = load_file("model.safetensors")',
            "print({name: tuple(tensor.shape) for name, tensor in weights.items()})",
        ]
    # Another objective is a file, wherever its owner has it.
    if is_program(manifest) and manifest.kept is None and ":" not in manifest.objective:
        lines["model.safetensors, to train it further"] = [
            "import torch, tuner",
            'model = tuner.rebuild(".")',
            f"outputs = model({_call(manifest)})",
        ]
    for name, (imports, loading) in _OTHERS.items():
        if (file := FILES[name]) in manifest.files:
            outputs = f"session.run(None, {_fed(manifest)})" if name == "onnx" else f"model({_call(manifest)})"
            lines[file] = [imports, loading.format(json.dumps(file)), f"outputs = {outputs}"]
    return lines


def is_program(manifest: Manifest) -> bool:
    """Whether any of the export's files can be called."""
    return any(name != "safetensors" and file in manifest.files for name, file in FILES.items())


def _fed(manifest: Manifest) -> str:
    """Return two rows of zeros by the names that the inputs have in ONNX."""
    names = onnx_names(Names(inputs=tuple(its.name for its in manifest.inputs), outputs=())).inputs
    fed = []
    for name, its in zip(names, manifest.inputs, strict=True):
        fed.append(f'{json.dumps(name)}: numpy.zeros({(2, *its.shape)}, dtype="{its.dtype}")')
    return f"{{{', '.join(fed)}}}"


def _call(manifest: Manifest) -> str:
    """Return arguments that the model can be called with: two rows of zeros."""
    arguments = []
    for its in manifest.inputs:
        zeros = _ZEROS.format(shape=", ".join(map(str, (2, *its.shape))), dtype=its.dtype)
        arguments.append(zeros if its.name is None else f"{json.dumps(its.name)}: {zeros}")
    named = any(its.name is not None for its in manifest.inputs)
    return f"**{{{', '.join(arguments)}}}" if named else ", ".join(arguments)


def _metadata(manifest: Manifest) -> Iterator[str]:
    """Yield the block of metadata, as YAML whose texts are JSON's."""
    yield "library_name: pytorch"
    yield "tags: [tuner, pytorch]"
    metrics = [name for name, value in manifest.test.items() if value is not None]
    yield f"metrics: {_json(metrics)}"
    results = [{"type": name, "name": name, "value": manifest.test[name]} for name in metrics]
    task = "tabular-classification" if manifest.class_names else "tabular-regression"
    if len(manifest.inputs) == 1 and len(manifest.inputs[0].shape) == 3:
        task = "image-classification" if manifest.class_names else "other"
    data = {"type": manifest.objective, "name": manifest.objective, "split": "test"}
    found = [{"task": {"type": task}, "dataset": data, "metrics": results}]
    yield f"model-index: {_json([{'name': manifest.study, 'results': found}])}"


def _json(value: Any) -> str:
    return json.dumps(value)  # in ASCII: YAML has other ideas of what may stand in a text


def _text(manifest: Manifest) -> Iterator[str]:
    yield f"# {_line(manifest.study)}"
    yield ""
    yield f"Trial {manifest.trial} of the study {_code(manifest.study)}, which searched {_code(manifest.objective)},"
    if manifest.kept is None:
        yield f"trained again on train + valid for {manifest.epochs} epochs. All of it is in `manifest.json`."
    else:
        yield "a plain function: the model is as the trial gave it to be kept. All of it is in `manifest.json`."
    yield from ("", "## How to load it", "", "Run from this directory.")
    for name, lines in loading_lines(manifest).items():
        yield from ("", f"`{name}`:", "", "```python", *lines, "```")
    for what, why in manifest.missing.items():
        yield from ("", f"There is no {_code(what)}: {_line(why)}")
    if manifest.formats:
        yield from ("", "Compared with the model on real rows, in batches of 1, 2 and 257:", "")
        yield from ("| file | bytes | differs by at most | ms for 1 row | ms for 256 |", "|---|---|---|---|---|")
        for check in manifest.formats.values():
            took = " | ".join(number_text(check.latency_ms[n]) for n in ("1", "256") if n in check.latency_ms)
            yield f"| `{check.file}` | {check.bytes} | {number_text(check.relative_difference)} | {took} |"
    yield from ("", "## What it takes and gives", "", "A batch of any size of:", "")
    for kind, described in (("input", manifest.inputs), ("output", manifest.outputs)):
        for number, its in enumerate(described):
            name = its.name if its.name is not None else str(number)
            yield f"- {kind} {_code(name)}: {its.dtype}, each row of shape {list(its.shape)}"
    if isinstance(manifest.class_names, tuple) and manifest.class_names:
        yield from ("", f"Classes in order: {', '.join(map(_code, manifest.class_names))}")
    yield from ("", "## How good it is", "", *_figures(manifest))
    if manifest.kept is None:
        yield from ("", "## Data", "", *_data(manifest))
    yield from ("", "## How it was made", "", *_origin(manifest))


def _data(manifest: Manifest) -> Iterator[str]:
    rows = [f"{_line(str(manifest.data[name]))} {name}" for name in SPLITS if name in manifest.data]
    yield f"- rows: {', '.join(rows)}"
    yield f"- fingerprint: {_code(str(manifest.data.get('fingerprint')))}"
    yield f"- licence: {_line(manifest.data_license or 'the objective does not name it')}"


def _figures(manifest: Manifest) -> Iterator[str]:
    yield "| figure | value | 95 % of resamples |"
    yield "|---|---|---|"
    yield f"| validation {_line(manifest.metric)}, in the search | {number_text(manifest.validation)} | |"
    if (confirmed := manifest.confirmed) is not None:
        runs = f"mean of {confirmed.runs} runs on fresh seeds"
        yield f"| validation {_line(manifest.metric)}, {runs} | {number_text(confirmed.mean)} | |"
    details = manifest.test_details
    for name, value in manifest.test.items():
        interval = None if details is None else details.intervals.get(name)
        shown = "" if interval is None else f"{number_text(interval[0])} to {number_text(interval[1])}"
        yield f"| test {_line(name)} | {number_text(value)} | {shown} |"
    if manifest.tested_before:
        yield ""
        yield (
            f"The test split was used {len(manifest.tested_before)} times before for this study, with other weights: if"
            " models were chosen by it, its figures are too good."
        )
    for target, its in {} if details is None else details.classes.items():
        yield ""
        of = f" of {_code(target)}" if target else ""
        yield f"Classes{of}; the expected calibration error is {number_text(its.calibration_error)}."
        yield from ("", "| class | rows | recall | precision | F1 |", "|---|---|---|---|---|")
        for name, one in its.by_class.items():
            figures = " | ".join(map(number_text, (one.recall, one.precision, one.f1)))
            yield f"| {_line(name)} | {one.rows} | {figures} |"


def _origin(manifest: Manifest) -> Iterator[str]:
    yield f"- params: {_code(params_text(manifest.params))}"
    yield f"- parameters: {manifest.parameters}, {manifest.trained_parameters} of them trained"
    yield f"- code: sha256 {_code(manifest.code_hash)}, git revision {_code(manifest.git_revision or 'none')}"
    yield f"- seeds: {manifest.study_seed} of the study, {manifest.seed} of the training"
    if manifest.search is not None:
        trials = ", ".join(f"{count} {state}" for state, count in manifest.search.trials.items() if count)
        yield f"- search: {trials}; {duration(sum(manifest.search.device_s.values()))} of devices' time"
    yield f"- trained on: {manifest.trained_on}, {_line(params_text(manifest.hardware))}"
    yield f"- versions: {_line(params_text(manifest.versions))}"
    yield f"- made: {manifest.created_at}"


def _line(text: str) -> str:
    """Return somebody's text as Markdown that is a line of it and nothing else."""
    return "".join(f"\\{char}" if char in r"\`*_[]<>#|&!~" else char for char in printable(text))


def _code(text: str) -> str:
    """Return somebody's text as code in Markdown."""
    return f"`{printable(text).replace('`', chr(39))}`"
