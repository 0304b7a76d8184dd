"""Whether a worker could work on this machine: a process of its own, started on it by an engine's own means.

In comes JSON on stdin, and the database from the variables that `tuner worker` has it from. Out go an exit code as
that of `tuner worker`, and a line on stderr if it is not 0.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from storage import open_engine
from storage.database.errors import StorageError
from tuner.errors import TunerError
from tuner.exits import ExitCode, exit_code
from tuner.study.joining import check_code, open_study
from tuner.study.registry import find_objective


def check(request: Mapping[str, Any], storage: str) -> None:
    """Raise TunerError or StorageError if the database, the study or its objective cannot be had from here."""
    engine = open_engine(storage)
    study = open_study(engine, request["study"])
    source = find_objective(request["objective"] or study.spec.objective.name)
    check_code(study, source, allow_code_change=request["allow_code_change"])


def main() -> int:
    """Check this machine, and return the exit code."""
    try:
        check(json.load(sys.stdin), os.environ["TUNER_STORAGE"])
    except (TunerError, StorageError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return exit_code(error)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
