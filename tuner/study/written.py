"""Objectives that were defined in a notebook or a script: written to files of their own, which workers can import.

Such a file holds the class or function, and what it names of its notebook: imports, other functions and classes, and
plain constants as they are when it is written. It lies in the data directory under the sha256 of its content.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import hashlib
import importlib
import inspect
import linecache
import os
import re
import site
import symtable
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import packages_distributions
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, Final

from storage.files import own_directory, replace
from tuner.errors import TunerError

MAX_CONSTANT: Final = 10_000
"""A constant that takes more characters than this is data."""
_FUTURE_ANNOTATIONS: Final = __future__.annotations.compiler_flag
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_PLAIN: Final = (int, float, complex, str, bytes, bool, type(None), tuple, list, dict, set, frozenset)


def written(found: type | Callable[..., Any], data_dir: Path) -> tuple[Path, str]:
    """Write a class or function of `__main__` to a file of its own; return that and its text.

    Raises TunerError, naming what is in the way, if its source is not to be had, or uses what no file can hold.
    """
    text = source_text(found)
    directory = own_directory(data_dir / "objectives")
    digest = hashlib.sha256(text.encode()).hexdigest()
    file = own_directory(directory / digest) / f"{found.__name__}.py"
    if not file.exists():
        replace(file, text.encode())
    return file, text


def written_here(data_dir: Path, name: str, code_hash: str) -> str | None:
    """Return `path/to/file.py:NAME` of the objective of this name that was written here with that hash, or None."""
    file_name, _, attribute = name.partition(":")
    if _HASH.fullmatch(code_hash) is None or not attribute.isidentifier() or file_name != f"{attribute}.py":
        return None
    file = data_dir / "objectives" / code_hash / file_name
    try:
        is_it = hashlib.sha256(file.read_bytes()).hexdigest() == code_hash
    except OSError:
        return None
    return f"{file}:{attribute}" if is_it else None


def source_text(found: type | Callable[..., Any]) -> str:
    """Return the text of a file that defines this class or function of `__main__` as it is there."""
    name, qualified = found.__name__, found.__qualname__
    if name == "<lambda>":
        raise TunerError("a lambda cannot be an objective, as it has no name: write it as a function, by def")
    if "<locals>" in qualified:
        outer = qualified.partition(".")[0]
        raise TunerError(
            f"{name} is defined within {outer}, whose variables the process of a worker has not: define it outside of"
            " any function"
        )
    if qualified != name:
        raise TunerError(f"{name} is defined within the class {qualified.partition('.')[0]}: define it outside of it")
    return _File(name).text()


class _File:
    """What has to be in the file of the objective `name`, found in `__main__`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._main = sys.modules["__main__"]
        self._namespace: dict[str, Any] = vars(self._main)
        self._typed = _typed(self._main)
        self._places: list[str] = []
        self._imports: list[str] = []
        self._constants: list[str] = []
        self._definitions: list[str] = []
        self._seen: set[str] = set()
        self._has_annotations_as_text = False

    def text(self) -> str:
        self._add_definition(self._name, self._namespace[self._name])
        future = ["from __future__ import annotations"] if self._has_annotations_as_text else []
        places = [f"sys.path.append({place!r})" for place in self._places]
        parts = [
            "# Written by tuner: what was defined in a notebook or a script, for workers to import.",
            "\n".join(future),
            "\n".join(["import sys", "", *places] if places else []),
            "\n".join(sorted(set(self._imports))),
            "\n".join(sorted(self._constants)),
            *(f"\n{definition}" for definition in self._definitions),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _add(self, name: str, attributes: list[str]) -> None:
        """Have the file define what `name` is in `__main__`; the `attributes` are those that are used of it."""
        if name not in self._namespace or (name.startswith("__") and name.endswith("__")):
            return  # a name of Python's, or of nothing: an error of the objective's own
        found = self._namespace[name]
        if hasattr(builtins, name) and callable(found) and found.__module__ != "__main__":
            return  # IPython has an `open` of its own
        if isinstance(found, ModuleType):
            self._add_module(name, found, attributes)
        elif name not in self._seen:
            self._seen.add(name)
            if getattr(found, "__module__", None) == "__main__" and hasattr(found, "__qualname__"):
                self._add_definition(name, found)
            elif not self._add_import(name, found):
                self._add_constant(name, found)

    def _add_definition(self, name: str, found: Any) -> None:
        own, self._seen = found.__name__, self._seen | {name, found.__name__}
        source = self._definition(own, found)
        for used, attributes in _used(source).items():
            if used != own:
                self._add(used, attributes)
        self._definitions.append(source + ("" if name == own else f"\n\n\n{name} = {own}"))

    def _definition(self, name: str, found: Any) -> str:
        """Return the source of a class or function of `__main__`."""
        for code in _codes(found):
            self._has_annotations_as_text |= bool(code.co_flags & _FUTURE_ANNOTATIONS)
            lines = linecache.getlines(code.co_filename)
            if source := _defined(name, "".join(lines), code.co_firstlineno):
                return source
        for text in reversed(self._typed):
            if source := _defined(name, text):
                self._has_annotations_as_text |= bool(re.search(r"^from __future__ import .*annotations", text, re.M))
                return source
        raise TunerError(
            f"the source of {name} is not to be had, as it was typed at a prompt or given by -c; workers run in"
            " processes of their own: put it in a file, which can be the script that calls this"
        )

    def _add_module(self, name: str, module: ModuleType, attributes: list[str]) -> None:
        if module.__name__ == "__main__" or module.__spec__ is None:
            raise self._refused(name, module)
        top = module.__name__.partition(".")[0]
        self._find_place(top)
        self._imports.append(f"import {name}" if name == module.__name__ else f"import {module.__name__} as {name}")
        for attribute in attributes:  # as torch.utils.data is of torch: the import of it may have been another's
            inner = f"{module.__name__}.{attribute}"
            while inner not in sys.modules and inner != module.__name__:
                inner = inner.rpartition(".")[0]
            if inner != module.__name__:
                self._imports.append(f"import {inner}")

    def _add_import(self, name: str, found: Any) -> bool:
        """Have it imported as the notebook did, or from where it is defined; return whether it can be."""
        candidates = [*self._own_imports(name)]
        if isinstance(getattr(found, "__qualname__", None), str) and isinstance(found.__module__, str):
            candidates.append((found.__module__, found.__qualname__))
        for module, attribute in candidates:
            with suppress(ImportError, AttributeError):
                if getattr(importlib.import_module(module), attribute) is found:
                    self._find_place(module.partition(".")[0])
                    alias = "" if attribute == name else f" as {name}"
                    self._imports.append(f"from {module} import {attribute}{alias}")
                    return True
        return False

    def _own_imports(self, name: str) -> Iterator[tuple[str, str]]:
        """Yield the modules, and the names there, that the notebook imports `name` from, the last ones first."""
        for text in reversed(self._typed):
            for node in ast.walk(_parsed(text)):
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    yield from ((node.module, its.name) for its in node.names if (its.asname or its.name) == name)

    def _add_constant(self, name: str, found: Any) -> None:
        if isinstance(found, Path):
            self._imports.append("import pathlib")
            self._constants.append(f"{name} = pathlib.Path({str(found)!r})")
            return
        with suppress(ValueError, SyntaxError):
            text = repr(found)
            if type(found) in _PLAIN and len(text) <= MAX_CONSTANT and ast.literal_eval(text) == found:
                self._constants.append(f"{name} = {text}")
                return
        raise self._refused(name, found)

    def _refused(self, name: str, found: Any) -> TunerError:
        return TunerError(
            f"objective {self._name} uses {name!r} ({type(found).__name__}) of this notebook or script, which the"
            f" process of a worker has not: make it within {self._name}, or import it from a file"
        )

    def _find_place(self, top: str) -> None:
        """Have the directory of a module's file found, where that is not one of the installed ones."""
        file = getattr(sys.modules.get(top), "__file__", None)
        if file is None:
            return
        place = Path(file).parent
        place = place.parent if Path(file).name == "__init__.py" else place
        if place in _installed() or str(place) in self._places or top in packages_distributions():
            return
        self._places.append(str(place))


def _installed() -> set[Path]:
    """Return the directories that are searched in the process of a worker as well."""
    paths = sysconfig.get_paths()
    places = [*paths.values(), *site.getsitepackages(), site.getusersitepackages(), f"{paths['stdlib']}/lib-dynload"]
    return {Path(place).absolute() for place in (*places, *os.environ.get("PYTHONPATH", "").split(os.pathsep)) if place}


def _typed(main: ModuleType) -> list[str]:
    """Return what was typed into the notebook so far, or the text of the script."""
    file = getattr(main, "__file__", None)
    if file is not None:
        with suppress(OSError, UnicodeDecodeError):
            return [Path(file).read_text()]
    cells = vars(main).get("In")
    return [str(cell) for cell in cells] if isinstance(cells, list) else []


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):  # a cell that failed
        return ast.Module([], [])


def _defined(name: str, text: str, line: int | None = None) -> str | None:
    """Return the source of the last definition of a name, of that which has the line where one is given."""
    found = None
    for node in ast.walk(_parsed(text)):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name != name:
            continue
        first = min([node.lineno, *(its.lineno for its in node.decorator_list)])
        if line is None or first <= line <= (node.end_lineno or first):
            found = textwrap.dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno]))
    return found


def _codes(found: Any) -> Iterator[CodeType]:
    """Yield the code of a function, or of the methods of a class."""
    for value in (found, *(vars(found).values() if inspect.isclass(found) else ())):
        inner = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)))
        is_own = getattr(inner, "__qualname__", "").partition(".")[0] == found.__name__
        if isinstance(inner, FunctionType) and is_own:
            yield inner.__code__


def _used(source: str) -> Mapping[str, list[str]]:
    """Return the global names that a definition uses, each with what is used of it by dots."""
    names: set[str] = set()
    tables = [symtable.symtable(source, "<objective>", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            is_bound = symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
            if symbol.is_referenced() and (symbol.is_global() if table.get_type() != "module" else not is_bound):
                names.add(symbol.get_name())
    used: dict[str, list[str]] = {name: [] for name in sorted(names)}
    for node in ast.walk(ast.parse(source)):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in used and parts:
            used[node.id].append(".".join(parts))
    return used
