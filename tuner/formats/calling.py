"""Models that are no modules of torch, called as the objective's model is: with tensors in order or by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tuner.data import Inputs, Tensors, tensors


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a model's inputs and outputs are called, in their order; None for one that has its place alone."""

    inputs: tuple[str | None, ...]
    outputs: tuple[str | None, ...]


def names_of(values: Tensors) -> tuple[str | None, ...]:
    """Return the names of inputs or outputs."""
    return tuple(values) if isinstance(values, dict) else (None,) * len(tensors(values))


def by_name(values: Sequence[Tensor], names: Sequence[str | None]) -> Inputs:
    """Return the tensors as a model takes or gives them: one, several in their order, or by their names."""
    named = {name: value for name, value in zip(names, values, strict=True) if name is not None}
    if named:
        return named
    return values[0] if len(values) == 1 else tuple(values)


def onnx_names(names: Names) -> Names:
    """Return what inputs and outputs are called in ONNX, where each has a name and none has another's."""
    taken: set[str] = set()
    found: list[tuple[str, ...]] = []
    for kind, its in (("input", names.inputs), ("output", names.outputs)):
        of_kind = []
        for number, wanted in enumerate(its):
            name = wanted or (kind if len(its) == 1 else f"{kind}_{number}")
            while name in taken:
                name += "_"
            taken.add(name)
            of_kind.append(name)
        found.append(tuple(of_kind))
    return Names(inputs=found[0], outputs=found[1])


class OnProcessor(nn.Module):
    """A model that another library computes, on the processor: outputs come back to where the inputs were."""

    def __init__(self, run: Callable[[list[Tensor]], Sequence[Tensor]], names: Names) -> None:
        super().__init__()
        self._run = run
        self._names = names

    def forward(self, *inputs: Tensor, **named: Tensor) -> Inputs:
        """Return the model's outputs for a batch. Raises TypeError unless the inputs are the model's."""
        wanted = self._names.inputs
        left = [name for name in wanted[len(inputs) :] if name is not None]
        if len(inputs) + len(named) != len(wanted) or set(left) != named.keys():
            shown = ", ".join(name or "a tensor" for name in wanted)
            raise TypeError(f"the model needs {shown}, got {', '.join(['a tensor'] * len(inputs) + list(named))}")
        values = [*inputs, *(named[name] for name in left)]
        found = self._run([value.detach().cpu().contiguous() for value in values])
        return by_name([value.to(values[0].device) for value in found], self._names.outputs)
