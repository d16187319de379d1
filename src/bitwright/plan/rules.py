"""The spelling of range rules: how ranges may move in training. `nn.ranges` implements them."""

from __future__ import annotations

from bitwright.errors import SpecError

RANGE_RULES = ("fixed", "lsq", "lsq+", "pact", "ema", "adarange")


def parse_rule(text: str) -> tuple[str, float | None]:
    """Name of a rule, and the decay that ``ema:0.99`` spells; raises `SpecError` for what is neither.

    >>> parse_rule("lsq"), parse_rule("ema:0.9")
    (('lsq', None), ('ema', 0.9))
    """
    name, colon, number = text.partition(":")
    if name not in RANGE_RULES:
        raise SpecError(f"unknown range rule {text!r}; known rules: {', '.join(RANGE_RULES)}")
    if not colon:
        return name, None
    if name != "ema":
        raise SpecError(f"range rule {text!r}: only ema takes a number, its decay; write {name}")
    try:
        decay = float(number)
    except ValueError:
        decay = -1.0
    if not 0 < decay < 1:
        raise SpecError(f"range rule {text!r}: the decay lies between 0 and 1; write e.g. ema:0.99")
    return name, decay
