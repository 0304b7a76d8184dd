"""Where a model comes from: what its search took, the revision of the code, the machine."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import Engine

from tuner.model.manifest import Search
from tuner.study.joining import Study
from tuner.study.status import look

GIT_TIMEOUT_S = 10


def git_revision(file: Path) -> str | None:
    """Return the commit of the repository that a file is tracked in, with `+` if the file differs; None if in none."""
    revision = _git(file, "rev-parse", "HEAD")
    if not revision or _git(file, "ls-files", "--", file.name) in (None, ""):
        return None
    return revision if _git(file, "diff", "--no-ext-diff", "HEAD", "--", file.name) == "" else f"{revision}+"


def hardware(device: torch.device) -> dict[str, str]:
    """Return what the model was trained on: the processor, how many cores, and the GPU by its name if on one."""
    found = {"processor": platform.processor() or platform.machine(), "cores": str(os.cpu_count() or 0)}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def search_of(engine: Engine, study: Study) -> Search:
    """Return what the search took so far."""
    status = look(engine, study)
    return Search(trials=asdict(status.counts), device_s=asdict(status.cost))


def finite(value: float | None) -> float | None:
    """Return a value as JSON holds it: None for one that is NaN or infinite."""
    return value if value is not None and math.isfinite(value) else None


def as_json(value: Any) -> Any:
    """Return a value as JSON holds it: choices among params may be of any kind."""
    return json.loads(json.dumps(value, default=str))


def _git(file: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *arguments],
            cwd=file.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # there is no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None
