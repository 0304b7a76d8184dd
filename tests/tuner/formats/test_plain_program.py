"""What torch is given of an exported program: all that a model of ours needs, and nothing that could be run."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tuner.data import Split
from tuner.errors import FormatError
from tuner.formats.plain_program import plain_archive
from tuner.formats.program import load_program, program_file

MODEL = "archive/models/model.json"


class Varied(nn.Module):
    """Sizes of several kinds, an operator with text, a part without gradients, several outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.LSTM(8, 4, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.scale = torch.ones(3)
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, image: Tensor, *, extra: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            image = nn.functional.gelu(image, approximate="tanh")
        seen, _ = self.rows(image)
        mixed = nn.functional.scaled_dot_product_attention(seen, seen, seen)
        flat = torch.einsum("brc,bk->bc", mixed, extra).reshape(image.shape[0], -1)
        n = image.shape[0] * 2 + 1
        return {"first out": self.head(flat) * self.scale + self.shift, "n": flat * n}


@pytest.fixture(scope="module")
def rows() -> Split:
    torch.manual_seed(0)
    return Split(inputs={"image": torch.randn(6, 5, 8), "extra": torch.randn(6, 2)}, targets=torch.zeros(6))


@pytest.fixture(scope="module")
def program(rows: Split) -> bytes:
    model = Varied().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the weights that an LSTM keeps twice
        return exported(model, rows.inputs)


def exported(model: nn.Module, inputs: Any) -> bytes:
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, batch), strict=False)
    program.example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def contents(program: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(program)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archived(content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, its in content.items():
            archive.writestr(name, its)
    buffer.seek(0)
    return buffer


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container with each of its keys, depth first."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def changed(program: bytes, change: Callable[[Any], None]) -> io.BytesIO:
    content = contents(program)
    document = json.loads(content[MODEL])
    change(document)
    return archived(content | {MODEL: json.dumps(document).encode()})


def put(key: str, value: Any) -> Callable[[Any], None]:
    """Return what puts the value at the first place of that key."""

    def change(document: Any) -> None:
        container, _ = next((container, its) for container, its in places(document) if its == key)
        container[key] = value

    return change


def test_a_program_of_many_kinds_of_parts_computes_what_it_did(program: bytes) -> None:
    torch.manual_seed(1)
    inputs = {"image": torch.randn(3, 5, 8), "extra": torch.randn(3, 2)}
    wanted = torch.export.load(io.BytesIO(program)).module()(**inputs)
    found = load_program(io.BytesIO(program))(**inputs)
    assert list(found) == ["first out", "n"]
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor)


def test_what_is_not_needed_is_not_handed_on(program: bytes) -> None:
    code = ["__import__('os')._exit(3)"]
    passed = contents(plain_archive(changed(program, put("guards_code", code)), "a").getvalue())
    document = json.loads(passed[MODEL])
    assert document["guards_code"] == []
    assert b"stack_trace" not in passed[MODEL]
    assert b"nn_module_stack" not in passed[MODEL]


RUNS = "__import__('os')._exit(3)"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("expr_str", RUNS, "the size"),
        ("expr_str", "Symbol('s0', positive=[RUNS for RUNS in ()])", "the size"),
        ("expr_str", "s0.__class__", "the size"),
        ("expr_str", f"Integer({'9' * 30})", "the size"),
        ("expr_str", "lambda: 3", "the size"),
        ("target", "torch.serialization.os.system", "the operator"),
        ("target", "torch.hub.load", "the operator"),
        ("target", "torch.ops.load_library", "the operator"),
        ("target", "torch.ops.aten.from_file.default", "the operator"),
        ("target", "torch.ops.aten.save.default", "the operator"),
        ("target", "torch.ops.aten.__class__.__init__", "the operator"),
        ("target", "_operator.methodcaller", "the operator"),
        ("target", "#torch.export.something", "the operator"),
        ("name", f"x:{RUNS}", "the name"),
        ("name", "torch.load", "the name"),
        ("as_name", "x=1;y", "the name"),
        ("parameter_name", "__class__", "the name of a parameter"),
        ("in_spec", '[1, {"type": "os.system", "context": "null", "children_spec": []}]', "the container 'os.system'"),
        ("out_spec", "[" * 100_000, "JSON that cannot be read"),
        ("custom_obj_values", {"a": 1}, "objects of a library"),
    ],
)
def test_a_part_that_could_be_run_is_refused_by_name(program: bytes, key: str, value: Any, told: str) -> None:
    with pytest.raises(FormatError, match="needs to hold plain tensors and a program, got ") as caught:
        load_program(changed(program, put(key, value)), "m.pt2")
    assert told in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_archive_with_a_second_directory_is_read_once(program: bytes) -> None:
    """Python's reader finds the last directory of the file, torch's may find another."""
    evil = contents(program) | {"archive/data/sample_inputs/model.pt": pickle.dumps("evil")}
    both = archived(evil).getvalue() + archived(contents(program)).getvalue()
    passed = contents(plain_archive(io.BytesIO(both), "m.pt2").getvalue())
    assert passed["archive/data/sample_inputs/model.pt"] == b""
    comment = archived(contents(program)).getvalue()
    end = comment.rindex(b"PK\x05\x06")
    hidden = comment[:end] + comment[end : end + 20] + struct.pack("<H", len(both)) + both
    with pytest.raises(FormatError):
        load_program(io.BytesIO(hidden[: len(hidden) - 7]), "m.pt2")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: {"../evil": b"", **c}, "the entry '../evil'"),
        (lambda c: {"other/archive_format": b"", **c}, "the entry 'archive/"),
        (lambda c: {MODEL.replace("model.json", "more.json"): b"{}", **c}, "the entry 'archive/models/more.json'"),
    ],
)
def test_an_archive_with_other_entries_is_refused(program: bytes, change: Any, told: str) -> None:
    with pytest.raises(FormatError) as caught:
        load_program(archived(change(contents(program))), "m.pt2")
    assert told in str(caught.value)


def test_an_archive_that_is_compressed_cut_or_none_is_refused_in_one_line(program: bytes) -> None:
    for file in (archived(contents(program), zipfile.ZIP_DEFLATED), io.BytesIO(program[:-30]), io.BytesIO(b"PK")):
        with pytest.raises(FormatError, match=r"^m\.pt2 needs to "):
            load_program(file, "m.pt2")


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_a_program_reaches_the_file_system(program: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever text stands wherever in the graph: it is refused, or torch takes it for what it is."""
    trace = tmp_path / "ran"
    payloads = [
        f"__import__('pathlib').Path({str(trace)!r}).touch()",
        f"x = open({str(trace)!r}, 'w')",
        f"');open({str(trace)!r},'w');('",
        f'");open({str(trace)!r},"w");("',
        "torch.serialization.os.mkdir",
        "torch.ops.aten.from_file.default",
    ]

    def change(document: Any) -> None:
        by_key: dict[Any, list[Any]] = {}
        for container, key in places(document):
            if not isinstance(container[key], dict):
                by_key.setdefault(key if isinstance(key, str) else "an item", []).append((container, key))
        for _ in range(data.draw(st.integers(1, 3))):
            kind = data.draw(st.sampled_from(["expr_str", "target", "guards_code"]) | st.sampled_from(sorted(by_key)))
            container, key = data.draw(st.sampled_from(by_key[kind]))
            payload = data.draw(st.sampled_from(payloads))
            container[key] = [payload] if isinstance(container[key], list) else payload

    crafted = changed(program, change)
    unusable = (FormatError, RuntimeError, AssertionError, TypeError, KeyError)
    with contextlib.suppress(*unusable):
        load_program(crafted, "m.pt2")(image=torch.zeros(2, 5, 8), extra=torch.zeros(2, 2))
    assert not trace.exists()


def test_the_programs_of_our_own_exports_are_plain(rows: Split) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(40, 3))
    plain = Split(inputs=rows.inputs["image"], targets=torch.zeros(6))  # type: ignore[index]
    assert load_program(io.BytesIO(program_file(model.eval(), plain)))(torch.zeros(4, 5, 8)).shape == (4, 3)
