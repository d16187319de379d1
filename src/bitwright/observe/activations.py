"""Ends of the range of activation functions that are known before any data is seen.

Behind a GELU or SiLU the lower end is the function's minimum: a calibration needs to find the upper end only
(``mse:low=-0.169971``). Behind a softmax or tanh the whole range is known (``fixed:0,1``, ``fixed:-1,1``).
"""

from __future__ import annotations

from bitwright.errors import SpecError

# (smallest output, largest output, where the minimum is taken); None where there is no such thing
_RANGES: dict[str, tuple[float, float | None, float | None]] = {
    "relu": (0.0, None, None),
    "relu6": (0.0, 6.0, None),
    "gelu": (-0.16997120747990369, None, -0.7517915246935645),
    "gelu_tanh": (-0.1700407506, None, -0.752461),
    "silu": (-0.27846454276107380, None, -1.2784645427610738),
    "hardswish": (-0.375, None, -1.5),
    "mish": (-0.3088434130, None, -1.192431),
    "elu": (-1.0, None, None),
    "softplus": (0.0, None, None),
    "sigmoid": (0.0, 1.0, None),
    "hardsigmoid": (0.0, 1.0, None),
    "softmax": (0.0, 1.0, None),
    "tanh": (-1.0, 1.0, None),
    "hardtanh": (-1.0, 1.0, None),
}


def fixed_low(name: str) -> float:
    """Smallest value that an activation function can return; raises `SpecError` for one that is not known.

    >>> round(fixed_low("gelu"), 6), fixed_low("sigmoid")
    (-0.169971, 0.0)
    """
    return _known(name)[0]


def fixed_range(name: str) -> tuple[float, float] | None:
    """Smallest and largest value of a bounded activation function, None for one without an upper bound.

    >>> fixed_range("tanh"), fixed_range("relu")
    ((-1.0, 1.0), None)
    """
    low, high, _ = _known(name)
    return None if high is None else (low, high)


def lowest_at(name: str) -> float:
    """The input at which an activation function takes its minimum; raises `SpecError` where there is none."""
    where = _known(name)[2]
    if where is None:
        raise SpecError(f"{name} takes its smallest value at no single input")
    return where


def range_observer(name: str) -> str:
    """The observer that uses what is known: ``fixed`` for bounded functions, ``mse`` with its lower end for others.

    >>> range_observer("softmax"), range_observer("silu")
    ('fixed:0,1', 'mse:low=-0.278465')
    """
    bounds = fixed_range(name)
    return f"mse:low={fixed_low(name):.6g}" if bounds is None else f"fixed:{bounds[0]:g},{bounds[1]:g}"


def _known(name: str) -> tuple[float, float | None, float | None]:
    if name not in _RANGES:
        raise SpecError(f"unknown activation function {name!r}; known ones: {', '.join(_RANGES)}")
    return _RANGES[name]
