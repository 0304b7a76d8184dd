"""Rows 1 and 2: what makes code of data stands in listed files of ours alone, and of what we call in those we know."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._base import BaseJournalSnapshot

from tuner.study.sampling import _PRUNERS, _SAMPLERS

ROOT = Path(__file__).parents[2]
OURS = [
    path for room in ("tuner", "storage", "objectives", "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))
]

# Where ours may, and why.
ALLOWED = {
    ("tuner/study/cmaes.py", "pickle.Unpickler"): "knows the classes of numbers and arrays, and no other",
    ("tuner/study/by_path.py", "import_module"): "a file that the command line named",
    ("tuner/study/registry.py", "import_module"): "an installed objective, or one that the command line named",
    ("tuner/imports.py", "import_module"): "torchvision, by the names of two modules",
    ("storage/__init__.py", "import_module"): "our own modules, by a table",
    ("tuner/__init__.py", "import_module"): "our own modules, by a table",
    ("tuner/cli/app.py", "import_module"): "our own modules, by a table",
    ("tuner/launch/engine.py", "import_module"): "our own modules, by a table",
    ("tuner/study/written.py", "import_module"): "a module that the objective's author has imported already",
    ("tuner/formats/torchscript.py", "torch.jit.load"): "a format that the caller named: load_model loads no other",
    ("tuner/formats/aoti.py", "aoti_load_package"): "a format that the caller named: load_model loads no other",
    ("tuner/formats/fresh.py", "torch.jit.load"): "the file that this export has just written",
    ("tuner/formats/fresh.py", "aoti_load_package"): "the file that this export has just written",
}

# What we call of other packages, and the files of it that unpickle or evaluate.
CALLED = [
    *(f"optuna.{name}" for name in ("samplers", "pruners", "study", "trial", "distributions", "search_space")),
    *(f"optuna.{name}" for name in ("storages", "importance", "visualization", "_gp", "_hypervolume", "artifacts")),
    "optuna_dashboard",
    "cmaes",
    "sklearn.datasets",
    "torchvision.datasets",
    "torch._export.serde",
    "torch.export",
    "torch.serialization",
]
KNOWN = {
    "optuna/samplers/_cmaes.py": "our sampler restores its state itself: tuner/study/cmaes.py",
    "optuna/storages/journal/_storage.py": "snapshots alone, which a journal in a file has none of",
    "sklearn/datasets/_california_housing.py": "joblib's cache in the user's own data directory",
    "sklearn/datasets/_covtype.py": "joblib's cache in the user's own data directory",
    "sklearn/datasets/_kddcup99.py": "a data set that no objective here asks for",
    "sklearn/datasets/_lfw.py": "a data set that no objective here asks for",
    "sklearn/datasets/_olivetti_faces.py": "a data set that no objective here asks for",
    "sklearn/datasets/_rcv1.py": "a data set that no objective here asks for",
    "sklearn/datasets/_species_distributions.py": "a data set that no objective here asks for",
    "sklearn/datasets/_twenty_newsgroups.py": "a data set that no objective here asks for",
    "torchvision/datasets/cifar.py": "a data set that no objective here asks for",
    "torchvision/datasets/lsun.py": "a data set that no objective here asks for",
    "torch/_export/serde/serialize.py": "gets an archive of what tuner/formats/plain_program.py has checked",
    "torch/export/_unlift.py": "makes code of names, which tuner/formats/plain_program.py has checked",
    "torch/serialization.py": "loads TorchScript in the place of weights, and refuses that with weights_only",
    "torch/export/pt2_archive/": "reads an archive in which tuner/formats/plain_program.py has refused pickles",
}


MODULES = ("pickle", "joblib", "marshal", "shelve", "dill", "cloudpickle")
FUNCTIONS = ("eval", "exec", "compile", "__import__", "import_module")
WRITING = {f"{module}.{name}" for module in ("pickle", "joblib") for name in ("dump", "dumps", "PicklingError")}


def makers_of_code(source: str) -> set[str]:
    """What in a file may make code of data, or run a shell."""
    found = {what for node in ast.walk(ast.parse(source)) for what in (*_used(node), *_called(node))}
    return found - WRITING - {"pickle.UnpicklingError"}


def _used(node: ast.AST) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [f"import {one.name}" for one in names if one.name in MODULES[2:]]
        case ast.ImportFrom(module=str(module)) if module in MODULES:
            return [f"from {module}"]
        case ast.Attribute(value=ast.Name(id="pickle" | "joblib" as module), attr=name):
            return [f"{module}.{name}"]
    return []


def _called(node: ast.AST) -> list[str]:
    match node:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(value=ast.Name(id="importlib"), attr=name)) if (
            name in FUNCTIONS
        ):
            return [name]
        case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr="system" | "popen" as name)):
            return [f"os.{name}"]
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="jit"), attr="load")):
            return ["torch.jit.load"]
        case ast.Call(func=ast.Name(id="aoti_load_package") | ast.Attribute(attr="aoti_load_package")):
            return ["aoti_load_package"]
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=given):
            return [] if _has(given, "weights_only", True) else ["torch.load without weights_only"]
        case ast.Call(func=ast.Attribute(value=ast.Name(id="yaml"), attr=name)) if (
            "load" in name and "safe" not in name
        ):
            return [f"yaml.{name}"]
        case ast.Call(keywords=given) if _has(given, "shell", True) or _has(given, "allow_pickle", True):
            return ["shell or allow_pickle"]
    return []


def _has(keywords: list[ast.keyword], name: str, value: object) -> bool:
    return any(one.arg == name and isinstance(one.value, ast.Constant) and one.value.value is value for one in keywords)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b'')",
        "from pickle import loads",
        "import cloudpickle",
        "eval('1')",
        "exec('1')",
        "import os\nos.system('x')",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import torch\ntorch.jit.load('x')",
        "from torch._inductor import aoti_load_package\naoti_load_package('x')",
        "import torch._inductor\ntorch._inductor.aoti_load_package('x')",
        "import yaml\nyaml.load('x')",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import joblib\njoblib.load('x')",
        "import importlib\nimportlib.import_module('x')",
    ],
)
def test_what_makes_code_of_data_is_found(source: str) -> None:
    assert makers_of_code(source)


def test_what_does_not_is_not() -> None:
    harmless = "model.eval()\ntorch.load(x, weights_only=True)\nyaml.safe_load(x)\nre.compile(x)\nnumpy.load(x)"
    assert makers_of_code(harmless) == set()


@pytest.mark.slow
def test_nothing_of_ours_makes_code_of_data_but_where_it_is_listed() -> None:
    found = {(str(path.relative_to(ROOT)), what) for path in OURS for what in makers_of_code(path.read_text())}
    assert found == set(ALLOWED)


@pytest.mark.slow
def test_what_we_call_of_others_makes_code_of_data_only_where_we_know_it() -> None:
    unknown = []
    for name in CALLED:
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert spec.origin is not None, name
        package = Path(spec.origin)
        site = package.parents[name.count(".") + (package.name == "__init__.py")]
        for path in sorted(package.parent.rglob("*.py")) if package.name == "__init__.py" else [package]:
            place = path.relative_to(site).as_posix()
            made = makers_of_code(path.read_text()) - {"import_module", "compile", "__import__"}
            if made and "/tests/" not in place and not place.startswith(tuple(KNOWN)):
                unknown.append((place, made))
    assert unknown == []


@pytest.mark.parametrize("offered", [*_SAMPLERS.values(), *_PRUNERS.values()], ids=lambda kind: kind.__name__)
def test_each_sampler_and_pruner_on_offer_was_looked_through(offered: type) -> None:
    for kind in offered.__mro__:
        top = kind.__module__.partition(".")[0]
        if top in ("builtins", "abc"):
            continue
        is_scanned = top in ("tuner", "storage") or kind.__module__.startswith(tuple(CALLED))
        assert is_scanned, kind
        # CMA-ES of Optuna is: what it does about its state is ours
        if top == "optuna" and kind.__name__ != "CmaEsSampler":
            assert makers_of_code(Path(inspect.getfile(kind)).read_text()) == set()


def test_a_journal_in_a_file_has_no_snapshot_to_unpickle() -> None:
    assert not issubclass(JournalFileBackend, BaseJournalSnapshot)
