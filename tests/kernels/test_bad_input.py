"""Native kernels under input that is odd, wrong, or comes from several threads: the same result, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from bitwright.errors import KernelError, NumericsError
from bitwright.flow.convert import convert
from bitwright.kernels import cpu, decoded, grouped, operators, passes, table
from bitwright.kernels.reference import Geometry
from bitwright.kernels.row import Activation, Kernel, Packed
from bitwright.numerics.affine import live_qparams
from bitwright.numerics.qtensor import quantize
from bitwright.numerics.spec import QParams, QuantSpec
from nets import calibrated

pytestmark = pytest.mark.skipif(cpu.native is None, reason="no native kernels here")

ISAS = [isa for isa in cpu.ISA if isa == "portable" or isa in cpu.cpu_features()]
OPS = torch.ops.bitwright
GEOMETRY = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)


def row(name: str) -> Kernel:
    return next(kernel for kernel in table.KERNELS if kernel.name == name)


def static(text: str, scale: float = 0.05, zero: float | None = None) -> Activation:
    zero_point = None if zero is None else torch.tensor([zero])
    return Activation(QuantSpec.parse(text), QParams(torch.tensor([scale]), zero_point))


def linear_rows(group: str) -> list[str]:
    return [f"linear/{group}{isa}" for isa in ISAS]


CASES = {
    **{name: ("int4/channel", static("uint8/asym", zero=93.0)) for name in linear_rows("")},
    **{name: ("int3/group32", static("int8")) for name in linear_rows("groups/")},
    **{name: ("int4/group32", None) for name in linear_rows("decode/")},
}


def product(name: str, outputs: int = 21, inputs: int = 64) -> Callable[[Tensor], Tensor]:
    """A row of the table with a weight, as a function of the activation."""
    text, input = CASES[name]
    generator = torch.Generator().manual_seed(0)
    weight, kernel = quantize(torch.randn(outputs, inputs, generator=generator), QuantSpec.parse(text)), row(name)
    packed, bias = kernel.pack(weight, 1), torch.randn(outputs, generator=generator)
    return lambda x: kernel.run(x, packed, weight.spec, bias, input)


def moved(x: Tensor, by: int) -> Tensor:
    """The same values, ``by`` elements behind the start of their memory."""
    return torch.cat([x.new_zeros(by), x.flatten()])[by:].view(x.shape)


@pytest.mark.parametrize("name", CASES)
def test_activations_of_any_memory_give_one_result(name: str) -> None:
    run, x = product(name), torch.randn(6, 64)
    expected = run(x)
    wide = torch.randn(9, 200)
    wide[2:8, 3:195:3] = x
    for view in (x.t().contiguous().t(), wide[2:8, 3:195:3], moved(x, 1), moved(x, 3)):
        assert torch.equal(run(view), expected)
    assert torch.equal(run(x[:1].expand(6, 64)), expected[:1].expand(6, -1))
    assert torch.equal(run(x.view(2, 3, 64)), expected.view(2, 3, -1))


@pytest.mark.parametrize("name", CASES)
def test_constants_may_start_at_any_byte(name: str) -> None:
    kernel, (text, input) = row(name), CASES[name]
    weight, x, bias = quantize(torch.randn(21, 64), QuantSpec.parse(text)), torch.randn(5, 64), torch.randn(21)
    packed = kernel.pack(weight, 1)
    expected = kernel.run(x, packed, weight.spec, bias, input)
    for by in (1, 3):
        shifted = Packed(*(None if part is None else moved(part, by) for part in packed))
        assert torch.equal(kernel.run(x, shifted, weight.spec, moved(bias, by), input), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("groups", [1, 8])
def test_convolutions_take_images_of_any_memory(isa: str, groups: int) -> None:
    weight = quantize(torch.randn(8, 8 // groups, 3, 3), QuantSpec.parse("int8/channel"))
    kernel, geometry = row(f"conv/{isa}"), Geometry((3, 3), (1, 1), (1, 1), (1, 1), groups)
    packed, input, x = kernel.pack(weight, groups), static("int8"), torch.randn(2, 8, 5, 7)

    def run(image: Tensor, constants: Packed = packed) -> Tensor:
        return kernel.run(image, constants, weight.spec, None, input, geometry)

    expected = run(x)
    for view in (
        moved(x, 1),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
    ):
        assert torch.equal(run(view), expected)
    shifted = Packed(*(None if part is None else moved(part, 1) for part in packed))
    assert torch.equal(run(x, shifted), expected)
    for flat in (x[:, :, :1, :1], x[:1, :1], x[..., :1]):  # strides of 0
        image = flat.expand(x.shape)
        assert torch.equal(run(image), run(image.contiguous()))


@pytest.mark.parametrize("name", CASES)
def test_nothing_in_makes_nothing_out(name: str) -> None:
    run = product(name)
    for shape in ((0, 64), (2, 0, 64), (0, 3, 64)):
        assert run(torch.empty(shape)).shape == (*shape[:-1], 21)
    assert run(torch.empty(1, 64)).shape == (1, 21)


@pytest.mark.parametrize("isa", ISAS)
def test_dynamic_scales_of_no_rows(isa: str) -> None:
    for text, kernel in (("int4/channel", row(f"linear/{isa}")), ("int4/group32", row(f"linear/groups/{isa}"))):
        weight = quantize(torch.randn(5, 64), QuantSpec.parse(text))
        for spec in ("int8/token/dynamic", "uint8/token/asym/dynamic"):
            out = kernel.run(
                torch.empty(0, 64), kernel.pack(weight, 1), weight.spec, None, Activation(QuantSpec.parse(spec), None)
            )
            assert out.shape == (0, 5)


@pytest.mark.parametrize("isa", ISAS)
def test_no_images_and_no_pixels(isa: str) -> None:
    weight = quantize(torch.randn(4, 3, 3, 3), QuantSpec.parse("int8/channel"))
    kernel = row(f"conv/{isa}")
    packed = kernel.pack(weight, 1)
    out = kernel.run(torch.empty(0, 3, 6, 6), packed, weight.spec, None, static("int8"), GEOMETRY)
    assert out.shape == (0, 4, 6, 6)
    with pytest.raises(KernelError, match="empty image or filter"):
        kernel.run(
            torch.empty(1, 3, 6, 0),
            packed,
            weight.spec,
            None,
            static("int8"),
            Geometry((3, 3), (1, 1), (2, 2), (1, 1), 1),
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 15, 17, 31, 33, 63, 65, 100])
def test_inputs_that_fill_no_vector(isa: str, k: int) -> None:
    x = torch.randn(3, k)
    for text in ("int8/channel", "int4/channel", "int2/channel"):
        weight = quantize(torch.randn(18, k), QuantSpec.parse(text))
        runs = [kernel.run(x, kernel.pack(weight, 1), weight.spec, None, static("int8"))
                for kernel in (row(f"linear/{isa}"), row("linear/reference"))]  # fmt: skip
        assert torch.equal(*runs)


def test_sizes_whose_product_does_not_fit_are_refused() -> None:
    huge = 2**40
    for call in (
        lambda: cpu.native.linear_layout_bytes(8, huge, huge),
        lambda: cpu.native.decoded_layout_bytes(4, huge, huge),
        lambda: cpu.native.conv_layout_bytes(4, huge, huge, 3, 3, 1),
    ):
        with pytest.raises(ValueError, match="size too large"):
            call()
    x, weight, one = torch.zeros(1, 1, 4, 4), torch.zeros(4, dtype=torch.uint8), torch.ones(1)
    sums = torch.zeros(1, dtype=torch.int32)

    def conv2d(*shape: list[int]) -> Tensor:
        return operators.call(OPS.conv2d, x, weight, one, sums, None, one, None, *shape, 1, 8, -128, 127, 0)

    with pytest.raises(KernelError, match="does not fit an image"):
        conv2d([huge, 1], [1, 1], [0, 0], [huge, 1])
    # From Python it is torch that refuses, which allocates the result.
    with pytest.raises((KernelError, RuntimeError), match=r"overflowed|size too large"):
        conv2d([3, 3], [1, 1], [huge, huge], [1, 1])
    with pytest.raises((KernelError, RuntimeError)):  # the copy that a view of 2**60 elements would need
        OPS.linear(torch.zeros(1).expand(2**30, 2**30), weight, one, sums, None, one, None, 8, -128, 127, 0)


def test_constants_of_another_type_shape_or_stride_are_refused() -> None:
    layout, scale, sums = grouped.pack(quantize(torch.randn(16, 64), QuantSpec.parse("int4/group32")))
    x = torch.zeros(2, 64)

    def grouped_linear(
        layout: Tensor = layout, scale: Tensor = scale, sums: Tensor = sums, bias: Tensor | None = None
    ) -> Tensor:
        return operators.call(OPS.grouped_linear, x, layout, scale, sums, bias, None, None, 16, 32, 4, -128, 127, 0)

    weight = decoded.pack(quantize(torch.randn(16, 64), QuantSpec.parse("int4/asym/group32")))

    def decoded_linear(bias: Tensor | None = None, size: int = 32, **change: Tensor) -> Tensor:
        return operators.call(OPS.decoded_linear, x, *weight._replace(**change), bias, 16, size, 4, 0)

    assert grouped_linear().shape == decoded_linear().shape == (2, 16)
    bad: list[Callable[[], Tensor]] = [
        lambda: grouped_linear(layout=layout.repeat_interleave(2)[::2]),
        lambda: grouped_linear(layout=layout.to(torch.int16)),
        lambda: grouped_linear(scale=scale.double()),
        lambda: grouped_linear(scale=scale.repeat_interleave(2, -1)[..., ::2]),
        lambda: grouped_linear(sums=sums.long()),
        lambda: grouped_linear(bias=torch.zeros(16).double()),
        lambda: grouped_linear(bias=torch.zeros(15)),
        lambda: decoded_linear(layout=weight.layout.repeat_interleave(2)[::2]),
        lambda: decoded_linear(table=weight.table[:8]),
        lambda: decoded_linear(scales=weight.scales[..., :8].contiguous()),
        lambda: decoded_linear(scales=weight.scales.half()),
        lambda: decoded_linear(zeros=weight.scales[:, :1].contiguous()),
        lambda: decoded_linear(bias=torch.zeros(32)[::2]),
        lambda: decoded_linear(size=16),
        lambda: decoded_linear(size=-1),
    ]
    for call in bad:
        with pytest.raises(KernelError, match=r"do not fit|do not divide"):
            call()


def test_passes_of_a_training_step_check_types_and_sizes() -> None:
    x, one, bounds = torch.randn(4, 6), torch.ones(1), [-128, 127]
    for call in (
        lambda: passes._centred_codes(x.double(), one, None, bounds, False),
        lambda: passes._centred_codes(x, torch.ones(2), None, bounds, False),
        lambda: passes._weight_codes(x.half(), one, bounds),
        lambda: passes._weight_codes(x, torch.ones(3), bounds),
        lambda: passes._straight_through(x.double(), x, one, None, bounds, True, 1),
        lambda: passes._straight_through(x[:3], x, one, None, bounds, True, 1),
        lambda: passes._straight_through(x, x, torch.ones(3), None, bounds, True, 4),
        lambda: passes._moments(x.double(), torch.zeros(6)),
    ):
        with pytest.raises(KernelError, match=r"takes float32|do not fit|gradient"):
            call()


def test_instruction_sets_that_the_machine_lacks_are_refused() -> None:
    missing = [number for name, number in cpu.ISA.items() if name not in ISAS] + [99, -1]
    x, one, sums = torch.zeros(1, 4), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    layout = cpu.pack_linear(torch.zeros(1, 4, dtype=torch.int8), 8)
    filters = cpu.pack_conv(torch.zeros(1, 4, 1, 1, dtype=torch.int8), 8, 1)
    weight = decoded.pack(quantize(torch.randn(1, 4), QuantSpec.parse("int8/channel")))
    lanes, image = torch.zeros(1, 1, 16), x.view(1, 4, 1, 1)
    for isa in missing:
        for arguments in (
            lambda isa: (OPS.linear, x, layout, one, sums, None, one, None, 8, -128, 127, isa),
            lambda isa: (OPS.conv2d, image, filters, one, sums, None, one, None, 1, 1, 0, 1, 1, 8, -128, 127, isa),
            lambda isa: (OPS.grouped_linear, x, layout, lanes, lanes.int(), None, one, None, 1, 4, 8, -128, 127, isa),
            lambda isa: (OPS.decoded_linear, x, *weight, None, 1, 0, 8, isa),
        ):
            with pytest.raises(KernelError, match=f"instruction set {isa} is not available"):
                operators.call(*arguments(isa))


class Recorder:
    """The native module, which also notes the instruction set that products are asked to use."""

    def __init__(self) -> None:
        self.asked: set[tuple[str, int]] = set()

    def __getattr__(self, name: str) -> Callable[..., object]:
        function = getattr(cpu_native, name)
        if isinstance(function, type):
            return function

        def call(*arguments: object) -> object:
            if name in ("linear", "conv2d", "grouped_linear", "decoded_linear"):
                assert isinstance(arguments[0], int)
                self.asked.add((name, arguments[0]))
            return function(*arguments)

        return call


cpu_native = cpu.native


@pytest.mark.skipif(operators.implementation() == "C++", reason="C++ operators do not pass through the native module")
@pytest.mark.parametrize("isa", ISAS)
def test_a_machine_with_fewer_features_runs_its_own_kernels(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 9), nn.Linear(9, 5))
    x = torch.randn(2, 3, 8, 8)
    simulated = calibrated(net, "w8a8", [x]).eval()
    features = frozenset({"native"} if isa == "portable" else {"native", isa})
    shipped, expected = convert(simulated, features=features), simulated(x)
    recorder = Recorder()
    monkeypatch.setattr(cpu, "native", recorder)
    assert torch.equal(shipped(x), expected)
    assert recorder.asked == {("linear", cpu.ISA[isa]), ("conv2d", cpu.ISA[isa])}, shipped


ODD = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45, -0.0, 0.025, 0.1])


@pytest.mark.parametrize(
    "input",
    [static("int8"), static("uint8/asym", zero=93.0), static("uint4/asym", zero=15.0)],
    ids=lambda a: str(a.spec),
)
def test_nan_and_infinity_mean_the_same_code_in_every_row(input: Activation) -> None:
    """NaN is the lowest code and infinities are the ends of the range, in vectors, their tails and in torch."""
    x = torch.randn(7, 64)
    x[torch.rand(7, 64) < 0.2] = torch.nan
    x[0, :10], x[3, -10:], x[5] = ODD, ODD, ODD.repeat(7)[:64]
    fmt, params = input.spec.format, input.qparams
    assert params is not None
    zero = 0.0 if params.zero_point is None else params.zero_point
    ends = (torch.tensor([fmt.qmin, fmt.qmax]) - zero) * params.scale  # two values that have these codes
    cleaned = torch.nan_to_num(x, nan=float(ends[0]), posinf=float(ends[1]), neginf=float(ends[0]))
    for text, group in (("int8/channel", ""), ("int4/group32", "groups/")):
        weight = quantize(torch.randn(21, 64), QuantSpec.parse(text))
        for name in ("linear/reference", *linear_rows(group)):
            kernel = row(name)
            packed = kernel.pack(weight, 1)
            found, wanted = (kernel.run(part, packed, weight.spec, None, input) for part in (x, cleaned))
            assert torch.equal(found, wanted), name
    image, clean = x.view(1, 7, 8, 8), cleaned.view(1, 7, 8, 8)
    filters = quantize(torch.randn(5, 7, 3, 3), QuantSpec.parse("int8/channel"))
    for name in ("conv/reference", *(f"conv/{isa}" for isa in ISAS)):
        kernel = row(name)
        packed = kernel.pack(filters, 1)
        for part in (image, image.contiguous(memory_format=torch.channels_last)):
            found = kernel.run(part, packed, filters.spec, None, input, GEOMETRY)
            assert torch.equal(found, kernel.run(clean, packed, filters.spec, None, input, GEOMETRY)), name
    sums = [row(name).run(x, x, input, input) for name in ("add/native", "add/reference")]
    assert torch.equal(sums[0], row("add/reference").run(cleaned, cleaned, input, input))
    assert torch.equal(*sums)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [(0, 0), (5, 63), (3, 17)])
def test_a_dynamic_range_of_no_number_is_an_error_in_every_row(bad: float, position: tuple[int, int]) -> None:
    x = torch.randn(6, 64)
    x[position] = bad
    for text, group in (("int8/channel", ""), ("int4/group32", "groups/")):
        weight = quantize(torch.randn(21, 64), QuantSpec.parse(text))
        for name in ("linear/reference", *linear_rows(group)):
            kernel = row(name)
            for spec in ("int8/token/dynamic", "uint8/token/asym/dynamic", "int8/dynamic"):
                with pytest.raises(NumericsError, match=r"scale.*NaN or (an )?infini"):
                    kernel.run(x, kernel.pack(weight, 1), weight.spec, None, Activation(QuantSpec.parse(spec), None))


@pytest.fixture
def many_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_more_threads_than_rows_or_blocks(name: str, many_threads: object) -> None:
    run, x = product(name, outputs=700, inputs=1024), torch.randn(3, 1024)
    found = [run(x[:m]) for m in (1, 2, 3)]
    narrow = product(name, outputs=3, inputs=1024)
    tall = torch.randn(500, 1024)
    small = narrow(tall)
    torch.set_num_threads(1)
    assert all(torch.equal(out, run(x[:m])) for m, out in zip((1, 2, 3), found, strict=True))
    assert torch.equal(small, narrow(tall))


def test_calls_from_several_threads_equal_serial_ones(many_threads: object) -> None:
    """Each caller has working memory of its own, and no call waits for the interpreter."""
    torch.set_num_threads(2)
    runs = [product(name, outputs=130, inputs=640) for name in CASES]
    filters = quantize(torch.randn(24, 16, 3, 3), QuantSpec.parse("int8/channel"))
    kernel = row(f"conv/{ISAS[-1]}")
    packed, input = kernel.pack(filters, 1), static("int8")
    inputs = [torch.randn(37, 640, generator=torch.Generator().manual_seed(i)) for i in range(8)]

    def call(i: int) -> list[Tensor]:
        x = inputs[i % 8]
        image = x.view(1, 16, 37, 40)
        return [*(run(x) for run in runs), kernel.run(image, packed, filters.spec, None, input, GEOMETRY)]

    serial = [call(i) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(call, range(32))):
            assert all(torch.equal(a, b) for a, b in zip(found, serial[i % 8], strict=True))


def test_a_scale_per_row_needs_a_row_for_each() -> None:
    weight, kernel = quantize(torch.randn(5, 64), QuantSpec.parse("int8/channel")), row("linear/portable")
    x = torch.randn(3, 64)
    spec = QuantSpec.parse("uint8/token/asym/dynamic")
    with pytest.raises(KernelError, match="scale has 4 values, expected 1 or 3"):
        kernel.run(
            x, kernel.pack(weight, 1), weight.spec, None, Activation(spec, live_qparams(torch.randn(4, 64), spec))
        )
