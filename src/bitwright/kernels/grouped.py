"""Native products of integers where weights have a scale per group of inputs: ``bitwright::grouped_linear``.

Equal to `kernels.reference.linear` bit for bit: int32 sums per group, scaled and added in float32, groups in order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bitwright.errors import KernelError, NumericsError
from bitwright.kernels import cpu
from bitwright.kernels.operators import address, register
from bitwright.kernels.reference import not_integers
from bitwright.kernels.row import product_codes
from bitwright.kernels.unpack import product_bits
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.spec import QuantSpec

LANES = 16  # output rows of a block of weights
_UNITS = {8: 4, 4: 8, 3: 32, 2: 16}  # inputs of the smallest run of codes that the kernel reads
_LARGEST_GROUP = 65536  # int32 accumulators hold products of a byte with a signed byte up to here


def layout_bits(spec: QuantSpec) -> int:
    """As `product_bits`, but groups that hold no whole unit of 3 bits take 4."""
    width = product_bits(spec)
    return 4 if width == 3 and spec.granularity.size % _UNITS[3] else width


SIGNED = "layouts hold signed weights"


def unsigned(weight: QuantSpec) -> bool:
    """Whether codes of a weight start at 0, as the byte layouts of integer products cannot hold them.

    >>> unsigned(QuantSpec.parse("uint8/channel")), unsigned(QuantSpec.parse("int8/channel"))
    (True, False)
    """
    return (weight.format.integer or weight.format).qmin >= 0


def refuses(weight: QuantSpec, input: QuantSpec | None, shape: tuple[int, ...]) -> str:
    """Why the kernel cannot multiply these; empty where it can.

    >>> refuses(QuantSpec.parse("int4/group32"), QuantSpec.parse("int8"), (8, 64))
    ''
    >>> refuses(QuantSpec.parse("int4/group4"), QuantSpec.parse("int8"), (8, 64))
    'groups of 4 are no multiple of 8 inputs'
    """
    if reason := not_integers(weight, input):
        return reason
    if unsigned(weight):
        return SIGNED
    size = weight.granularity.size
    if weight.granularity.kind != "group" or size >= shape[-1]:
        return "needs several scales per output"
    if size > _LARGEST_GROUP:
        return f"sums of {size} products may overflow int32"
    unit = _UNITS[layout_bits(weight)]
    return f"groups of {size} are no multiple of {unit} inputs" if size % unit else ""


def pack(weight: QTensor, with_sums: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Layout of the codes, and scales and sums of the groups as ``[blocks, groups, 16]``; see `refuses`.

    Activations that are symmetric and fit a signed byte have no use for the sums.
    """
    codes, scale = product_codes(weight).to(torch.int8).contiguous(), weight.qparams.scale
    sums = lanes(codes.unflatten(1, (scale.shape[1], -1)).sum(-1, dtype=torch.int32)) if with_sums else None
    return cpu.pack_linear(codes, layout_bits(weight.spec)), lanes(scale.float()), sums


def lanes(values: Tensor) -> Tensor:
    """``[n, groups] -> [blocks, groups, 16]``, padded with 0."""
    padded = F.pad(values, (0, 0, 0, -len(values) % LANES))
    return padded.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def from_lanes(values: Tensor, n: int) -> Tensor:
    """``[blocks, groups, 16] -> [n, groups]``, the inverse of `lanes`."""
    return values.transpose(1, 2).flatten(0, 1)[:n].contiguous()


def _grouped_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_sum: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, zero_point: Tensor | None, outputs: int, group_size: int, bits: int, qmin: int, qmax: int,
    isa: int,
) -> Tensor:  # fmt: skip
    if x.dtype is not torch.float32 or x.dim() == 0:
        raise KernelError(f"grouped_linear: x must be float32 with at least one dimension, got {x.dtype}")
    x, k = x.contiguous(), x.shape[-1]
    y = torch.empty((*x.shape[:-1], outputs))
    m = y.numel() // outputs if outputs else 0
    rows = 1 if scale is None else scale.numel()
    if rows not in (1, m) or (zero_point is not None and (scale is None or zero_point.numel() != rows)):
        raise KernelError(f"grouped_linear: {rows} scales and their zero points do not fit {m} rows")
    scale, zero_point = (None if part is None else part.float().contiguous() for part in (scale, zero_point))
    try:
        _check_weight(weight, weight_scale, weight_sum, bias, (outputs, k, group_size, bits))
        cpu.native.grouped_linear(
            isa, bits, x.data_ptr(), m, k, outputs, address(scale), address(zero_point), int(rows != 1),
            scale is None, qmin, qmax, weight.data_ptr(), weight_scale.data_ptr(), address(weight_sum),
            address(bias), y.data_ptr(), torch.get_num_threads(), group_size,
        )  # fmt: skip
    except ValueError as error:
        raise KernelError(f"grouped_linear: {error}") from error
    except OverflowError as error:  # of the range of a dynamic quantizer
        raise NumericsError(f"grouped_linear: {error}") from error
    return y


def _check_weight(
    weight: Tensor, scale: Tensor, sums: Tensor | None, bias: Tensor | None, sizes: tuple[int, int, int, int]
) -> None:
    n, k, group_size, bits = sizes
    if group_size < 1 or k % group_size:
        raise KernelError(f"grouped_linear: groups of {group_size} do not divide {k} inputs")
    shape = (-(-n // LANES), k // group_size, LANES)
    if not cpu.fills(weight, torch.uint8, cpu.native.linear_layout_bytes(bits, n, k)):
        raise KernelError(f"grouped_linear: {weight.numel()} bytes of weights do not fit {n} x {k} codes")
    count, fits = shape[0] * shape[1] * LANES, scale.shape == shape and (sums is None or sums.shape == shape)
    constants = [(scale, torch.float32, count), (sums, torch.int32, count), (bias, torch.float32, n)]
    if not (fits and all(part is None or cpu.fills(part, dtype, size) for part, dtype, size in constants)):
        raise KernelError(f"grouped_linear: scales, sums or bias do not fit {n} x {k} codes in groups of {group_size}")


register(
    "grouped_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_sum, Tensor? bias, Tensor? scale, "
    "Tensor? zero_point, int outputs, int group_size, int bits, int qmin, int qmax, int isa) -> Tensor",
    _grouped_linear,
    lambda x, *rest: x.new_empty((*x.shape[:-1], rest[6])),
)
