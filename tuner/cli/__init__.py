"""The command line. Each command parses, calls one function and prints what it gave."""

from __future__ import annotations

from tuner.cli.app import main

__all__ = ["main"]
