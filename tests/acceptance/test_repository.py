"""What GitHub reads of this repository: the workflow that checks it, and the form for telling of a bug."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuner.cli.app import make_app

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github/workflows/ci.yml"
FORM = ROOT / ".github/ISSUE_TEMPLATE/bug.yml"


def steps() -> list[dict[str, Any]]:
    [job] = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    return job["steps"]


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("vendor.github-workflows", WORKFLOW),
        ("custom.github-workflows-require-timeout", WORKFLOW),
        ("vendor.github-issue-forms", FORM),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_file_follows_its_schema(schema: str, path: Path) -> None:
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    done = subprocess.run([*checker, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_workflow_runs_what_anybody_can_run() -> None:
    commands = [step["run"] for step in steps() if "run" in step]
    assert commands[-1] == ".ci/run"
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_workflow_takes_the_oldest_python_that_is_allowed() -> None:
    [setup] = [step for step in steps() if step.get("uses", "").startswith("actions/setup-python@")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={setup['with']['python-version']}"


def test_the_workflow_may_only_read() -> None:
    assert yaml.safe_load(WORKFLOW.read_text())["permissions"] == {"contents": "read"}
    [checkout] = [step for step in steps() if step.get("uses", "").startswith("actions/checkout@")]
    assert checkout["with"] == {"persist-credentials": False}


def test_the_form_asks_for_commands_that_there_are() -> None:
    known = {command.name for command in make_app().registered_commands}
    asked = set(re.findall(r"`tuner (\w+)", FORM.read_text()))
    assert asked == {"doctor", "status"}
    assert asked <= known
