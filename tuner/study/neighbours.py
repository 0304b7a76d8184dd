"""Files beside an objective that cannot be imported, as something else has their name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tuner.errors import TunerError
from tuner.study.by_path import elsewhere, module_place

OURS = ("objectives", "storage", "tuner")


def refuse_hidden_neighbours(file: Path) -> None:
    """Raise TunerError if an objective means a file beside it whose name is that of a package here.

    It does if it imports what is in the file, itself or by way of other files beside it. Nothing is imported.
    """
    root, _ = module_place(file)
    seen = {file}
    waiting = [file]
    while waiting:
        importer = waiting.pop()
        for line, module, names in _imports(importer):
            top = module.partition(".")[0]
            neighbour = _file_of(root, top)
            if neighbour is None or neighbour == importer:
                continue
            other = elsewhere(top, root)
            if other is None:
                waiting += {neighbour} - seen
                seen.add(neighbour)
            elif _has(root, module, names) and not _has(_root_of(other), module, names):
                what = "tuner's own package" if top in OURS else f"another package ({other})"
                raise TunerError(
                    f"{importer}, line {line}: 'import {top}' gives {what} and not {neighbour}: give yours another name"
                )


def _root_of(module: Path) -> Path:
    """Return the directory that a module was imported from."""
    return module.parents[1] if module.stem == "__init__" else module.parent


def _file_of(root: Path, module: str) -> Path | None:
    """Return what a module's name stands for in a directory, None if there is nothing of that name."""
    place = root.joinpath(*module.split("."))
    files = (place.with_name(f"{place.name}.py"), place / "__init__.py")
    return next((file for file in files if file.is_file()), place if place.is_dir() else None)


def _has(root: Path, module: str, names: set[str]) -> bool:
    """Whether the file, or the folder, of that name in a directory has what is imported of a module."""
    found = _file_of(root, module)
    if found is None:
        return False
    if "." in module or any(_file_of(root, f"{module}.{name}") for name in names):
        return True
    return found.is_file() and bool(names & ({"*"} | _defined(found)))


def _tree(file: Path) -> ast.AST:
    try:
        return ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # told when it is imported; the last for a NUL
        return ast.Module(body=[], type_ignores=[])


def _defined(file: Path) -> set[str]:
    """Return the names that a file gives to what it makes, as apart from what it imports."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(_tree(file)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {its.id for its in ast.walk(node) if isinstance(its, ast.Name) and isinstance(its.ctx, ast.Store)}
    return names


def _imports(file: Path) -> Iterator[tuple[int, str, set[str]]]:
    """Yield the imports of a file: the line, the module, and what is used of it."""
    if file.is_dir():
        return
    tree = _tree(file)
    uses: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            uses.setdefault(node.value.id, set()).add(node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, uses.get(alias.asname or alias.name, set())
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module, {alias.name for alias in node.names}
