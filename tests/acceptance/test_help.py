"""`--help` on a terminal of 80 columns: what is together in which panel."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from command import Tuner

EVERY_COMMAND = ["--storage", "--storage-password-file", "--data-dir", "--log-format", "--debug"]
OF_A_STUDY = {
    "Study": ["--study", "--set", "--sampler", "--pruner", "--audit", "--direction", "--seed", "--from"],
    "Budget": ["--trials", "--timeout", "--max-failures", "--trial-timeout", "--watchdog", "--epochs", "--patience"],
    "Training": [
        *("--precision", "--compile", "--compile-mode", "--compile-backend"),
        *("--cuda-graphs", "--deterministic", "--train-metrics"),
    ],
    "Data": ["--data", "--readers", "--prefetch", "--checkpoints", "--checkpoint-every"],
}


def panels(tuner: Tuner, *command: str) -> dict[str, list[str]]:
    """The panels that the command's help shows, in order, and the options, arguments or commands in each."""
    done = tuner(*command, "--help", COLUMNS="80", TERMINAL_WIDTH="80")
    assert (done.code, done.stderr) == (0, "")
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        assert len(line) <= 80
        assert "…" not in line, "the name of an option, or what it takes, is cut off"
        if panel := re.match(r"╭─ (.+?) ─+╮", line):
            found[panel[1]] = []
        elif entry := re.match(r"│ (?:\*    )?(-?-?\w[\w-]*) ", line):
            found[list(found)[-1]].append(entry[1])
    return found


def test_commands_are_grouped_by_what_they_are_for(tuner: Tuner) -> None:
    found = panels(tuner)
    assert list(found)[2:] == ["Search", "Watch", "Results", "Operate"]
    assert found == {
        "Options": ["--version", "--install-completion", "--show-completion", "--help"],
        "Options of every command": EVERY_COMMAND,
        "Search": ["run", "create", "worker", "enqueue", "cancel", "extend", "adopt", "objectives"],
        "Watch": ["status", "studies", "show", "trials", "compare", "dashboard"],
        "Results": ["best", "report", "importance", "replay", "confirm", "export", "verify", "predict"],
        "Operate": ["pause", "resume", "stop", "release", "delete", "clean", "import", "doctor", "launch", "db"],
    }


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (
            "run",
            {
                "Arguments": ["OBJECTIVE"],
                "Options": ["--help"],
                **OF_A_STUDY,
                "Workers": [
                    "--workers",
                    "--device",
                    "--threads",
                    "--allow-code-change",
                    "--no-preflight",
                    "--allow-leak",
                    "--tensorboard",
                ],
                "Result": ["--confirm", "--export", "--output", "--full-schedule", "--json"],
            },
        ),
        ("create", {"Arguments": ["OBJECTIVE"], "Options": ["--json", "--help"], **OF_A_STUDY}),
        (
            "worker",
            {
                "Arguments": ["STUDY"],
                "Options": ["--help"],
                "Workers": [
                    "--slots",
                    "--device",
                    "--device-share",
                    "--threads",
                    "--objective",
                    "--allow-code-change",
                    "--no-preflight",
                    "--allow-leak",
                    "--tensorboard",
                ],
                "Limits": ["--trials", "--timeout", "--idle-exit", "--check"],
            },
        ),
    ],
)
def test_options_are_grouped_by_what_they_are_of(tuner: Tuner, command: str, wanted: dict[str, list[str]]) -> None:
    found = panels(tuner, command)
    assert found == {**wanted, "Options of every command": EVERY_COMMAND}
    assert list(found) == [*wanted, "Options of every command"]
