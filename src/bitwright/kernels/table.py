"""The kernel table: which function computes an operator for a pair of specs on a machine.

Rows are tried in order and the first that serves is taken, so the choice is a pure function of operator, specs, shape
and the features of a device (`device.device_features`). Every row lays out its own weights once (`pack`) and must
equal the reference row bit for bit where both operands are integers (contract C2); rows with float operands keep the
codes exact (contract C3).
"""

from __future__ import annotations

from bitwright.errors import KernelError
from bitwright.kernels import native_rows, reference_rows, triton_rows
from bitwright.kernels.row import Kernel
from bitwright.numerics.spec import QuantSpec

KERNELS: tuple[Kernel, ...] = (
    *native_rows.INTEGER_ROWS,
    triton_rows.INTEGER_ROW,
    *reference_rows.INTEGER_ROWS,
    *native_rows.DECODING_ROWS,
    triton_rows.DECODING_ROW,
    *reference_rows.DECODING_ROWS,
    native_rows.ADD_ROW,
    *reference_rows.OPERATION_ROWS,
)


def select(
    op: str, weight: QuantSpec, input: QuantSpec | None, shape: tuple[int, ...], features: frozenset[str]
) -> Kernel:
    """The first row that serves an operator with these specs and weight shape on a device with these features.

    >>> int8, uint8 = QuantSpec.parse("int8/channel"), QuantSpec.parse("uint8/asym")
    >>> select("linear", int8, uint8, (8, 16), frozenset()).name
    'linear/reference'
    """
    for kernel in KERNELS:
        if not _why_not(kernel, op, weight, input, shape, features):
            return kernel
    raise KernelError(f"no kernel for {op} with weight {weight} and input {input or 'float'}")


def explain(
    op: str, weight: QuantSpec, input: QuantSpec | None, shape: tuple[int, ...], features: frozenset[str]
) -> list[tuple[str, str]]:
    """Every row of an operator with the reason why it cannot serve, or why it is (not) taken."""
    chosen = select(op, weight, input, shape, features)
    reasons = []
    for kernel in (row for row in KERNELS if row.op == op):
        reason = _why_not(kernel, op, weight, input, shape, features)
        reasons.append((kernel.name, reason or ("taken" if kernel is chosen else f"comes after {chosen.name}")))
    return reasons


def _why_not(
    kernel: Kernel,
    op: str,
    weight: QuantSpec,
    input: QuantSpec | None,
    shape: tuple[int, ...],
    features: frozenset[str],
) -> str:
    if kernel.op != op:
        return f"computes {kernel.op}"
    if missing := kernel.requires - features:
        return f"needs {', '.join(sorted(missing))}"
    return kernel.refuses(weight, input, shape)
