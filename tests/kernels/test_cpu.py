"""The native kernels equal a reference in float64/int64, with difference exactly 0, on every instruction set."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import KernelError
from bitwright.kernels import cpu, operators

pytestmark = pytest.mark.skipif(
    "native" not in cpu.cpu_features(),
    reason="bitwright._native is not built (no C++ compiler at install time)",
)

ISAS = [name for name in cpu.ISA if name == "portable" or name in cpu.cpu_features()]
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Act:
    """Range of the activation codes, scale and zero point (None = symmetric, dynamic = one scale per row)."""

    qmin: int
    qmax: int
    scale: Tensor | None
    zero: Tensor | None = None

    def centred(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes minus zero point, and the scale, by the definition: one float32 rounding per operation."""
        scale = self.scale
        if scale is None:
            scale = torch.clamp_min(x.abs().amax(-1, keepdim=True) / self.qmax, EPS)
        elif scale.numel() > 1:
            scale = scale.view(*x.shape[:-1], 1)
        zero = torch.zeros(()) if self.zero is None else self.zero
        if zero.numel() > 1:
            zero = zero.view(*x.shape[:-1], 1)
        codes = torch.clamp(torch.round(x / scale) + zero, self.qmin, self.qmax)
        return codes.double() - zero.double(), scale


ACTS = {
    "int8": Act(-128, 127, torch.tensor(0.031)),
    "int8 narrow": Act(-127, 127, torch.tensor(0.031)),
    "int8 asymmetric": Act(-128, 127, torch.tensor(0.031), torch.tensor(-128.0)),
    "uint8 zero 0": Act(0, 255, torch.tensor(0.017), torch.tensor(0.0)),
    "uint8 zero 93": Act(0, 255, torch.tensor(0.017), torch.tensor(93.0)),
    "uint8 zero 255": Act(0, 255, torch.tensor(0.017), torch.tensor(255.0)),
    "uint4": Act(0, 15, torch.tensor(0.3), torch.tensor(7.0)),
    "int4": Act(-8, 7, torch.tensor(0.4)),
}


def weights(shape: tuple[int, ...], bits: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, shape, dtype=torch.int8, generator=generator)
    codes.view(-1)[0] = -half
    scale = torch.rand(shape[0], generator=generator) * 0.1 + 0.001
    return codes, scale, codes.flatten(1).sum(1, dtype=torch.int32)


def run_linear(isa: str, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, act: Act, bits: int) -> Tensor:
    sums = codes.sum(1, dtype=torch.int32)
    packed = cpu.pack_linear(codes, bits)
    rest = (act.scale, act.zero, bits, act.qmin, act.qmax, cpu.ISA[isa])
    return operators.call(torch.ops.bitwright.linear, x, packed, scale, sums, bias, *rest)


def expect_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, act: Act) -> Tensor:
    values, s = act.centred(x)
    acc = (values @ codes.double().T).to(torch.int64)
    out = acc.to(torch.float32) * (s * scale)
    return out if bias is None else out + bias


def gen(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seed) % (1 << 31))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("act", ACTS)
def test_linear_shapes(isa: str, bits: int, act: str) -> None:
    g = gen(bits)
    for k in (1, 3, 17, 64, 100, 1000):
        for n in (1, 5, 16, 33):
            codes, scale, _ = weights((n, k), bits, g)
            bias = torch.randn(n, generator=g)
            for m in (1, 2, 7, 40):
                x = torch.randn(m, k, generator=g) * 2
                got = run_linear(isa, x, codes, scale, bias, ACTS[act], bits)
                assert torch.equal(got, expect_linear(x, codes, scale, bias, ACTS[act])), (m, n, k)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_linear_many_rows_and_columns(isa: str, bits: int) -> None:
    g = gen(bits, 1)
    codes, scale, _ = weights((330, 260), bits, g)
    for m in (12, 13, 95, 97, 205):
        x = torch.randn(m, 260, generator=g)
        got = run_linear(isa, x, codes, scale, None, ACTS["uint8 zero 93"], bits)
        assert torch.equal(got, expect_linear(x, codes, scale, None, ACTS["uint8 zero 93"]))


@pytest.mark.parametrize("isa", ISAS)
def test_linear_in_several_chunks_of_rows(isa: str) -> None:
    g = gen(7)
    codes, scale, _ = weights((3, 60000), 8, g)
    x = torch.randn(100, 60000, generator=g)
    assert torch.equal(
        run_linear(isa, x, codes, scale, None, ACTS["int8"], 8),
        expect_linear(x, codes, scale, None, ACTS["int8"]),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("qmin", "qmax"), [(-127, 127), (-128, 127), (-7, 7)])
def test_linear_dynamic(isa: str, bits: int, qmin: int, qmax: int) -> None:
    g = gen(bits, qmax)
    codes, scale, _ = weights((21, 83), bits, g)
    bias = torch.randn(21, generator=g)
    x = torch.randn(3, 5, 83, generator=g) * torch.logspace(-12, 4, 15).view(3, 5, 1)
    x[1, 2] = 0.0
    got = run_linear(isa, x, codes, scale, bias, Act(qmin, qmax, None), bits)
    assert got.shape == (3, 5, 21)
    assert torch.equal(got, expect_linear(x, codes, scale, bias, Act(qmin, qmax, None)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_linear_has_no_use_for_sums_where_activations_are_symmetric_signed_bytes(isa: str, bits: int) -> None:
    g = gen(bits, 5)
    codes, scale, _ = weights((21, 83), bits, g)
    x = torch.randn(9, 83, generator=g)
    for act in (Act(-127, 127, None), Act(-8, 7, None)):
        got = torch.ops.bitwright.linear(
            x, cpu.pack_linear(codes, bits), scale, None, None, None, None, bits, act.qmin, act.qmax, cpu.ISA[isa]
        )
        assert torch.equal(got, run_linear(isa, x, codes, scale, None, act, bits))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
def test_linear_scale_per_row(isa: str, bits: int) -> None:
    g = gen(bits, 3)
    codes, scale, _ = weights((18, 50), bits, g)
    x = torch.randn(2, 9, 50, generator=g)
    act = Act(0, 255, torch.rand(18, generator=g) * 0.02 + 0.001, torch.randint(0, 256, (18,), generator=g).float())
    for some in (act, replace(act, zero=None), replace(ACTS["int8"], scale=act.scale)):
        assert torch.equal(
            run_linear(isa, x, codes, scale, None, some, bits), expect_linear(x, codes, scale, None, some)
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("act", ACTS)
def test_ties_and_saturation(isa: str, act: str) -> None:
    """Every half-way point between codes, its neighbours, and values far outside, one per row of an identity."""
    a = ACTS[act]
    assert a.scale is not None
    half = (torch.arange(-300, 300) + 0.5) * a.scale
    x = torch.cat([half, half.nextafter(torch.tensor(1e9)), half.nextafter(torch.tensor(-1e9))])
    x = torch.cat([x, torch.tensor([1e30, -1e30, torch.inf, -torch.inf, 1e-45, -0.0])]).view(-1, 1)
    codes = torch.tensor([[1], [-1], [100]], dtype=torch.int8)
    scale = torch.tensor([1.0, 0.3, 0.7])
    assert torch.equal(run_linear(isa, x, codes, scale, None, a, 8), expect_linear(x, codes, scale, None, a))
    row = x.T.contiguous()  # the vector loops instead of their tails
    codes = torch.randint(-128, 128, (4, row.shape[1]), dtype=torch.int8)
    scale = torch.ones(4)
    assert torch.equal(run_linear(isa, row, codes, scale, None, a, 8), expect_linear(row, codes, scale, None, a))


@pytest.mark.parametrize("isa", ISAS)
def test_sums_beyond_float_precision(isa: str) -> None:
    """All extremes at the longest k: the int32 sum passes 2**24 (and nears 2**31), so its conversion must round."""
    k = 65535
    codes = torch.full((17, k), -128, dtype=torch.int8)
    codes[5, ::3] = 127
    codes[6, 1] = -127
    for act in (
        Act(0, 255, torch.tensor(1.0), torch.tensor(0.0)),
        Act(0, 255, torch.tensor(1.0), torch.tensor(255.0)),
    ):
        for value in (1e9, -1e9):
            x = torch.full((2, k), value)
            x[1, ::7] = 3.0
            got = run_linear(isa, x, codes, torch.ones(17), None, act, 8)
            assert torch.equal(got, expect_linear(x, codes, torch.ones(17), None, act))


@pytest.mark.parametrize("isa", ISAS)
def test_nan_is_harmless(isa: str) -> None:
    g = gen(11)
    codes, scale, _ = weights((5, 40), 8, g)
    x = torch.randn(3, 40, generator=g)
    x[1] = torch.nan
    for act in (ACTS["int8"], ACTS["uint8 zero 93"]):
        got = run_linear(isa, x, codes, scale, None, act, 8)
        assert torch.equal(got[::2], expect_linear(x[::2], codes, scale, None, act))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    m=st.integers(0, 50), k=st.integers(0, 300), n=st.integers(1, 70), bits=st.sampled_from([8, 4, 3, 2]),
    isa=st.sampled_from(ISAS), act=st.sampled_from([*ACTS, "dynamic"]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_linear_any_shape(m: int, k: int, n: int, bits: int, isa: str, act: str, seed: int) -> None:
    g = gen(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (n, k), dtype=torch.int8, generator=g)
    scale = torch.rand(n, generator=g)
    a = ACTS.get(act, Act(-127, 127, None))
    x = torch.randn(m, k, generator=g) * 3
    if k == 0 and a.scale is None:
        expected = torch.zeros(m, n)
    else:
        expected = expect_linear(x, codes, scale, None, a)
    assert torch.equal(run_linear(isa, x, codes, scale, None, a, bits), expected)


@dataclass(frozen=True)
class Shape:
    """A convolution: channels in and out, filter, and the rest of its geometry."""

    c: int
    o: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    image: tuple[int, int] = (11, 14)
    batch: int = 2


CONVS = {
    "3x3": Shape(8, 20, (3, 3), padding=(1, 1)),
    "3x3 stride 2": Shape(16, 32, (3, 3), (2, 2), (1, 1)),
    "first layer": Shape(3, 16, (7, 7), (2, 2), (3, 3), image=(35, 30)),
    "1x1": Shape(20, 50, (1, 1)),
    "1x1 stride 2": Shape(12, 17, (1, 1), (2, 2)),
    "1x1 padded": Shape(5, 7, (1, 1), (1, 1), (1, 2)),
    "5x5": Shape(6, 9, (5, 5), padding=(2, 2)),
    "rectangular": Shape(7, 5, (1, 4), (2, 3), (0, 2)),
    "dilated": Shape(6, 10, (3, 3), padding=(2, 1), dilation=(2, 1)),
    "dilated along rows": Shape(5, 10, (2, 3), (1, 2), (1, 4), (1, 3)),
    "groups": Shape(12, 40, (3, 3), padding=(1, 1), groups=2),
    "groups of 3 channels": Shape(12, 8, (3, 2), (1, 2), (1, 1), groups=4),
    "grouped 1x1": Shape(24, 36, (1, 1), groups=3),
    "depthwise": Shape(37, 37, (3, 3), padding=(1, 1), groups=37),
    "depthwise stride 2": Shape(16, 16, (5, 3), (2, 1), (2, 1), (1, 2), groups=16),
    "depthwise 1x1": Shape(18, 18, (1, 1), (2, 2), groups=18),
    "depthwise of one channel": Shape(1, 1, (3, 3), padding=(1, 1), groups=1),
    "channel multiplier": Shape(4, 8, (3, 3), groups=4),
    "one channel": Shape(1, 6, (3, 3), (1, 1), (1, 1)),
    "one pixel": Shape(9, 6, (3, 3), (1, 1), (1, 1), image=(1, 1), batch=1),
    "large": Shape(32, 72, (3, 3), padding=(1, 1), image=(70, 66), batch=1),
    "deep": Shape(160, 330, (3, 3), padding=(1, 1), image=(5, 9), batch=1),  # more weights than stay in a cache
    "deep groups": Shape(320, 420, (3, 3), groups=2, image=(5, 4), batch=1),
    "deep pixel": Shape(1500, 330, (1, 1), image=(1, 1), batch=3),
}


def conv_case(s: Shape, g: torch.Generator, bits: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    codes, scale, sums = weights((s.o, s.c // s.groups, *s.kernel), bits, g)
    x = torch.randn(s.batch, s.c, *s.image, generator=g) * 2
    return x, codes, scale, sums, torch.randn(s.o, generator=g)


def run_conv(isa: str, s: Shape, case: tuple[Tensor, ...], bias: Tensor | None, act: Act, bits: int = 8) -> Tensor:
    x, codes, scale, sums = case[:4]
    return operators.call(
        torch.ops.bitwright.conv2d,
        x, cpu.pack_conv(codes, bits, s.groups), scale, sums, bias, act.scale, act.zero, s.kernel, s.stride, s.padding,
        s.dilation, s.groups, bits, act.qmin, act.qmax, cpu.ISA[isa],
    )  # fmt: skip


def expect_conv(s: Shape, case: tuple[Tensor, ...], bias: Tensor | None, act: Act) -> Tensor:
    x, codes, scale = case[:3]
    values, a = act.centred(x)
    acc = F.conv2d(values, codes.double(), None, s.stride, s.padding, s.dilation, s.groups)
    out = acc.round().to(torch.int64).to(torch.float32) * (a * scale).view(1, -1, 1, 1)
    return out if bias is None else out + bias.view(1, -1, 1, 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", CONVS)
def test_conv2d(isa: str, shape: str) -> None:
    s = CONVS[shape]
    case = conv_case(s, gen(s.c, s.o))
    for name in ("int8", "int8 asymmetric", "uint8 zero 0", "uint8 zero 93", "uint8 zero 255", "uint4"):
        expected = expect_conv(s, case, case[4], ACTS[name])
        for layout in (torch.contiguous_format, torch.channels_last):
            x = case[0].contiguous(memory_format=layout)
            got = run_conv(isa, s, (x, *case[1:]), case[4], ACTS[name])
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(got, expected), (name, layout)
    assert torch.equal(run_conv(isa, s, case, None, ACTS["int8"]), expect_conv(s, case, None, ACTS["int8"]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("shape", CONVS)
def test_conv2d_of_few_bits(isa: str, bits: int, shape: str) -> None:
    s = CONVS[shape]
    case = conv_case(s, gen(s.c, s.o, bits), bits)
    for act in (ACTS["int8 asymmetric"], ACTS["uint8 zero 93"]):
        assert torch.equal(run_conv(isa, s, case, case[4], act, bits), expect_conv(s, case, case[4], act))


def layout_sizes(s: Shape, bits: int) -> tuple[int, int]:
    """Bytes of a layout, and those of the same codes one by one, outputs padded to 16 and channels to 4."""
    codes = torch.zeros(s.o, s.c // s.groups, *s.kernel, dtype=torch.int8)
    o, c = s.o // s.groups, s.c // s.groups
    padded = s.groups * (o + -o % 16) * (c + -c % 4) * s.kernel[0] * s.kernel[1]
    return cpu.pack_conv(codes, bits, s.groups).numel(), padded


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("shape", [name for name in CONVS if not name.startswith("depthwise")])
def test_filters_of_few_bits_pad_no_more_than_bytes(shape: str, bits: int) -> None:
    found, padded = layout_sizes(CONVS[shape], bits)
    assert found == padded * bits // 8


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", ["3x3", "1x1 stride 2", "first layer", "depthwise"])
def test_conv2d_reads_views(isa: str, shape: str) -> None:
    s = CONVS[shape]
    case = conv_case(s, gen(s.c))
    expected = expect_conv(s, case, None, ACTS["uint8 zero 93"])
    n, c, h, w = case[0].shape
    wide = torch.randn(n, c + 3, h + 2, w + 5)
    for view in (
        wide,
        wide.contiguous(memory_format=torch.channels_last),
        wide.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        part = view[:, 1 : c + 1, 1 : h + 1, 2 : w + 2]
        part.copy_(case[0])
        assert torch.equal(run_conv(isa, s, (part, *case[1:]), None, ACTS["uint8 zero 93"]), expected)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(), isa=st.sampled_from(ISAS), act=st.sampled_from(list(ACTS)), bits=st.sampled_from([8, 4, 3, 2]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_conv2d_any_shape(data: st.DataObject, isa: str, act: str, bits: int, seed: int) -> None:
    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.integers(low, high)), data.draw(st.integers(low, high))

    groups = data.draw(st.integers(1, 4))
    kernel, dilation = pair(1, 4), pair(1, 3)
    image = tuple((k - 1) * d + 1 + data.draw(st.integers(0, 9)) for k, d in zip(kernel, dilation, strict=True))
    s = Shape(
        groups * data.draw(st.integers(1, 9)), groups * data.draw(st.integers(1, 20)), kernel, pair(1, 3), pair(0, 3),
        dilation, groups, (image[0], image[1]), data.draw(st.integers(1, 3)),
    )  # fmt: skip
    case = conv_case(s, gen(seed), bits)
    assert torch.equal(run_conv(isa, s, case, case[4], ACTS[act], bits), expect_conv(s, case, case[4], ACTS[act])), s


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 1000, 40001])
def test_add(isa: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BEST_ISA", cpu.ISA[isa])
    g = gen(count)
    for left, right in (
        ("int8", "uint8 zero 93"),
        ("uint4", "int8 asymmetric"),
        ("uint8 zero 255", "uint8 zero 0"),
    ):
        a, b = ACTS[left], ACTS[right]
        assert a.scale is not None
        assert b.scale is not None
        x = torch.randint(-300, 300, (count,), generator=g) * 0.5 * a.scale  # every second one is a tie
        y = torch.randn(count, generator=g) * 4
        got = torch.ops.bitwright.add(x, y, a.scale, a.zero, b.scale, b.zero, [a.qmin, a.qmax], [b.qmin, b.qmax])
        expected = a.centred(x)[0].float() * a.scale + b.centred(y)[0].float() * b.scale
        assert torch.equal(got, expected)


def test_add_keeps_the_layout_of_a() -> None:
    a = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    b = torch.randn(2, 5, 4, 3)
    act = ACTS["int8"]
    expected = act.centred(a)[0].float() * act.scale + act.centred(b)[0].float() * act.scale
    for left, right in ((a, b), (b, a), (a, a), (b.transpose(0, 3), a.transpose(0, 3))):
        got = torch.ops.bitwright.add(left, right, act.scale, None, act.scale, None, [-128, 127], [-128, 127])
        if left.shape == expected.shape and left is not right:
            assert torch.equal(got, expected)
            assert got.stride() == left.stride()


def test_threads_do_not_change_results() -> None:
    g = gen(5)
    codes, scale, _ = weights((200, 512), 4, g)
    x = torch.randn(100, 512, generator=g)
    s, deep = CONVS["large"], replace(CONVS["deep"], o=640, image=(20, 20))
    case, packed = conv_case(s, g), conv_case(deep, g, 3)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            isa = ISAS[-1]
            results.append((
                run_linear(isa, x, codes, scale, None, Act(-127, 127, None), 4),
                run_linear(isa, x[:1], codes, scale, None, ACTS["int8"], 4),
                run_conv(isa, s, case, None, ACTS["uint8 zero 93"]),
                run_conv(isa, deep, packed, None, ACTS["int8"], 3),
                torch.ops.bitwright.add(
                    case[0], case[0], scale[:1], None, scale[1:2], None, [-128, 127], [-128, 127]
                ),
            ))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def op_samples() -> list[tuple[object, tuple[object, ...]]]:
    g = gen(6)
    codes, scale, sums = weights((10, 24), 4, g)
    s = CONVS["3x3 stride 2"]
    x, filters, filter_scale, filter_sums, bias = conv_case(s, g)
    step, zero = torch.tensor(0.05), torch.tensor(3.0)
    last = x.contiguous(memory_format=torch.channels_last)
    packed, layout = cpu.pack_linear(codes, 4), cpu.pack_conv(filters, 8, 1)
    geometry = ([3, 3], [2, 2], [1, 1], [1, 1], 1, 8)
    ops = torch.ops.bitwright
    rows = torch.randn(2, 3, 24)
    return [
        (ops.linear.default, (rows, packed, scale, sums, None, None, None, 4, -127, 127, 0)),
        (ops.linear.default, (rows, packed, scale, sums, torch.randn(10), step, zero, 4, 0, 255, 0)),
        (ops.conv2d.default, (x, layout, filter_scale, filter_sums, bias, step, None, *geometry, -128, 127, 0)),
        (ops.add.default, (x, last, step, None, step, None, [-128, 127], [0, 255])),
        (ops.add.default, (last, x, step, None, step, zero, [-128, 127], [0, 255])),
    ]


@pytest.mark.parametrize("sample", range(5))
def test_operators_are_well_registered(sample: int) -> None:
    op, args = op_samples()[sample]
    torch.library.opcheck(op, args)  # type: ignore[arg-type]


def test_compiles_without_graph_breaks() -> None:
    g = gen(8)
    s = replace(CONVS["3x3"], groups=1)
    x, filters, filter_scale, filter_sums, bias = conv_case(s, g)
    packed = cpu.pack_conv(filters, 8, 1)
    codes, scale, sums = weights((6, s.o), 8, g)
    layout = cpu.pack_linear(codes, 8)
    step = torch.tensor(0.05)
    ops = torch.ops.bitwright

    def network(x: Tensor) -> Tensor:
        y = ops.conv2d(
            x,
            packed,
            filter_scale,
            filter_sums,
            bias,
            step,
            None,
            [3, 3],
            [1, 1],
            [1, 1],
            [1, 1],
            1,
            8,
            -128,
            127,
            0,
        )
        y = ops.add(y.relu(), y, step, None, step, None, [0, 255], [-128, 127])
        return ops.linear(y.mean((2, 3)), layout, scale, sums, None, None, None, 8, -127, 127, 0)

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), network(x))


def test_refusals() -> None:
    codes = torch.zeros(4, 8, dtype=torch.int8)
    scale, sums = torch.ones(4), torch.zeros(4, dtype=torch.int32)
    packed = cpu.pack_linear(codes, 8)
    x, step = torch.zeros(2, 8), torch.ones(())

    def linear(**change: object) -> Tensor:
        arguments: dict[str, object] = {
            "x": x, "weight": packed, "weight_scale": scale, "weight_sum": sums, "bias": None, "scale": step,
            "zero_point": None, "bits": 8, "qmin": -128, "qmax": 127, "isa": 0,
        }  # fmt: skip
        return operators.call(torch.ops.bitwright.linear, *{**arguments, **change}.values())

    assert linear().shape == (2, 4)
    wrong: list[tuple[str, dict[str, object]]] = [
        ("bytes", {"x": torch.zeros(2, 9)}),
        ("float32", {"x": x.double()}),
        ("bits", {"bits": 5}),
        ("bytes", {"bits": 3}),
        ("need the sums", {"weight_sum": None}),
        ("codes must lie", {"qmin": -128, "qmax": 255}),
        ("instruction set", {"isa": 9}),
        ("scale has 3", {"scale": torch.ones(3)}),
        ("zero points", {"zero_point": torch.tensor(0.5)}),
        ("zero points", {"zero_point": torch.tensor(torch.nan)}),
        ("no zero point", {"scale": None, "zero_point": step}),
        ("bias", {"bias": torch.ones(3)}),
        ("weight_sum", {"weight_sum": sums.long()}),
    ]
    for message, change in wrong:
        with pytest.raises(KernelError, match=message):
            linear(**change)
    with pytest.raises(KernelError, match="exceed 32 bits"):
        run_linear(
            "portable", torch.zeros(1, 70000), torch.zeros(1, 70000, dtype=torch.int8), scale[:1], None,
            ACTS["uint8 zero 0"], 8,
        )  # fmt: skip
    with pytest.raises(KernelError, match="does not fit in its bits"):
        cpu.pack_linear(torch.full((1, 1), 8, dtype=torch.int8), 4)
    shape = replace(CONVS["5x5"], padding=(0, 0))
    with pytest.raises(KernelError, match="does not fit an image"):
        run_conv("portable", shape, (torch.zeros(1, 6, 4, 9), *conv_case(shape, gen(1))[1:]), None, ACTS["int8"])
