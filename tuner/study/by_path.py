"""Objectives' files as modules, which processes that an objective starts can import as well.

What is sent to a process that is not forked is found there by its module's name. A file has its own name as far as
that is free; `tuner.study.by_path.NAME` is the one whose name is not: to import it imports this module first, and the
environment says which file it is.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
import sysconfig
from collections.abc import Sequence
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
    SourcelessFileLoader,
)
from pathlib import Path
from types import CodeType, FrameType, ModuleType

from tuner.places import kind_of

VARIABLE = "TUNER_OBJECTIVE_FILES"
_PYTHON = sysconfig.get_path("stdlib")
_PASSES_ON = ("<", f"{_PYTHON}/importlib/", f"{_PYTHON}/runpy.py", f"{_PYTHON}/pkgutil.py")
_OF_PROCESSES = tuple(f"{_PYTHON}/{name}" for name in ("pickle.py", "multiprocessing/", "concurrent/"))
__path__: list[str] = []  # so that the modules which the finder finds may be in here


class _FromSource(SourceFileLoader):
    """Compiles a file at each import, and keeps nothing of it beside the file.

    What Python keeps is taken for the file's as long as its size and the second of its last change are the same: a 1
    that became a 2 a moment later would be run as the 1.
    """

    def get_code(self, fullname: str) -> CodeType:
        file = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(file), file)
        return code


_LOADERS = (
    (ExtensionFileLoader, EXTENSION_SUFFIXES),
    (_FromSource, SOURCE_SUFFIXES),
    (SourcelessFileLoader, BYTECODE_SUFFIXES),
)


def import_file(file: Path) -> ModuleType:
    """Import a file as part of the package that it lies in, if it lies in one.

    The directory that its name starts in, and so its neighbours, can be imported from then on, by the user's own code
    alone; what is installed comes first.
    """
    root, parts = module_place(file)
    if str(root) not in sys.path:
        sys.path.append(str(root))
        sys.path_importer_cache[str(root)] = _Neighbours(str(root), *_LOADERS)
    importlib.invalidate_caches()  # it may have been written just now
    if not parts[0].isidentifier() or elsewhere(parts[0], root) is not None:
        parts[0] = _named(root / parts[0] / "__init__.py" if file.parent != root else file)
    return importlib.import_module(".".join(parts))


def is_relative(error: ImportError) -> bool:
    """Whether a file that is in no package wanted a module of its package."""
    return "no known parent package" in str(error) or str(error.name).startswith(f"{__name__}.")


def module_place(file: Path) -> tuple[Path, list[str]]:
    """Return the directory that a file's module is imported from, and the parts of its name."""
    parts = [] if file.stem == "__init__" else [file.stem]
    root = file.parent
    while (root / "__init__.py").is_file() and root.name.isidentifier():
        parts.insert(0, root.name)
        root = root.parent
    return root, parts or [file.stem]


def elsewhere(name: str, root: Path) -> Path | None:
    """Return what `import name` finds that is not in the directory `root`; None if it finds nothing else."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # of a module that was made and not found, such as __main__
        return Path(name)
    if found is None:
        return None
    places = [Path(place).resolve() for place in (found.origin, *(found.submodule_search_locations or ())) if place]
    ours = {root / f"{name}.py", root / name, root / name / "__init__.py"}
    return None if ours & set(places) else places[0]


def _named(file: Path) -> str:
    """Give a file a name that no other has, here and in the processes that are started from here."""
    stem = file.parent.name if file.stem == "__init__" else file.stem
    digest = hashlib.sha256(os.fsencode(file)).hexdigest()[:8]
    name = f"{__name__}.{re.sub(r'[^0-9A-Za-z]', '_', stem)}_{digest}"
    os.environ[VARIABLE] = json.dumps({**_files(), name: str(file)})
    return name


def _files() -> dict[str, str]:
    files: dict[str, str] = json.loads(os.environ.get(VARIABLE, "{}"))
    return files


class _Finder:
    """Finds the modules that `_named` has named."""

    @staticmethod
    def find_spec(
        name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(f"{__name__}.") or (file := _files().get(name)) is None:
            return None
        return importlib.util.spec_from_file_location(name, file, loader=_FromSource(name, file))


class _Neighbours(FileFinder):
    """Finds what lies in the directory of an objective, for the user's own code and not for what is installed.

    Much of that tries to import what need not be there, such as pandas, and a neighbour may be called so. What is
    unpickled, or sent to another process, is the user's.
    """

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        return super().find_spec(fullname, target) if _is_for_own_code() else None


def _is_for_own_code() -> bool:
    """Whether what is being imported is wanted by the user's own code, or by a process or a pickle of it."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_PASSES_ON):
        frame = frame.f_back
    if frame is None:
        return True
    file = frame.f_code.co_filename
    if file.startswith(_OF_PROCESSES):
        return frame.f_code.co_name != "<module>"  # which imports what is Python's
    is_unpickler = frame.f_code.co_name == "find_class"  # as torch.load has one of its own
    return file == __file__ or is_unpickler or kind_of(file) == "own"


def _own_packages(directory: str) -> FileFinder:
    """Find what lies in a package beside an objective. Raises ImportError if the directory is no such package's."""
    roots = [root for root, finder in sys.path_importer_cache.items() if isinstance(finder, _Neighbours)]
    is_beside = any(directory.startswith(f"{root}{os.sep}") for root in roots)
    if not is_beside or not os.path.isdir(directory) or kind_of(os.path.join(directory, "__init__.py")) != "own":
        raise ImportError(f"{directory} is no package of an objective's", path=directory)
    return FileFinder(directory, *_LOADERS)


sys.path_hooks.insert(0, _own_packages)
sys.meta_path.append(_Finder)
