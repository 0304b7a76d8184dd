"""A disk that is full."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from storage.files import new_file

if TYPE_CHECKING:
    import pytest


def fill_disk(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Let a module's new files be made, and nothing be written to them: that goes to a device without room."""

    def new_full_file(*arguments: Any, **named: Any) -> int:
        os.close(new_file(*arguments, **named))
        return os.open("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(f"{module}.new_file", new_full_file)
