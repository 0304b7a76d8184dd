"""What a plain function's model takes and gives, in whatever form: it is kept as a program of tensors."""

from __future__ import annotations

import io
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.errors import TunerError
from tuner.formats.program import load_program
from tuner.slot.kept_model import Unpacked, packed, take, unpacked
from tuner.slot.plain_model import plain_outputs

IDS = torch.arange(12).reshape(3, 4)
MASK = torch.ones(3, 4, dtype=torch.bool)
Pair = namedtuple("Pair", "logits hidden")


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None


class Named(OrderedDict):
    """As the outputs of transformers are: a dict, whose entries are attributes too."""


@dataclass
class Batch:
    ids: Tensor


class Cache:
    """As what generates text keeps of the steps before."""


class Tagger(nn.Module):
    """A model of a few words, called by name or in order, which gives what `form` makes of its outputs."""

    def __init__(self, form: Any = lambda logits, hidden: Output(logits)) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 4)
        self.head = nn.Linear(4, 2)
        self.form = form

    def forward(self, ids: Tensor, mask: Tensor | None = None, kinds: Tensor | None = None, **more: Any) -> Any:
        hidden = self.words(ids)
        if mask is not None:
            hidden = hidden * (mask & (ids > 1) | ~(mask ^ (ids > 3)))[..., None]
        return self.form(self.head(hidden.mean(1)), hidden)


class Whole(nn.Module):
    """A model whose forward takes all of a batch as one argument."""

    def __init__(self, ids: Any, mask: Any) -> None:
        super().__init__()
        self.tagger = Tagger()
        self.ids, self.mask = ids, mask

    def forward(self, batch: Any) -> Output:
        return self.tagger(batch[self.ids], batch[self.mask])


def kept(model: nn.Module, inputs: Any) -> Unpacked:
    """What is read back of a model that was kept, whose program gives on other rows what the model gives there."""
    found = unpacked(packed(take(model, inputs)))
    assert found.missing == {}
    assert found.program is not None
    wanted = model.state_dict()
    assert found.weights.keys() == wanted.keys()
    assert all(torch.equal(its, wanted[name]) for name, its in found.weights.items())
    return found


def called(found: Unpacked, rows: Any) -> Any:
    program = load_program(io.BytesIO(found.program or b""), "model.pt2")
    return program(**rows) if isinstance(rows, dict) else program(*rows) if isinstance(rows, tuple) else program(rows)


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (lambda logits, hidden: Output(logits), ["logits"]),
        (lambda logits, hidden: Output(logits, hidden=(hidden, hidden + 1)), ["logits", "hidden.0", "hidden.1"]),
        (lambda logits, hidden: Named(logits=logits, past=Cache()), ["logits"]),
        (
            lambda logits, hidden: {"logits": logits, "more": {"hidden": hidden, "none": None}},
            ["logits", "more.hidden"],
        ),
        (lambda logits, hidden: Pair(logits, hidden), ["logits", "hidden"]),
        (lambda logits, hidden: (logits, None, [hidden]), [0, 1]),
        (lambda logits, hidden: [logits], [0]),
        (lambda logits, hidden: torch.topk(logits, 2), [0, 1]),
    ],
)
def test_outputs_of_any_form_are_tensors_by_name_or_in_order(form: Any, names: list[str | int]) -> None:
    logits, hidden = torch.zeros(3, 2), torch.ones(3, 4, 4)
    found = plain_outputs(form(logits, hidden))
    assert (list(found) if isinstance(found, dict) else [*range(len(found))]) == names
    assert all(isinstance(found[name], Tensor) for name in names)


@pytest.mark.parametrize("place", ["hidden.1", 1])
def test_a_program_gives_them_in_that_form(place: str | int) -> None:
    model = Tagger(lambda logits, hidden: Output(logits, hidden=(hidden, hidden + 1)))
    if place == 1:
        model.form = lambda logits, hidden: (logits, None, [hidden])
    found = kept(model, {"ids": IDS, "mask": MASK, "kinds": None})
    assert [*found.inputs] == ["ids", "mask"], "None is as if it were not given"
    outputs: Any = found.outputs
    again = called(found, {"ids": IDS[:1], "mask": MASK[:1]})
    assert torch.allclose(again[place], outputs[place][:1], atol=1e-6)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Tagger(), (IDS, MASK)),
        (Tagger(), UserDict(ids=IDS, mask=MASK)),
        (Whole("ids", "mask"), {"ids": IDS, "mask": MASK}),
        (Whole(0, 1), (IDS, MASK)),
    ],
)
def test_inputs_are_given_as_the_models_forward_takes_them(model: nn.Module, inputs: Any) -> None:
    found = kept(model, inputs)
    assert list(found.outputs) == ["logits"]
    assert torch.allclose(called(found, found.inputs)["logits"], found.outputs["logits"], atol=1e-6)  # type: ignore[call-overload,index]


@pytest.mark.parametrize(
    ("form", "inputs", "told"),
    [
        (None, {"ids": [1, 2]}, "got list: torch.from_numpy makes one of an array, torch.tensor of a list"),
        (None, Batch(IDS), r"got Batch: vars\(\) makes a dict of it"),
        (None, (IDS, None), "got NoneType: give those that the model needs by their names, in a dict"),
        (None, {1: IDS}, "needs example_inputs by the names of forward's arguments, got 1"),
        (None, {"ids": IDS, "bag": IDS.sum()}, "as many in each"),
        (lambda logits, hidden: Output(logits, logits.sum()), IDS, "got 'loss' that is a single number; where it is a"),
        (lambda logits, hidden: (logits, logits.sum()), IDS, "got one that is a single number"),
        (lambda logits, hidden: (logits, hidden.mean(0)), IDS, r"for each of 3 rows, got shape \[4, 4\]"),
        (lambda logits, hidden: Output(None), IDS, "needs a model that gives a tensor, got none"),
        (lambda logits, hidden: Cache(), IDS, "got Cache: wrap it in a module whose forward returns its logits"),
    ],
)
def test_what_has_no_rows_is_refused_by_what_it_is(form: Any, inputs: Any, told: str) -> None:
    model = Tagger() if form is None else Tagger(form)
    with pytest.raises(TunerError, match=told):
        take(model, inputs)
