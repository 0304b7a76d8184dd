"""`tuner confirm` before anything runs, and how it shows what came of it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
from exporting import Exporting, code

from tuner.cli.confirming import Runs, confirm_here, confirmation_fields, confirmation_lines, runs_of
from tuner.cli.settings import Settings
from tuner.errors import TunerError, UsageError
from tuner.study.confirmation import Candidate, Confirmation
from tuner.study.confirming import find_companion
from tuner.study.registry import find_objective
from tuner.worker.processes import Slots

if TYPE_CHECKING:
    from pathlib import Path


def test_params_that_the_code_here_does_not_suggest_are_told_before_anything_is_created(
    database: str, tmp_path: Path
) -> None:
    made = Exporting(database, tmp_path).start(code())
    later = tmp_path / "later.py"
    later.write_text(code().replace('"lr"', '"rate"'))
    reference = f"{later}:Signs"
    arguments = (Settings(), made.engine, made.study, find_objective(reference), Runs(top=3, seeds=5))
    start = partial(Slots, [], reference, "worker", tmp_path, imports_here=True)
    with pytest.raises(TunerError, match=r"trial 1 of study 'signs' cannot be run again by .* suggest its lr"):
        confirm_here(*arguments, start, allow_code_change=True)
    assert find_companion(made.engine, made.study) is None
    made.engine.dispose()


def test_what_cannot_be_meant_is_refused() -> None:
    assert (runs_of(None), runs_of("3x5")) == (None, Runs(top=3, seeds=5))
    for text, message in (
        ("3", "as 3x5, got '3'"),
        ("3x5x2", "as 3x5, got '3x5x2'"),
        ("0x5", "--confirm needs 1 trial or more, got 0"),
        ("3x1", "--confirm needs 2 seeds or more, as one has no spread, got 1"),
        ("101x10", "at most 1000 runs are made, got 101 x 10"),
    ):
        with pytest.raises(UsageError) as caught:
            runs_of(text)
        assert message in str(caught.value)


def test_it_is_shown_as_a_table_with_sentences_and_as_json() -> None:
    first = Candidate(number=4, searched=0.9, params={"lr": 0.5}, parameters=12_000, values=(0.8, 0.9), failed={})
    second = Candidate(number=7, searched=0.8, params={"lr": 0.25}, values=(0.5, 0.5), failed={"oom": 1})
    found = Confirmation(
        study="s",
        name="s/confirm",
        direction="maximize",
        metric="accuracy",
        seed=0,
        candidates=[second, first],
        search_best=4,
        search_value=0.9,
        n_complete=9,
    )
    lines = list(confirmation_lines(found))
    assert [line.split() for line in lines[:3]] == [
        ["trial", "in", "the", "search", "mean", "spread", "runs", "parameters", "params"],
        ["4", "0.9", "0.85", "0.071", "2", "12,000", "lr=0.5"],
        ["7", "0.8", "0.5", "0", "2", "-", "lr=0.25"],
    ]
    assert lines[3:] == list(found.sentences())
    fields = confirmation_fields(found)
    assert (fields["choice"], fields["alike"], fields["runs"], fields["regression"]) == (4, [4], 5, pytest.approx(0.05))
    assert [trial["gap"] and trial["gap"]["value"] for trial in fields["trials"]] == [None, pytest.approx(0.35)]
    assert fields["trials"][1]["failed"] == {"oom": 1}
