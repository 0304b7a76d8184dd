"""Finding an objective: an installed entry point by its name, or a file or module given on the command line.

Code is imported from these two places only, never from a path that a database holds.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import JsonValue, ValidationError
from typing_extensions import TypeIs

from tuner.errors import TunerError, UsageError
from tuner.imports import quick_imports
from tuner.spec import first_problem
from tuner.study.by_path import import_file, is_relative, module_place
from tuner.study.neighbours import refuse_hidden_neighbours
from tuner.study.places import last_place, own_place

if TYPE_CHECKING:
    import optuna

    from tuner.objective import Objective

ENTRY_POINT_GROUP = "tuner.objectives"

FunctionObjective: TypeAlias = "Callable[[optuna.Trial], float]"
ObjectiveKind: TypeAlias = "type[Objective] | FunctionObjective"


@dataclass(frozen=True, kw_only=True)
class ObjectiveSource:
    """Where an objective's code lies. `name` is what the spec holds: the entry point's, or `file.py:attribute`.

    `study_name` is what a study of it is called unless told otherwise.
    """

    name: str
    study_name: str
    file: Path
    module: str | None
    attribute: str
    text: str | None = None
    """The content of a file that was written of what was defined in a notebook or a script."""

    @property
    def reference(self) -> str:
        """What `find_objective` finds it by, in any directory."""
        return self.name if self.module is not None else f"{self.file}:{self.attribute}"

    def code_hash(self) -> str:
        """Return the sha256 of the file that defines the objective, in hexadecimal."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def summary(self) -> str:
        """Return the first line of the docstring of the objective, or else of its file, without importing it."""
        try:
            tree = ast.parse(self.file.read_bytes())
        except SyntaxError as error:
            return f"cannot be read: line {error.lineno}: {error.msg}"
        named = [node for node in tree.body if getattr(node, "name", None) == self.attribute]
        for node in (*named, tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module) and (doc := ast.get_docstring(node)):
                return doc.splitlines()[0]
        return ""

    def load(self) -> ObjectiveKind:
        """Import the objective: a subclass of `Objective`, or a plain function of a trial.

        Raises TunerError, naming the file and the line, if it cannot be imported or is neither.
        """
        module = self._import()
        found: Any = getattr(module, self.attribute, None)
        if _is_objective_class(found) or (callable(found) and not inspect.isclass(found)):
            return found  # type: ignore[no-any-return]  # checked by hand
        usable = [name for name, value in vars(module).items() if _is_objective(value, module.__name__)]
        raise TunerError(
            f"{self.file} needs to define {self.attribute!r}, an Objective or a function of a trial,"
            f" got {found!r}; it defines: {', '.join(usable) or 'none'}"
        )

    def _import(self) -> ModuleType:
        """Import the objective's module, which finds what it would as a script that was started without arguments."""
        if self.module is None and str(module_place(self.file)[0]) not in sys.path:
            refuse_hidden_neighbours(self.file)
        sys.argv = [str(self.file)]  # from now on: processes that are started import it as well
        try:
            with quick_imports():
                if self.module is not None:
                    return importlib.import_module(self.module)
                return import_file(self.file)
        except SyntaxError as error:
            place = f"{error.filename or self.file}, line {error.lineno or 1}"  # there are neither for a NUL
            raise TunerError(f"cannot read {place}: {error.msg}") from error
        except (Exception, SystemExit) as error:
            file, line = own_place(error, str(self.file)) or last_place(error)
            hint = "; on import it gets no arguments, and must not exit" if isinstance(error, SystemExit) else ""
            if isinstance(error, ImportError) and is_relative(error):
                hint = "; an __init__.py beside it makes its directory a package"
            raise TunerError(
                f"cannot import {self.file}: {type(error).__name__}: {error} ({file}, line {line}){hint}"
            ) from error


def is_objective_class(kind: ObjectiveKind) -> TypeIs[type[Objective]]:
    """Whether `kind` is a subclass of Objective, and not a plain function."""
    return inspect.isclass(kind)


def find_objective(reference: str) -> ObjectiveSource:
    """Return where an objective lies, by an entry point's name, `path/to/file.py:NAME` or `package.module:NAME`.

    A module is one of this directory, or an installed one. Raises TunerError if there is none.
    """
    path, colon, attribute = reference.rpartition(":")
    if colon and path.endswith(".py"):
        return _from_file(Path(path), attribute)
    if reference.endswith(".py"):
        raise UsageError(f"an objective in a file needs its name, got {reference!r}; say {reference}:NAME")
    if colon and all(part.isidentifier() for part in path.split(".")):
        return _from_file(_file_of_module(path), attribute)
    for source in installed_objectives():
        if source.name == reference:
            return source
    names = ", ".join(source.name for source in installed_objectives()) or "none"
    raise TunerError(
        f"no objective named {reference!r} is installed; there are: {names};"
        " or give path/to/file.py:NAME or package.module:NAME"
    )


def source_of(found: type | Callable[..., Any], data_dir: Path) -> ObjectiveSource:
    """Return where a class or function lies; one of a notebook or script is written to a file in the data directory.

    Raises TunerError if workers, which are processes of their own, could not import it.
    """
    from tuner.study.written import written

    if not (_is_objective_class(found) or inspect.isfunction(found)):
        raise UsageError(
            "an objective needs to be a subclass of Objective, a function of a trial, the name of an installed"
            f" objective or path/to/file.py:NAME, got {found!r}"
        )
    module, name = found.__module__, found.__qualname__
    if module == "__main__":
        file, text = written(found, data_dir)
        return replace(_from_file(file, found.__name__), text=text)
    for source in installed_objectives():
        if (source.module, source.attribute) == (module, name):
            return source
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None or not path.endswith(".py") or not name.isidentifier():
        raise TunerError(f"{name} of {module} is not to be found in a file: define it in one, outside of all else")
    return _from_file(Path(path), name)


def installed_objectives() -> list[ObjectiveSource]:
    """Return the objectives of all installed packages, by name, without importing their modules."""
    found = []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            spec = importlib.util.find_spec(entry.module)
        except ImportError:
            continue  # what is left of a package that was removed
        if spec is not None and spec.origin is not None:
            found.append(
                ObjectiveSource(
                    name=entry.name,
                    study_name=entry.name,
                    file=Path(spec.origin),
                    module=entry.module,
                    attribute=entry.attr,
                )
            )
    return sorted(found, key=lambda source: source.name)


def build_objective(
    kind: type[Objective], options: Mapping[str, JsonValue], seed: int, texts: Mapping[str, str] = MappingProxyType({})
) -> Objective:
    """Return the objective with its options checked. Raises UsageError that names the option and lists all.

    `texts` are the options as they were typed: what reads as a number or as JSON is text where the option wants that.
    """
    if missing := sorted(kind.__abstractmethods__):
        raise TunerError(f"{kind.__name__} needs the methods {', '.join(missing)}, got none of these: write them")
    known = {name: its for name, its in kind.model_fields.items() if name != "seed"}
    for name in options:
        if name not in known:
            listed = ", ".join(known) or "none"
            hint = "; the seed is set by --seed" if name == "seed" else ""
            raise UsageError(f"--set: {kind.__name__} has no option {name!r}; it has: {listed}{hint}")
    try:
        return kind(seed=seed, **options)
    except ValidationError as error:
        refused = {problem["loc"][0] for problem in error.errors()}
        as_text = {name: text for name, text in texts.items() if name in refused and text != options[name]}
        if as_text:
            with suppress(ValidationError):
                return kind(seed=seed, **{**options, **as_text})
        raise UsageError(f"--set {first_problem(error)}{_quoting(error)}") from error


def _quoting(error: ValidationError) -> str:
    """Return how a text is given that reads as something else, where one is wanted within a list or the like."""
    if error.errors()[0]["type"] != "string_type":
        return ""
    return """; text within JSON needs quotes, as --set 'tags=["2024"]'"""


def _from_file(path: Path, attribute: str) -> ObjectiveSource:
    if not path.is_file():
        raise TunerError(f"no file {path}: give the path of the file that defines the objective {attribute!r}")
    if not attribute.isidentifier():
        raise UsageError(f"an objective's name needs to be a Python name, got {attribute!r} for {path}")
    file = path.resolve()
    return ObjectiveSource(
        name=f"{path.name}:{attribute}",
        study_name=file.parent.name if path.stem == "__init__" else path.stem,
        file=file,
        module=None,
        attribute=attribute,
    )


def _file_of_module(name: str) -> Path:
    """Return the file of a module. Raises TunerError if there is none."""
    here = Path(*name.split("."))
    for path in (here.with_suffix(".py"), here / "__init__.py"):
        if path.is_file():
            return path
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.has_location or not str(found.origin).endswith(".py"):
        raise TunerError(f"no module {name!r} in this directory or installed: give path/to/file.py:NAME")
    return Path(str(found.origin))


def _is_objective(value: Any, module: str) -> bool:
    if getattr(value, "__module__", None) != module:
        return False
    return inspect.isfunction(value) or _is_objective_class(value)


def _is_objective_class(value: Any) -> bool:
    # Importing the base class imports torch; a file that did not import it has no subclass of it.
    base = sys.modules.get("tuner.objective")
    return base is not None and inspect.isclass(value) and issubclass(value, base.Objective)
