"""What people hit between a search and its model, run as a user would: tests/inputs holds an input of each kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Finished, Tuner
from safetensors.torch import load_file

import tuner as package

INPUTS = Path(__file__).parents[1] / "inputs"


def _searched(tuner: Tuner, folder: str, name: str, *options: str) -> tuple[Finished, dict[str, Any]]:
    """Search a folder's objective and export its best; return how that ended, and the manifest."""
    reference = f"{INPUTS / folder / 'search.py'}:{name}"
    arguments = ("--trials", "1", "--workers", "1", "--seed", "3", "--device", "cpu", "--output", "model")
    found = tuner("run", reference, "--study", "it", *arguments, *options)
    assert found.code == 0, found.stderr
    manifest: dict[str, Any] = json.loads((tuner.directory / "model" / "manifest.json").read_text())
    return found, manifest


@pytest.mark.parametrize("by_hand", ["false", "true"])
def test_a_schedule_that_follows_the_metric_gives_in_the_retraining_what_it_gave_in_the_trial(
    tuner: Tuner, by_hand: str
) -> None:
    _, manifest = _searched(tuner, "02-plateau-max-retraining", "Plateau", "--set", f"by_hand={by_hand}")
    (trial,) = tuner("trials", "it", "--json").json()
    rates = [
        rate for point in tuner("trials", "it", "--number", "0", "--curve", "--json").json() for rate in point["rates"]
    ]
    assert len(rates) == 6
    assert rates[0] == trial["params"]["lr"]
    assert manifest["retraining"] == {"schedule": "replayed", "schedule_epochs": 6, "notes": []}
    assert manifest["epochs"] == trial["user_attrs"]["epoch"]


def test_a_model_that_its_objective_compiles_is_exported(tuner: Tuner) -> None:
    _, manifest = _searched(tuner, "04-compiled-in-build-model", "Compiled")
    assert manifest["missing"] == {}
    assert set(load_file(tuner.directory / "model" / "model.safetensors")) == {
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    }
    assert package.load_model(tuner.directory / "model")(torch.rand(5, 6)).shape == (5, 2)


def test_a_metric_that_is_no_number_on_test_is_null(tuner: Tuner) -> None:
    found, manifest = _searched(tuner, "05-nan-test-metric", "Rare")
    assert (manifest["test"]["share"], manifest["test"]["inverse"]) == (None, None)
    assert 0 <= manifest["test"]["accuracy"] <= 1
    shown = dict(line.rsplit(maxsplit=1) for line in found.stdout.splitlines() if line.startswith("test "))
    assert (shown["test share"], shown["test inverse"]) == ("-", "-")
    file = INPUTS / "05-nan-test-metric" / "search.py"
    again = tuner("export", "it", "--objective", f"{file}:Rare", "--output", "again", "--device", "cpu", "--json")
    assert (again.code, again.json()["test"]) == (0, manifest["test"])
    assert package.load_model(tuner.directory / "again").manifest.test == manifest["test"]


def test_a_model_without_a_program_is_exported_without_it(tuner: Tuner) -> None:
    found, manifest = _searched(tuner, "20-batch-size-by-len", "Sequences")
    file = INPUTS / "20-batch-size-by-len" / "search.py"
    reason = manifest["missing"]["model.pt2"]
    assert "your code specialized it to be a constant (4)" in reason
    assert reason.endswith(f"({file}, line 17)")
    assert reason in found.stdout
    said, ended = f"pre-flight: there would be no model.pt2: {reason}", "trial 0 complete"
    assert 0 < found.stderr.index(said) < found.stderr.index(ended)
    assert found.stderr.count("pre-flight") == 1
    assert set(manifest["files"]) == {"model.safetensors"}
    assert manifest["params"]["lr"] > 0
    with pytest.raises(package.TunerError, match=r"has no model\.pt2 that could be called"):
        package.load_model(tuner.directory / "model")


def test_what_no_trial_can_do_ends_the_search_before_the_first_and_leaves_no_study(tuner: Tuner) -> None:
    file = INPUTS / "20-batch-size-by-len" / "search.py"
    found = tuner("run", f"{file}:Broken", "--trials", "2", "--workers", "2", "--device", "cpu")
    line = 1 + file.read_text().splitlines().index("        return nn.functional.mse_loss(outputs, targets)")
    assert found.code == 1
    assert found.error().startswith("tuner: Broken cannot be searched as it is: training: RuntimeError: The size of")
    assert found.error().endswith(f"({file}, line {line}); --no-preflight tries anyway")
    assert "trial 0" not in found.stderr
    assert tuner("studies", "--json").json() == []
