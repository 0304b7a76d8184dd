"""Weights as safetensors: what is held comes back bit by bit, what is not held is told by name."""

import pytest
import torch
from safetensors.torch import load
from torch import nn

from tuner.formats.weights import differing, weights_file
from tuner.training.compiled import load_state, state_of, uncompiled


class Odd(nn.Module):
    """A state of all kinds."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.tied = self.linear
        self.register_buffer("limits", torch.tensor([float("nan"), float("inf"), -0.0]))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("phases", torch.ones(2, dtype=torch.complex64).conj())
        self.register_buffer("fine", torch.ones(2, dtype=torch.complex128))
        self.register_buffer("thin", torch.eye(2).to_sparse())
        self.lazy = nn.LazyLinear(2)

    def get_extra_state(self):
        return {"vocabulary": ["a", "b"]}

    def set_extra_state(self, state):
        pass


def test_what_safetensors_holds_comes_back_and_the_rest_is_told():
    model = Odd()
    data, left_out = weights_file(model)
    assert differing(data, model) is None
    assert left_out == {
        "fine": "safetensors holds no complex128",
        "thin": "safetensors holds no torch.sparse_coo tensors",
        "lazy.weight": "it has no values",
        "lazy.bias": "it has no values",
        "_extra_state": "it is dict and no tensor",
    }
    assert set(load(data)) == set(model.state_dict()) - set(left_out)


@pytest.mark.parametrize("name", ["linear.weight", "limits", "steps", "phases"])
def test_a_tensor_that_is_another_is_found(name):
    model = Odd()
    data, _ = weights_file(model)
    with torch.no_grad():
        model.state_dict()[name].view(-1)[-1] = 7
    assert differing(data, model) == name


def _compiled(whole, part):
    torch.manual_seed(0)
    first = nn.Linear(3, 4)
    first = torch.compile(first, backend="eager") if part else first
    model = nn.Sequential(first, nn.BatchNorm1d(4), nn.Linear(4, 2))
    return torch.compile(model, backend="eager") if whole else model


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("part", [True, False])
def test_a_compiled_models_state_is_that_of_the_model(whole, part):
    plain = _compiled(False, False)
    state = state_of(_compiled(whole, part))
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    other = _compiled(whole, part)
    nn.init.zeros_(plain[2].weight)
    load_state(other, plain.state_dict())
    assert not other.state_dict()[next(name for name in other.state_dict() if name.endswith("2.weight"))].any()
    assert list(uncompiled(other).state_dict()) == list(plain.state_dict())


def test_a_state_of_another_model_is_refused():
    with pytest.raises(RuntimeError, match="Missing key"):
        load_state(_compiled(True, True), {"0.weight": torch.zeros(4, 3)})
