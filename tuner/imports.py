"""Importing in less time."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

# What these import that few of their users need: torchvision, and with it the compiler of torch, for the models of a
# few metrics of images; scipy's signals to give them back a function that they had once.
_LATER: Final = {
    "torchmetrics": ("scipy.signal",),
    "torchmetrics.functional.image": ("torchvision", "torchvision.models"),
}
_SIGNAL: Final = "scipy.signal"


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import in the block without looking for garbage, of which it makes next to none; nor ever after in what is there.

    And without what torchmetrics imports for metrics that few use: scipy.signal and torchvision, which are imported
    when something of them is used.

    torch, torchvision and torchmetrics take 2.6 s to import instead of 3.2 s without looking for garbage, and the
    process that has imported them 0.2 s to end instead of 1.0 s. Without torchvision torchmetrics takes 0.4 of its
    time, and without scipy.signal 0.1 of that (2 cores, torch 2.14, 2026-11).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    if not any(isinstance(finder, _Find) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Find())
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


class _Find(MetaPathFinder):
    """Finds the packages whose imports wait, and scipy.signal, which torchmetrics would have changed."""

    def __init__(self) -> None:
        self._names = {*_LATER, _SIGNAL}

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if name not in self._names:
            return None
        self._names.remove(name)  # the others are asked now, and once it is imported nobody is
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        if name == _SIGNAL:
            spec.loader = _LoadSignal(spec.loader)
        elif not any(later in sys.modules for later in _LATER[name]):
            package, _, _ = _LATER[name][0].partition(".")
            if importlib.util.find_spec(package) is not None:
                spec.loader = _Load(spec.loader, _LATER[name])
        return spec


class _Wrapped(Loader):
    """A loader around another one."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)


class _Load(_Wrapped):
    """Loads a package while others only stand there."""

    def __init__(self, loader: Loader, later: tuple[str, ...]) -> None:
        super().__init__(loader)
        self._later = later

    def exec_module(self, module: ModuleType) -> None:
        sys.modules.update({name: _Later(name) for name in self._later})
        try:
            super().exec_module(module)
        finally:
            for name in self._later:
                if isinstance(sys.modules.get(name), _Later):
                    del sys.modules[name]


class _LoadSignal(_Wrapped):
    """Gives scipy.signal back the function that torchmetrics gives it when it finds it."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if not hasattr(module, "hamming"):
            module.hamming = module.windows.hamming  # type: ignore[attr-defined]


class _Later(ModuleType):
    """Stands for a module that is imported when something of it is used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # of a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _LaterAttribute(self.__name__, name)


class _LaterAttribute:
    def __init__(self, module: str, name: str) -> None:
        self._of = (module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._found()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found(), name)

    def _found(self) -> Any:
        module, name = self._of
        return getattr(importlib.import_module(module), name)
