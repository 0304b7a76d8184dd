"""A trial's params, which know what was read of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class ReadParams(dict[str, Any]):
    """The params as an objective's methods are given them. Whoever goes through all of them has read each."""

    def __init__(self, params: Mapping[str, Any] | None = None) -> None:
        super().__init__(params or {})
        self._read: set[str] = set()

    @property
    def unread(self) -> list[str]:
        """The names of those that nobody has asked for."""
        return [name for name in dict.keys(self) if name not in self._read]

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self._read.add(str(name))
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        self._read.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        self._read.update(super().keys())
        return super().keys()

    def items(self) -> Any:
        self._read.update(super().keys())
        return super().items()

    def values(self) -> Any:
        self._read.update(super().keys())
        return super().values()
