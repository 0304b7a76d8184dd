"""Programs: what torch can trace gives the model's outputs, and the rest is told with torch's reason and its place."""

import inspect
import io

import pytest
import torch
from torch import nn

from tuner.data import Split
from tuner.errors import FormatError
from tuner.formats.program import load_program, program_file

ROWS = Split(torch.randn(9, 4), torch.zeros(9))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)


class CountsRows(Base):
    def forward(self, x):
        rows = len(x)  # here
        return self.layer(x) + torch.zeros(rows, 4)


class CountsAsInt(Base):
    def forward(self, x):
        return self.layer(x).reshape(int(x.shape[0]), -1)  # here


class ComparesSizes(Base):
    def forward(self, x):
        return self.layer(x) if x.shape[0] > 3 else x  # here


class SplitsInTwo(Base):
    def forward(self, x):
        y = self.layer(x)
        return y.view(-1, 2, 4).sum(1).repeat(2, 1)  # here


class Branches(Base):
    def forward(self, x):
        if x.sum() > 0:  # here
            return self.layer(x)
        return -x


class LeavesTorch(Base):
    def forward(self, x):
        return self.layer(torch.tensor(x.detach().numpy()))  # here


class Raises(Base):
    def forward(self, x):
        if torch.compiler.is_compiling():
            raise ValueError("not while it is traced")  # here
        return self.layer(x)


REASONS = {
    CountsRows: "Constraints violated (batch)! You marked batch as dynamic but your code specialized it to be a const",
    CountsAsInt: "specialized it to be a constant (4)",
    ComparesSizes: "Not all values of batch",
    SplitsInTwo: "Not all values of batch",
    Branches: "Could not guard on data-dependent expression",
    LeavesTorch: ".numpy() is not supported",
    Raises: "ValueError: not while it is traced",
}


@pytest.mark.parametrize("kind", list(REASONS), ids=lambda kind: kind.__name__)
def test_what_torch_cannot_trace_is_told_in_one_line_with_reason_and_place(kind, capfd):
    with pytest.raises(FormatError) as caught:
        program_file(kind().eval(), ROWS)
    lines, first = inspect.getsourcelines(kind.forward)
    line = first + next(number for number, text in enumerate(lines) if text.rstrip().endswith("# here"))
    told = str(caught.value)
    assert REASONS[kind] in told
    assert told.endswith(f"({__file__}, line {line})")
    for noise in ("\n", "TORCH_LOGS", "draft_export", "Suggested fixes", "For more"):
        assert noise not in told
    assert capfd.readouterr() == ("", "")


def test_a_model_that_is_random_in_evaluation_is_told():
    class Random(Base):
        def forward(self, x):
            return self.layer(x) + torch.rand(())

    with pytest.raises(FormatError, match=r"the model gives other outputs for the same rows each time"):
        program_file(Random().eval(), ROWS)


def test_a_program_that_gives_other_outputs_is_told():
    class Counted(Base):
        n = 0

        def forward(self, x):
            if torch.compiler.is_compiling():
                return self.layer(x) + 1
            return self.layer(x)

    with pytest.raises(FormatError, match=r"model.pt2 needs to give the model's outputs, got a difference of 1:"):
        program_file(Counted().eval(), ROWS)


@pytest.mark.parametrize("how", ["whole", "part", "in place", "forward", "own forward"])
def test_a_model_that_was_compiled_is_traced(how):
    from tuner.training.compiled import uncompiled

    class Forward(Base):
        @torch.compile(backend="eager")
        def forward(self, x):
            return self.layer(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    if how == "whole":
        model = torch.compile(model, backend="eager")
    elif how == "part":
        model[0] = torch.compile(model[0], backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "own forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model = Forward()
    model.eval()
    with torch.no_grad():
        wanted = model(ROWS.inputs)
    program = load_program(io.BytesIO(program_file(uncompiled(model), ROWS)))
    torch.testing.assert_close(program(ROWS.inputs), wanted)
    assert not [name for name, _ in program.named_parameters() if "_orig_mod" in name]


class PartWithoutGradients(Base):
    def forward(self, x):
        with torch.no_grad():
            x = nn.functional.layer_norm(x, (4,)) + torch.linalg.cholesky(x.T @ x).sum()
        return self.layer(x)


@pytest.mark.parametrize("on", [True, False])
def test_a_call_that_fails_in_a_part_without_gradients_leaves_them_as_they_were(on):
    program = load_program(io.BytesIO(program_file(PartWithoutGradients().eval(), ROWS)))
    with torch.set_grad_enabled(on):
        with pytest.raises(torch.linalg.LinAlgError):
            program(torch.zeros(2, 4))
        assert torch.is_grad_enabled() == on
        assert program(ROWS.inputs).requires_grad == on
        again = torch.export.export(program, (ROWS.inputs,), strict=False).module()
        assert again(ROWS.inputs).requires_grad == on
        assert torch.is_grad_enabled() == on


def test_outputs_that_are_nan_are_no_difference():
    class Undefined(Base):
        def forward(self, x):
            return self.layer(x) * torch.tensor([1, float("nan"), 1, 1])

    assert program_file(Undefined().eval(), ROWS)
