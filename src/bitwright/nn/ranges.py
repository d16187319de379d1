"""How a quantizer's range moves in training: fixed, learned by gradient, following the data, or both in turn.

A plan names a rule per site in ``[ranges]``; see `RULES`. Calibration always sets the start.

======== ============================================ ==========================================================
rule     a training forward                           the optimizer
======== ============================================ ==========================================================
fixed    does nothing                                 does nothing
lsq      does nothing                                 moves the scale (LSQ, Esser 2020)
lsq+     does nothing                                 moves scale and offset (LSQ+, Bhalgat 2020)
pact     does nothing                                 moves the upper end (PACT, Choi 2018); see `RangeRule.decays`
ema      sets the range to the mean of batch extremes does nothing
adarange keeps the mean of extremes and samples       as lsq+ while in mode LEARN; see `nn.adarange`
======== ============================================ ==========================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from bitwright.nn.adarange import AdaRange
from bitwright.nn.tracker import Tracker
from bitwright.numerics.ste import Rule
from bitwright.plan.rules import parse_rule


@dataclass(frozen=True, slots=True)
class RangeRule:
    """One rule: the gradient its range gets (``none``: no gradient) and what follows the data in training."""

    name: str
    gradient: Rule = "none"
    tracker: Callable[[], Tracker] | None = None

    @property
    def learns(self) -> bool:
        """Whether the range is trained by gradient in the joint phase."""
        return self.gradient != "none"

    @property
    def learns_offset(self) -> bool:
        """Whether an asymmetric range learns its offset too."""
        return self.gradient == "lsq+"

    @property
    def decays(self) -> bool:
        """Whether the optimizer's weight decay belongs on the range: PACT's L2 penalty on its upper end.

        The upper end is ``qmax * s`` and a step on s is ``1 / qmax`` of a step on it (`Quantizer.learning`), so the
        same decay on s is that decay on the end. All other rules have none.
        """
        return self.gradient == "pact"

    @property
    def tracks(self) -> bool:
        """Whether training forwards take note of the data."""
        return self.tracker is not None


RULES: dict[str, RangeRule] = {
    rule.name: rule
    for rule in (
        RangeRule("fixed"),
        RangeRule("lsq", "lsq"),
        RangeRule("lsq+", "lsq+"),
        RangeRule("pact", "pact"),
        RangeRule("ema", tracker=Tracker),
        RangeRule("adarange", "lsq+", AdaRange),
    )
}


def get_rule(text: str) -> RangeRule:
    """The rule spelled ``text``; raises `SpecError` that lists the known ones.

    >>> get_rule("lsq").learns, get_rule("ema:0.9").tracks
    (True, True)
    """
    name, decay = parse_rule(text)
    rule = RULES[name]
    return rule if decay is None else replace(rule, tracker=partial(Tracker, decay))
