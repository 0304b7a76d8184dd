"""Inputs as somebody gives them: what is converted, and what is refused by what is wrong with it."""

import numpy as np
import pytest
import torch
from manifests import a_manifest, an_input

from tuner.errors import TunerError
from tuner.model.inputs import far_out, model_inputs

PAIR = a_manifest(an_input(2, name="x"), an_input(1, name="y", dtype="uint8"))


@pytest.mark.parametrize(
    "given",
    [
        [[1, 2, 3], [4, 5, 6]],
        np.array([[1, 2, 3], [4, 5, 6]], dtype=">f8"),
        np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint32),
        np.asfortranarray([[1.0, 2, 3], [4, 5, 6]]),
        np.array([[1, 2, 3, 0], [4, 5, 6, 0]], dtype=np.longdouble)[:, :3],
        torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int16),
        torch.tensor([[1.0, 2, 3], [4, 5, 6]], requires_grad=True),
    ],
)
def test_rows_of_any_type_of_numbers_become_those_of_the_manifest(given):
    found = model_inputs(given, a_manifest())
    assert (found.dtype, found.tolist(), found.requires_grad) == (torch.float32, [[1, 2, 3], [4, 5, 6]], False)


def test_what_is_only_read_is_not_written_to():
    given = np.ones((2, 3), dtype=np.float32)
    given.flags.writeable = False
    model_inputs(given, a_manifest())[0, 0] = 5
    assert given.max() == 1


def test_several_inputs_come_by_name_or_in_order():
    found = model_inputs({"y": [[255.0]], "x": [[1, 2]]}, PAIR)
    assert list(found) == ["x", "y"]
    assert found["y"].dtype == torch.uint8
    unnamed = a_manifest(an_input(2), an_input(1))
    assert [part.shape for part in model_inputs(([[1, 2]], [[3]]), unnamed)] == [(1, 2), (1, 1)]
    assert list(model_inputs([[1, 2, 3]], a_manifest(an_input(3, name="only")))) == ["only"]


@pytest.mark.parametrize(
    ("given", "manifest", "told"),
    [
        ([1.0, 2, 3], a_manifest(), r"needs the shape \(n, 3\), got \(3,\): x\[None\] makes a batch"),
        ([[1.0, 2]], a_manifest(), r"needs the shape \(n, 3\), got \(1, 2\): reshape it"),
        ([[1.0, 2, 3], [4]], a_manifest(), r"needs rows of the same shape, \[3\]"),
        (np.zeros((0, 3)), a_manifest(), "at least one row, got none"),
        ([["a", "b", "c"]], a_manifest(), "needs numbers of type float32, got <U1"),
        (np.array([[1, None, 3]]), a_manifest(), "needs numbers of type float32, got object"),
        ([[1j, 0, 0]], a_manifest(), "give real numbers"),
        ([[0, 0, 0], [0, float("nan"), 0]], a_manifest(), r"finite numbers, got nan in row 1, at \[1\]"),
        ([[0, 0, 1e300]], a_manifest(), r"numbers that float32 can hold, got 1e\+300 in row 0, at \[2\]"),
        ([[[0], [300]]], a_manifest(an_input(2, 1, dtype="uint8")), r"whole numbers from 0 to 255, got 300 .*\[1, 0\]"),
        ([0, 0.5], a_manifest(an_input(dtype="int64")), r"whole numbers from -9\d+ to 9\d+, got 0.5 in row 1$"),
        ([[0, 2]], a_manifest(an_input(2, dtype="bool")), "whole numbers from 0 to 1, got 2"),
        ([[1, 2]], PAIR, "a dict of its inputs, 'x', 'y', got list"),
        ({"x": [[1, 2]]}, PAIR, "a dict of its inputs, 'x', 'y', got those of 'x'"),
        ({"x": [[1, 2]], "y": [[1], [2]]}, PAIR, "the same number of rows, got 1, 2"),
        ({"x": [[1, 2, 3]]}, a_manifest(), "needs one array, as its input has no name, got a dict of 'x'"),
        ([[1, 2]], a_manifest(an_input(2), an_input(1)), "a tuple of 2 inputs in their order, got 1"),
    ],
)
def test_what_is_not_the_manifest_s_is_refused(given, manifest, told):
    with pytest.raises(TunerError, match=told):
        model_inputs(given, manifest)


def test_values_far_from_all_that_was_trained_on_are_told():
    manifest = a_manifest(an_input(3, seen=(0.0, 1.0)))
    assert far_out(torch.tensor([[0.0, 3.0, -2.0]]), manifest) is None
    told = far_out(torch.tensor([[0.0, 255.0, 12.0]]), manifest)
    assert "goes from 0 to 255, in the training split it went from 0 to 1" in told
    assert far_out(torch.tensor([[1e9, 0.0, 0.0]]), a_manifest()) is None  # an older export tells nothing
