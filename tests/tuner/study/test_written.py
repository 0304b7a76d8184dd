"""What is written of a class or function that was defined in a notebook or a script, and what is not."""

from __future__ import annotations

import linecache
import sys
import textwrap
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from tuner.errors import TunerError
from tuner.study.registry import find_objective, source_of
from tuner.study.written import source_text, written_here

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Run a cell as a notebook does: its text is with linecache and in `In`."""
    main = ModuleType("__main__")
    main.__dict__["In"] = []
    monkeypatch.setitem(sys.modules, "__main__", main)

    def run(text: str, *, has_source: bool = True) -> dict[str, Any]:
        text = textwrap.dedent(text)
        name = f"<cell {len(main.__dict__['In'])} {id(main)}>"
        if has_source:
            main.__dict__["In"].append(text)
            lines = text.splitlines(keepends=True)
            monkeypatch.setitem(linecache.cache, name, (len(text), None, lines, name))  # `id`s come again
        exec(compile(text, name, "exec"), vars(main))  # noqa: S102 - a cell of this file's
        return vars(main)

    return run


def test_a_definition_comes_with_all_that_it_names(cell: Any, tmp_path: Path) -> None:
    cell("""
        import math
        import os.path as paths
        from math import pi as round_number
        from pathlib import Path
        SIZES = {"a": [1, 2.5], "b": None}
        HERE = Path("there")
        UNUSED = object()
    """)
    found = cell("""
        def helper(x):
            local = SIZES["a"]
            return math.floor(x) * round_number + len(local)

        def objective(trial):
            UNUSED = 3  # a name of its own
            assert HERE.name == "there" and paths.sep
            return helper(trial.number) + UNUSED
    """)
    source = source_of(found["objective"], tmp_path)
    assert (source.name, source.study_name) == ("objective.py:objective", "objective")
    assert source.text is not None
    assert "UNUSED = object" not in source.text
    assert source.file.read_text() == source.text
    loaded: Any = find_objective(source.reference).load()
    trial = type("Trial", (), {"number": 2})()
    assert loaded(trial) == found["objective"](trial)


def test_the_same_gives_the_same_file_and_another_constant_another(cell: Any, tmp_path: Path) -> None:
    found = cell("K = 1\ndef f(trial):\n    return K\n")
    first, again = (source_of(found["f"], tmp_path) for _ in range(2))
    cell("K = 2")
    other = source_of(found["f"], tmp_path)
    assert first.file == again.file != other.file
    assert first.code_hash() == again.code_hash() != other.code_hash()
    assert written_here(tmp_path, first.name, first.code_hash()) == first.reference


def test_what_was_written_is_found_by_its_hash_alone(cell: Any, tmp_path: Path) -> None:
    source = source_of(cell("def f(trial):\n    return 1.0\n")["f"], tmp_path)
    digest = source.code_hash()
    assert written_here(tmp_path, "g.py:g", digest) is None
    assert written_here(tmp_path, source.name, f"../objectives/{digest}") is None
    source.file.write_text("raise SystemExit\n")
    assert written_here(tmp_path, source.name, digest) is None


def test_a_class_without_methods_is_found_in_what_was_typed(cell: Any) -> None:
    found = cell("""
        from collections import OrderedDict
        class Mine(OrderedDict):
            epochs = 3
    """)
    assert "from collections import OrderedDict" in source_text(found["Mine"])
    assert "epochs = 3" in source_text(found["Mine"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = object()\ndef f(trial): return x", "objective f uses 'x' (object) of this notebook or script, which"),
        ("x = list(range(10000))\ndef f(trial): return x", "objective f uses 'x' (list) of"),
        ("f = lambda trial: 1.0", "a lambda cannot be an objective"),
        (
            "def make():\n    def g(trial): return 1.0\n    return g\nf = make()",
            "g is defined within make, whose variables",
        ),
        ("class A:\n    def f(self): pass\nf = A.f", "f is defined within the class A"),
    ],
)
def test_what_a_file_cannot_hold_is_named(cell: Any, text: str, message: str) -> None:
    found = cell(text)
    with pytest.raises(TunerError) as caught:
        source_text(found["f"])
    assert message in str(caught.value)


def test_without_a_source_it_is_said_where_to_put_it(cell: Any) -> None:
    found = cell("def f(trial): return 1.0", has_source=False)
    with pytest.raises(TunerError, match="the source of f is not to be had"):
        source_text(found["f"])
