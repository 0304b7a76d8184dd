"""Objectives in files, as modules that other processes import too."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from tuner.errors import TunerError
from tuner.study.registry import find_objective

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

CODE = """
import sys

from {module} import VALUE

ARGUMENTS = list(sys.argv)


def objective(trial):
    return [VALUE, __file__, ARGUMENTS]
"""
# A slot in small: what the objective starts is not forked, and imports the objective by its name.
IN_CHILD = """
import multiprocessing, sys
from tuner.study.registry import find_objective

if __name__ == "__main__":
    function = find_objective(sys.argv[1]).load()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(function, (None,)) == function(None), "another there"
    print(function.__module__, function(None)[0], function(None)[1:] == [sys.argv[0], [sys.argv[0]]])
"""


def written(folder: Path, name: str, code: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "module"),
    [
        ({"a/mine.py": "helping"}, "mine"),
        ({"a/tuner.py": "helping"}, "tuner.study.by_path.tuner_"),  # is free in no process of ours
        ({"a/json.py": "helping"}, "tuner.study.by_path.json_"),
        ({"a/two words-2.0.py": "helping"}, "tuner.study.by_path.two_words_2_0_"),
        ({"a/__main__.py": "helping"}, "tuner.study.by_path.__main___"),
        ({"a/kit/mine.py": ".sub.helping", "a/kit/__init__.py": "", "a/kit/sub/__init__.py": ""}, "kit.mine"),
        ({"a/kit/__init__.py": "kit.sub.helping", "a/kit/sub/__init__.py": ""}, "kit"),
        ({"a/storage/mine.py": ".sub.helping", "a/storage/__init__.py": ""}, "tuner.study.by_path.storage_"),
        ({"a/v1.2/mine.py": "helping", "a/v1.2/__init__.py": ""}, "mine"),  # no module can be called so
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_an_objective_starts_imports_it_as_well(
    tmp_path: Path, start_python: Callable, files: dict[str, str], module: str
) -> None:
    objective, helping = next(iter(files.items()))
    for name in list(files)[1:]:
        written(tmp_path, name, "")
    path = written(tmp_path, objective, CODE.format(module=helping))
    below = {"helping": path.parent, ".sub.helping": path.parent / "sub", "kit.sub.helping": path.parent / "sub"}
    written(below[helping], "helping.py", "VALUE = 7")
    script = written(tmp_path, "b/script.py", IN_CHILD)
    code = f"import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path({str(script)!r}, run_name='__main__')"
    process = start_python(code, str(script), f"{path}:objective")
    out, err = process.communicate(timeout=120)
    assert err == ""
    found, *rest = out.split()
    assert found.startswith(module)
    assert rest == ["7", "True"]


def test_a_module_is_found_here_before_it_is_found_among_the_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "bundle_here/__init__.py", "")
    here = written(tmp_path, "bundle_here/mine.py", "def f(trial): return 5")
    monkeypatch.chdir(tmp_path)
    source = find_objective("bundle_here.mine:f")
    assert (source.name, source.study_name, source.file) == ("mine.py:f", "mine", here)
    assert source.load()(None) == 5  # type: ignore[operator]
    assert find_objective("bundle_here/mine.py:f") == source
    assert find_objective("optuna.study:create_study").file.name == "__init__.py"
    for missing in ("bundle_here.other:f", "nothing.of.it:f", "itertools:chain", "bundle_here:f:g"):
        with pytest.raises(TunerError, match=r"no (module|objective named) '.*path/to/file.py:NAME"):
            find_objective(missing)


@pytest.mark.parametrize(
    ("neighbour", "contents", "line", "told"),
    [
        ("storage.py", "def read(): pass", "import storage\nx = lambda: storage.read()", "tuner's own package"),
        ("storage.py", "def read(): pass", "import storage as its\nx = lambda: its.read()", "tuner's own package"),
        ("tuner.py", "LIMIT: int = 3", "def late():\n    from tuner import LIMIT", "tuner's own package"),
        ("objectives/common.py", "", "from objectives.common import x", "tuner's own package"),
        ("objectives/common.py", "", "from objectives import common", "tuner's own package"),
        ("objectives.py", "a, (b, c) = 1, (2, 3)", "from objectives import c", "tuner's own package"),
        ("optuna.py", "class Mine: pass", "from optuna import Mine", "another package ("),
        ("storage.py", "def read(): pass", "import helps", "tuner's own package"),
    ],
)
def test_a_neighbour_whose_name_is_taken_is_told_before_anything_runs(
    tmp_path: Path, neighbour: str, contents: str, line: str, told: str
) -> None:
    written(tmp_path, neighbour, contents)
    written(tmp_path, "helps.py", "from storage import read")
    path = written(tmp_path, "uses.py", f"raise AssertionError\n{line}\ndef f(trial): return 1\n")
    with pytest.raises(TunerError) as caught:
        find_objective(f"{path}:f").load()
    assert told in str(caught.value)
    assert str(tmp_path / neighbour.split("/")[0]) in str(caught.value)
    assert str(caught.value).endswith("give yours another name")
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("neighbour", "contents", "line"),
    [
        ("torch.py", "raise AssertionError", "import torch; torch.ones(1)"),
        ("tuner.py", "from tuner import Objective\nclass Mine: pass", "from tuner import Objective"),
        ("storage.py", "def read(): pass", "from storage import open_storage"),
        ("storage/one.py", "raise AssertionError", "import storage.database.url"),
        ("broken_beside.py", "def f(:", "x = 1"),
    ],
)
def test_a_neighbour_that_is_not_meant_is_in_nobodys_way(
    tmp_path: Path, neighbour: str, contents: str, line: str
) -> None:
    written(tmp_path, neighbour, contents)
    path = written(tmp_path, "uses.py", f"{line}\ndef f(trial): return 1\n")
    assert find_objective(f"{path}:f").load()(None) == 1  # type: ignore[operator]


LIBRARY = """
import importlib, importlib.util, pickle

found = importlib.util.find_spec("optional_beside")
try:
    import optional_beside
except ImportError:
    pass
else:
    found = optional_beside

def find():
    return importlib.import_module("beside_too")

class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return super().find_class(module, name)
"""
WANTING = """
import importlib, io, library, used_beside

def objective(trial):
    return used_beside.VALUE, library.found, library.find

def later(trial):
    pickled = library.Unpickler(io.BytesIO(b"cpickled_beside\\nVALUE\\n.")).load()
    return pickled, importlib.import_module("beside_too").VALUE
"""


def test_a_neighbour_is_for_the_user_s_own_code_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed tries to import what need not be there: a neighbour may be called that."""
    written(tmp_path, "site-packages/library.py", LIBRARY)
    for name in ("optional_beside", "beside_too", "used_by_it", "pickled_beside"):
        written(tmp_path, f"mine/{name}.py", "VALUE = 7")
    written(tmp_path, "mine/used_beside.py", "from used_by_it import VALUE")
    path = written(tmp_path, "mine/wanting.py", WANTING)
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    value, found, find = find_objective(f"{path}:objective").load()(None)  # type: ignore[operator, misc]
    assert (value, found) == (7, None)
    with pytest.raises(ModuleNotFoundError, match="No module named 'beside_too'"):
        find()
    assert find_objective(f"{path}:later").load()(None) == (7, 7)  # type: ignore[operator]
    assert find().VALUE == 7  # it is imported by now


def test_what_was_compiled_of_an_edit_a_moment_before_is_not_run(
    tmp_path: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    show = (
        "import sys\nfrom tuner.study.registry import find_objective\nprint(find_objective(sys.argv[1]).load()(None))"
    )
    found = []
    for value in ("1.0", "2.0"):
        for package in ("package", "package/inner"):
            written(tmp_path, f"{package}/__init__.py", "")
        os.utime(written(tmp_path, "package/inner/deep.py", f"VALUE = {value}\n"), (0, 0))
        for name in ("a.py", "code.py", "package/b.py"):  # code.py by another name, as there is a module of Python's
            is_packed = name.startswith("package")
            code = "from package.inner.deep import VALUE" if is_packed else f"VALUE = {value}"
            os.utime(written(tmp_path, name, f"{code}\n\ndef objective(trial):\n    return VALUE\n"), (0, 0))
            process = start_python(show, f"{tmp_path / name}:objective", env={"PYTHONDONTWRITEBYTECODE": ""})
            found.append(process.communicate()[0].strip())
    assert found == ["1.0"] * 3 + ["2.0"] * 3
    assert not list(tmp_path.rglob("__pycache__"))
