"""What a row lays out it gives back: packed bytes, scales, zero points and tables, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import KernelError
from bitwright.kernels import cpu, table, unpack
from bitwright.kernels.row import Kernel
from bitwright.numerics.qtensor import QTensor, quantize
from bitwright.numerics.spec import QuantSpec

SPECS = (
    "int8", "int8/channel", "uint8/channel", "uint8/channel/asym", "int6/channel", "int4", "int4/channel", "int3",
    "int3/channel", "int2/channel", "ternary", "ternary/channel", "binary/channel", "int8/group32", "int4/group8",
    "midrise2/channel",
    "int4/group32", "uint4/group32/asym", "uint8/group32/asym", "uint8/asym", "int3/group16", "int3/group32",
    "int2/group64", "ternary/group16", "nf4/group64", "fp4/channel", "kmeans3", "kmeans4/channel", "quantile4/group16",
    "fp8_e4m3/channel", "fp16", "bf16", "int16/channel", "uint16/channel/asym", "nf4/group16/scale(int8)", "mxfp4",
)  # fmt: skip
INPUTS = (None, "uint8/asym", "int8/token/dynamic", "uint8")
WEIGHTED = [kernel for kernel in table.KERNELS if kernel.op not in ("add", "matmul")]


def runs_here(kernel: Kernel) -> bool:
    """Whether this machine can lay out weights for a row: every layout of the native module, and those in torch."""
    return "native" not in kernel.requires or cpu.native is not None


def weight_of(spec: QuantSpec, shape: tuple[int, ...]) -> QTensor:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator)
    return quantize(x + 0.5 if not spec.symmetric or spec.format.qmin == 0 else x, spec)


def check(kernel: Kernel, weight: QTensor, groups: int, input: QuantSpec | None) -> None:
    packed = kernel.pack(weight, groups, input)
    assert torch.equal(kernel.unpack(packed, weight.spec, weight.shape, groups), weight.packed)
    found, expected = kernel.qparams(packed, weight.spec, weight.shape), weight.qparams
    for one, other in zip(
        (found.scale, found.zero_point, found.codebook),
        (expected.scale, expected.zero_point, expected.codebook),
        strict=True,
    ):
        assert (one is None) == (other is None)
        assert other is None or (one is not None and one.shape == other.shape and torch.equal(one, other))


@given(
    kernel=st.sampled_from(
        [kernel for kernel in WEIGHTED if kernel.op in ("linear", "embedding") and runs_here(kernel)]
    ),
    text=st.sampled_from(SPECS),
    input=st.sampled_from(INPUTS),
    n=st.integers(1, 50),
    k=st.integers(1, 90),
)
def test_matrices_come_back(kernel: Kernel, text: str, input: str | None, n: int, k: int) -> None:
    spec = QuantSpec.parse(text)
    size = spec.granularity.size
    shape = (n, max(size, k // size * size) if size else k)
    encoding = None if input is None else QuantSpec.parse(input)
    if not kernel.refuses(spec, encoding, shape):
        check(kernel, weight_of(spec, shape), 1, encoding)


@given(
    kernel=st.sampled_from([kernel for kernel in WEIGHTED if kernel.op.startswith("conv") and runs_here(kernel)]),
    text=st.sampled_from(
        [
            "int8/channel",
            "int6",
            "int4/channel",
            "int3/channel",
            "int2",
            "ternary",
            "nf4/channel",
            "uint8/channel/asym",
            "fp16",
        ]
    ),
    groups=st.integers(1, 4),
    outputs=st.integers(1, 20),
    inputs=st.integers(1, 9),
    window=st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
def test_filters_come_back(
    kernel: Kernel, text: str, groups: int, outputs: int, inputs: int, window: list[int]
) -> None:
    spec, shape = QuantSpec.parse(text), (outputs * groups, inputs, *window)
    if kernel.op == "conv" and len(window) == 3:
        shape = shape[:-1]
    encoding = QuantSpec.parse("uint8/asym")
    if not kernel.refuses(spec, encoding, shape):
        check(kernel, weight_of(spec, shape), groups, encoding)


def test_every_row_with_a_weight_is_met_by_these_specs() -> None:
    met = set()
    for kernel in filter(runs_here, WEIGHTED):
        shapes = {"linear": (16, 64), "embedding": (16, 64), "conv": (16, 4, 3, 3)}
        for text in SPECS:
            for input in (QuantSpec.parse("uint8/asym"), None):
                if not kernel.refuses(QuantSpec.parse(text), input, shapes.get(kernel.op, (16, 4, 3, 3, 3))):
                    met.add(kernel.name)
    assert met == {kernel.name for kernel in filter(runs_here, WEIGHTED)}


@pytest.mark.skipif(cpu.native is None, reason="no native kernels here")
@pytest.mark.parametrize(
    "call",
    [
        lambda layout: unpack.unpack_linear(layout, 4, 16, 24),
        lambda layout: unpack.unpack_linear(layout, 5, 16, 8),
        lambda layout: unpack.unpack_linear(layout, 4, -1, 8),
        lambda layout: unpack.unpack_conv(layout, 8, (16, 4, 3, 3), 1),
        lambda layout: unpack.unpack_conv(layout, 4, (16, 4, 1, 1), 3),
        lambda layout: unpack.unpack_conv(layout, 5, (16, 4, 1, 1), 1),
        lambda layout: unpack.unpack_decoded(layout, 3, 16, 8),
        lambda layout: unpack.unpack_decoded(layout, 7, 16, 8),
    ],
)
def test_layouts_of_other_sizes_are_refused(call: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(KernelError):
        call(cpu.pack_linear(torch.zeros(16, 8, dtype=torch.int8), 4))
