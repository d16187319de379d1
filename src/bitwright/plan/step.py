"""`Step`: one method of post-training quantization in a plan, with its options; and the table of those known.

Steps run inside `calibrate`, in three moments. Whatever order a plan lists them in, moments follow each other, and
inside a moment the plan's order holds:

======== ============================================== =============================================
moment   the model then                                 methods
======== ============================================== =============================================
float    computes in float: no range chosen yet         rescale channels so that ranges become easier
layer    simulates; layers are visited in the order     choose codes and biases of one layer at a time
         they run, inputs come from the quantized prefix
block    simulates; whole blocks are visited            choose codes and ranges of a block's layers
======== ============================================== =============================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from bitwright.errors import PlanError

Value = bool | int | float | str
Moment = Literal["float", "layer", "block"]


@dataclass(frozen=True, slots=True)
class Method:
    """A known method: its moment, and its options with their defaults."""

    moment: Moment
    options: Mapping[str, Value] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "smoothquant": Method("float", {"alpha": 0.5, "search": False}),
    "awq": Method("float", {"clip": True}),
    "rotate": Method("float", {"seed": 0}),
    "cle": Method("float"),
    "absorb_high_bias": Method("float", {"borders": False}),
    "bias_correction": Method("layer"),
    "analytic_bias_correction": Method("layer"),
    "bn_reestimation": Method("layer"),
    "affine_repair": Method("layer"),
    "ranges": Method("layer", {"by_output": False}),
    "gptq": Method("layer", {"damping": 0.01, "act_order": True, "match_float": True, "rescale": False}),
    "adaround": Method("layer", {"iterations": 1000, "batch": 32, "seed": 0}),
    "adaquant": Method("layer", {"iterations": 1000, "batch": 32, "seed": 0}),
    "brecq": Method("block", {"iterations": 1000, "batch": 32, "drop": 0.0, "seed": 0}),
}


@dataclass(frozen=True, slots=True)
class Step:
    """A method by name, and the options that differ from its defaults.

    Raises `PlanError` for an unknown name or option and for a value of another type.
    """

    name: str
    options: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", dict(self.options))
        if self.name not in METHODS:
            near = get_close_matches(self.name, METHODS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PlanError(f"unknown step {self.name!r}; known steps: {', '.join(METHODS)}{hint}")
        known = METHODS[self.name].options
        for key, value in self.options.items():
            if key not in known:
                raise PlanError(f"step {self.name} has no option {key!r}; it has {', '.join(known) or 'none'}")
            if not _fits(value, known[key]):
                expected = type(known[key]).__name__
                raise PlanError(f"step {self.name}: option {key} must be a {expected}, got {value!r}")

    @property
    def method(self) -> Method:
        """The entry of the step's method."""
        return METHODS[self.name]

    @property
    def settings(self) -> dict[str, Value]:
        """Every option of the method, with the values of this step."""
        return {**self.method.options, **self.options}


def as_step(value: Step | str | Mapping[str, Value]) -> Step:
    """A step from its name, or from a mapping with ``name`` and options, as in a plan file."""
    if isinstance(value, Step):
        return value
    if isinstance(value, str):
        return Step(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise PlanError(f"a step is a name or a table with a name, got {value!r}")
    return Step(str(value["name"]), {key: option for key, option in value.items() if key != "name"})


def _fits(value: Value, default: Value) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, (int, float)) if isinstance(default, float) else isinstance(value, type(default))
