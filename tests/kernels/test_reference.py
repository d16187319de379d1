"""The reference: integer products are exact for every length, geometry and sign, rounded once to float32."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bitwright.kernels import reference
from bitwright.kernels.reference import EXACT, Codes, Geometry, codes_of, largest_code
from bitwright.numerics.spec import QParams, QuantSpec

# Largest magnitudes of input and weight codes: uint8/asym x int8, int8 x int8, uint4/asym x int4, uint8 x ternary, ...
LIMITS = [(255, 128), (128, 128), (15, 8), (255, 8), (255, 1), (8, 128)]


def extreme(shape: tuple[int, ...], limit: int, pattern: str, generator: torch.Generator) -> Tensor:
    """Codes at their largest magnitude but for a last bit here and there, so that sums are large and odd."""
    if pattern == "random":
        return torch.randint(-limit, limit + 1, shape, generator=generator).float()
    odd = torch.randint(0, 2, shape, generator=generator)
    return ((limit - odd) * (-1 if pattern == "negative" else 1)).float()


def integer_linear(x: Tensor, w: Tensor) -> Tensor:
    return (x.long() @ w.long().T).to(torch.float32)


@settings(max_examples=60)
@given(
    limits=st.sampled_from(LIMITS),
    blocks=st.integers(0, 6),
    offset=st.integers(-2, 2),
    pattern=st.sampled_from(["random", "positive", "negative"]),
    seed=st.integers(0, 2**31),
)
@example(limits=(255, 128), blocks=125, offset=0, pattern="positive", seed=0)
@example(limits=(255, 128), blocks=125, offset=0, pattern="negative", seed=1)
def test_linear_is_exact_around_every_multiple_of_2_to_the_24(
    limits: tuple[int, int], blocks: int, offset: int, pattern: str, seed: int
) -> None:
    length = min(max(1, blocks * EXACT // (limits[0] * limits[1]) + offset), 70_000)
    generator = torch.Generator().manual_seed(seed)
    x = extreme((2, length), limits[0], "positive" if pattern == "negative" else pattern, generator)
    w = extreme((3, length), limits[1], pattern, generator)
    got = reference.linear(Codes(x, torch.ones(1), limits[0]), Codes(w, torch.ones(3, 1), limits[1]), None)
    assert torch.equal(got, integer_linear(x, w))


@settings(max_examples=60)
@given(
    limits=st.sampled_from(LIMITS),
    kernel=st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 7)]),
    groups=st.sampled_from([1, 1, 2, 3]),
    blocks=st.integers(0, 3),
    offset=st.integers(-1, 1),
    pattern=st.sampled_from(["random", "positive", "negative"]),
    seed=st.integers(0, 2**31),
)
@example(limits=(255, 128), kernel=(5, 5), groups=1, blocks=2, offset=0, pattern="positive", seed=0)
@example(limits=(255, 128), kernel=(3, 3), groups=1, blocks=9, offset=0, pattern="positive", seed=0)
@example(limits=(255, 128), kernel=(3, 3), groups=2, blocks=2, offset=1, pattern="positive", seed=0)
def test_convolution_is_exact_around_every_multiple_of_2_to_the_24(
    limits: tuple[int, int],
    kernel: tuple[int, int],
    groups: int,
    blocks: int,
    offset: int,
    pattern: str,
    seed: int,
) -> None:
    area = kernel[0] * kernel[1]
    channels = min(max(1, blocks * EXACT // (limits[0] * limits[1] * area) + offset), 1500)
    generator = torch.Generator().manual_seed(seed)
    x = extreme((1, channels * groups, kernel[0] + 1, kernel[1]), limits[0], "positive", generator)
    w = extreme((2 * groups, channels, *kernel), limits[1], pattern, generator)
    geometry = Geometry(kernel, (1, 1), (0, 0), (1, 1), groups)
    one = torch.ones(2 * groups, 1, 1, 1)
    got = reference.conv2d(Codes(x, torch.ones(1), limits[0]), Codes(w, one, limits[1]), None, geometry)
    expected = [
        integer_linear(F.unfold(part, kernel)[0].T, filters.flatten(1)).T.view(1, 2, 2, 1)
        for part, filters in zip(x.chunk(groups, 1), w.chunk(groups), strict=True)
    ]
    assert torch.equal(got, torch.cat(expected, 1))


def test_lengths_that_plain_float32_gets_wrong_are_among_those_tested() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = extreme((2, 70_000), 255, "positive", generator), extreme((3, 70_000), 128, "positive", generator)
    assert not torch.equal(F.linear(x, w), integer_linear(x, w))
    x, w = extreme((1, 514, 3, 3), 255, "positive", generator), extreme((16, 514, 3, 3), 128, "positive", generator)
    assert not torch.equal(F.conv2d(x, w).flatten(1), integer_linear(x.flatten(1), w.flatten(1)))


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_every_geometry_equals_the_float64_convolution(groups: int, stride: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(groups)
    for padding, dilation in itertools.product([(0, 0), (1, 2)], [(1, 1), (2, 1)]):
        x = extreme((2, 12, 9, 8), 255, "random", generator)
        w = extreme((6, 12 // groups, 3, 2), 128, "random", generator)
        geometry = Geometry((3, 2), stride, padding, dilation, groups)
        bias, scale = torch.randn(6), torch.rand(6, 1, 1, 1)
        got = reference.conv2d(Codes(x, torch.tensor([0.3]), 255), Codes(w, scale, 128), bias, geometry)
        acc = F.conv2d(x.double(), w.double(), None, stride, padding, dilation, groups).float()
        expected = acc * (torch.tensor([0.3]) * scale.view(-1)).view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
        assert torch.equal(got, expected)
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_a_sum_of_nothing_is_the_bias() -> None:
    none = Codes(torch.zeros(2, 0), torch.ones(1), 255)
    assert torch.equal(
        reference.linear(none, Codes(torch.zeros(3, 0), torch.ones(3, 1), 128), torch.ones(3)), torch.ones(2, 3)
    )


def test_the_epilogue_multiplies_the_scales_first() -> None:
    x, w = Codes(torch.tensor([[7.0]]), torch.tensor([0.1]), 8), Codes(torch.tensor([[3.0]]), torch.tensor([[0.3]]), 8)
    factor = torch.tensor(0.1) * torch.tensor(0.3)
    assert torch.equal(reference.linear(x, w, torch.tensor([0.7])), (21 * factor + torch.tensor(0.7)).view(1, 1))
    assert torch.equal(reference.add(x, w), (7 * torch.tensor(0.1) + 3 * torch.tensor(0.3)).view(1, 1))


@pytest.mark.parametrize(
    "text", ["int8", "int8/asym", "uint8", "uint8/asym", "int4/channel", "ternary", "uint4/asym", "int2/asym"]
)
def test_no_code_is_larger_than_the_stated_limit(text: str) -> None:
    spec = QuantSpec.parse(text)
    x = torch.linspace(-1e4, 1e4, 401).view(1, -1)
    largest = 0.0
    for zero_point in [None] if spec.symmetric else [spec.format.qmin, spec.format.qmax]:
        qparams = QParams(torch.tensor([1.0]), None if zero_point is None else torch.tensor([float(zero_point)]))
        codes = codes_of(x, spec, qparams)
        assert codes.limit == largest_code(spec)
        largest = max(largest, codes.values.abs().max().item())
    assert largest == largest_code(spec)


def test_dynamic_codes_come_from_the_live_tensor() -> None:
    x = torch.tensor([[1.0, -2.54], [0.5, 0.1]])
    codes = codes_of(x, QuantSpec.parse("int8/token/dynamic"), None)
    assert codes.values.tolist() == [[50, -127], [127, 25]]
    assert codes.scale.shape == (2, 1)


def test_autocast_does_not_touch_integer_products() -> None:
    x, w = (
        Codes(torch.full((2, 300), 255.0), torch.ones(1), 255),
        Codes(torch.full((3, 300), 127.0), torch.ones(3, 1), 128),
    )
    with torch.autocast("cpu", torch.bfloat16):
        got = reference.linear(x, w, None)
    assert got.dtype is torch.float32
    assert got.unique().tolist() == [300 * 255 * 127]
