"""One image, two questions: which digit it is, and whether it is even. The images are those of `digits`.

Shows several targets by name, each with a loss and a metric of its own: the digit is one of ten classes, evenness one
of two by a single output. How much evenness counts in the loss is searched; the study's metric is the mean of both
accuracies.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from objectives.digits import Digits
from tuner.data import Data, Split, tensors
from tuner.objective import Params

if TYPE_CHECKING:
    import optuna


DIGITS = tuple("0123456789")


class TwoQuestions(Digits):
    """Tell which digit an image shows and whether it is even; the mean of both accuracies is maximized."""

    def suggest(self, trial: optuna.Trial) -> None:
        super().suggest(trial)
        trial.suggest_float("weight_even", 0.05, 5.0, log=True)

    def load_data(self, root: Path) -> Data:
        digits = super().load_data(root)
        train, valid, test = (_with_both(split.rows(slice(None))) for _, split in digits.splits())
        return Data(train, valid, test, {"digit": DIGITS, "even": ("odd", "even")})

    def build_model(self, params: Params) -> nn.Module:
        return Model(super().build_model(params))


class Model(nn.Module):
    """What `Digits` has up to its last layer, with two of those side by side."""

    def __init__(self, of_digits: nn.Module) -> None:
        super().__init__()
        *hidden, digit = of_digits.children()
        assert isinstance(digit, nn.Linear)
        self.hidden = nn.Sequential(*hidden)
        self.digit = digit
        self.even = nn.Linear(digit.in_features, 1)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the logits of the digit (n, 10) and of its being even (n,), for `pixels` (n, 64)."""
        hidden = self.hidden(pixels)
        return {"digit": self.digit(hidden), "even": self.even(hidden).squeeze(1)}


def _with_both(rows: Split) -> Split:
    (digits,) = tensors(rows.targets)
    return Split(rows.inputs, {"digit": digits, "even": (digits % 2 == 0).float()})
