"""How a quantizer's range moves in training: fixed, learned by gradient, or following the data.

A plan names a rule per site in ``[ranges]``; see `RULES`. Calibration always sets the start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from bitwright.errors import SpecError
from bitwright.numerics.ste import Rule

if TYPE_CHECKING:
    from bitwright.nn.quantizer import Quantizer


def _stay(quantizer: Quantizer, x: Tensor) -> None:
    """The range of a rule that follows nothing."""


@dataclass(frozen=True, slots=True)
class RangeRule:
    """One rule: the gradient its range gets (``none``: no gradient) and what a training forward does to the range."""

    name: str
    gradient: Rule = "none"
    track: Callable[[Quantizer, Tensor], None] = _stay

    @property
    def learns(self) -> bool:
        """Whether the range is trained by gradient in the joint phase."""
        return self.gradient != "none"

    @property
    def learns_offset(self) -> bool:
        """Whether an asymmetric range learns its offset too."""
        return self.gradient == "lsq+"

    @property
    def tracks(self) -> bool:
        """Whether training forwards move the range."""
        return self.track is not _stay


RULES: dict[str, RangeRule] = {
    rule.name: rule
    for rule in (
        RangeRule("fixed"),
        RangeRule("lsq", "lsq"),
        RangeRule("lsq+", "lsq+"),
        RangeRule("pact", "pact"),
    )
}


def get_rule(name: str) -> RangeRule:
    """The rule called ``name``; raises `SpecError` that lists the known ones.

    >>> get_rule("lsq").learns, get_rule("fixed").learns
    (True, False)
    """
    if name not in RULES:
        raise SpecError(f"unknown range rule {name!r}; known rules: {', '.join(RULES)}")
    return RULES[name]
