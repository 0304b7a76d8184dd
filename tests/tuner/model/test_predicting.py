"""What a model's outputs mean, by the kind of each target: names, probabilities, numbers, and what is refused."""

import numpy as np
import pytest
import torch
from manifests import a_manifest, an_output
from torch import tensor

from tuner.errors import TunerError, UsageError
from tuner.model.predicting import predictions, probabilities, top_k

THREE = ("ant", "bee", "cat")
LOGITS = tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 0.0]])


def _of(*shape, classes=THREE, **known):
    return a_manifest(outputs=[an_output(*shape, **known)], class_names=classes)


def test_one_of_several_classes_is_named_and_its_probabilities_are_the_softmax():
    manifest = _of(3, kind="classes", values="logits")
    assert predictions(LOGITS, manifest).tolist() == ["bee", "ant"]
    found = probabilities(LOGITS, manifest)
    np.testing.assert_allclose(found, LOGITS.double().softmax(1))
    assert found.dtype == np.float64
    first, second = top_k(LOGITS, manifest, 2)
    assert [name for name, _ in first] == ["bee", "cat"]
    assert second[0] == ("ant", found[1, 0])
    assert [len(row) for row in top_k(LOGITS, manifest, 9)] == [3, 3]  # all there are
    with pytest.raises(UsageError, match="at least 1, got 0"):
        top_k(LOGITS, manifest, 0)


def test_outputs_that_are_probabilities_stay_as_they_are():
    shares = tensor([[0.2, 0.5, 0.3]])
    np.testing.assert_allclose(probabilities(shares, _of(3, kind="classes", values="probabilities")), shares)
    binary = _of(kind="binary", values="probabilities", classes=("no", "yes"))
    np.testing.assert_allclose(probabilities(tensor([0.2, 0.9]), binary), [[0.8, 0.2], [0.1, 0.9]], atol=1e-6)
    assert predictions(tensor([0.2, 0.9]), binary).tolist() == ["no", "yes"]


@pytest.mark.parametrize("logits", [tensor([-1.0, 0.0, 3.0]), tensor([[-1.0], [0.0], [3.0]])])
def test_a_single_output_is_of_the_second_of_two_classes(logits):
    manifest = _of(kind="binary", values="logits", classes=("no", "yes"))
    assert predictions(logits, manifest).tolist() == ["no", "no", "yes"]  # 0.5 is not above 0.5, as for the metric
    assert probabilities(logits, manifest).shape == (3, 2)
    assert top_k(logits, manifest, 1)[2] == [("yes", pytest.approx(0.952574, abs=1e-6))]
    assert predictions(logits, _of(kind="binary", classes=("yes",))).tolist() == ["not yes", "not yes", "yes"]


def test_several_classes_a_row_are_those_above_a_half():
    manifest = _of(3, kind="multilabel", values="logits")
    assert predictions(tensor([[1.0, -1.0, 2.0], [-1.0, -1.0, -1.0]]), manifest) == [("ant", "cat"), ()]
    np.testing.assert_allclose(probabilities(tensor([[0.0, 100.0, -100.0]]), manifest), [[0.5, 1.0, 0.0]], atol=1e-6)


def test_classes_that_the_model_has_decided_on_itself_are_named():
    manifest = _of(3, kind="multilabel")
    chosen = tensor([[True, False, True], [False, False, False]])
    assert predictions(chosen, manifest) == [("ant", "cat"), ()]
    assert predictions(tensor([True, False]), _of(kind="binary", classes=("no", "yes"))).tolist() == ["yes", "no"]
    with pytest.raises(TunerError, match="has no probabilities"):
        top_k(chosen, manifest, 1)


def test_numbers_stay_numbers_and_have_no_probabilities():
    manifest = a_manifest(outputs=[an_output(1, kind="number")])
    found = predictions(tensor([[1.5], [2.5]]), manifest)
    assert (found.tolist(), found.shape) == ([1.5, 2.5], (2,))
    assert predictions(tensor([1.5], dtype=torch.bfloat16), manifest).tolist() == [1.5]
    for function in (probabilities, lambda *given: top_k(*given, 1)):
        with pytest.raises(TunerError, match=r"this model has no probabilities: .* numbers"):
            function(tensor([[1.5]]), manifest)


def test_several_targets_are_told_by_name_and_those_of_numbers_have_no_probabilities():
    outputs = {"kind": LOGITS, "even": tensor([3.0, -3.0]), "age": tensor([1.0, 2.0])}
    manifest = a_manifest(
        outputs=[
            an_output(3, name="kind", kind="classes"),
            an_output(name="even", kind="binary"),
            an_output(name="age", kind="number"),
        ],
        class_names={"kind": THREE, "even": ("odd", "even")},
    )
    found = predictions(outputs, manifest)
    assert {name: its.tolist() for name, its in found.items()} == {
        "kind": ["bee", "ant"],
        "even": ["even", "odd"],
        "age": [1.0, 2.0],
    }
    assert list(probabilities(outputs, manifest)) == list(top_k(outputs, manifest, 1)) == ["kind", "even"]
    # By their places where they have no names.
    in_order = a_manifest(outputs=[an_output(3), an_output()], class_names={"0": THREE, "1": ("odd", "even")})
    assert list(predictions((LOGITS, tensor([3.0, -3.0])), in_order)) == ["0", "1"]


def test_the_classes_of_each_pixel_are_named():
    manifest = _of(3, 1, 2, kind="classes")
    logits = torch.stack([LOGITS, LOGITS.flip(1)], dim=2)[:, :, None]
    assert predictions(logits, manifest).tolist() == [[["bee", "bee"]], [["ant", "cat"]]]
    assert probabilities(logits, manifest).shape == (2, 3, 1, 2)
    with pytest.raises(TunerError, match="classes for each place of a row"):
        top_k(logits, manifest, 1)


def test_numbers_of_classes_are_named():
    assert predictions(tensor([2, 0]), _of(kind="classes")).tolist() == ["cat", "ant"]
    with pytest.raises(TunerError, match="gives the numbers of classes"):
        probabilities(tensor([2, 0]), _of(kind="classes"))
    with pytest.raises(TunerError, match="has 3 classes, got the number 3"):
        predictions(tensor([3, 0]), _of(kind="classes"))


def test_an_older_export_without_kinds_is_taken_by_its_shapes():
    older = a_manifest(class_names=THREE)
    assert predictions(LOGITS, older).tolist() == ["bee", "ant"]
    assert predictions(tensor([3.0]), a_manifest(class_names=("no", "yes"))).tolist() == ["yes"]
    assert predictions(tensor([3.0]), a_manifest()).tolist() == [3.0]


def test_what_is_no_number_is_told_with_its_row():
    with pytest.raises(TunerError, match="NaN or infinity, in row 1"):
        predictions(tensor([[0.0, 1.0, 2.0], [0.0, float("nan"), 0.0]]), _of(3, kind="classes"))
    for manifest in (_of(2, kind="classes"), _of(2, kind="multilabel"), a_manifest(class_names=THREE)):
        with pytest.raises(TunerError, match="an output for each, got shape"):
            predictions(tensor([[0.0, 1.0]]), manifest)
