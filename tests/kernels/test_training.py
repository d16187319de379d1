"""The native products of a training step against those in torch: equal bits forward, gradients to rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitwright.kernels import cpu, reference, training
from bitwright.kernels.reference import Codes, Geometry, largest_code
from bitwright.kernels.training import Operand
from bitwright.numerics.affine import live_qparams
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.numerics.ste import Learning, codes_with_gradient

pytestmark = pytest.mark.skipif(cpu.native is None, reason="no native kernels here")

GROUPED = [
    ("int4/group8", "uint8/asym", "lsq"),
    ("int8/group20", "int8", "none"),
    ("int3/group4", "uint4/asym", "lsq+"),
    ("int4/group20", "int8/token/dynamic", "lsq"),
    ("int4/group40", "int8/token/dynamic", "lsq"),
]
GEOMETRIES = {
    "3x3": (Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1), (4, 8, 9, 7), (6, 8, 3, 3)),
    "strided groups": (Geometry((3, 3), (2, 1), (1, 0), (1, 2), 2), (3, 8, 9, 11), (6, 4, 3, 3)),
    "depthwise": (Geometry((3, 3), (1, 1), (1, 1), (1, 1), 8), (2, 8, 6, 6), (8, 1, 3, 3)),
    "1x1": (Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1), (2, 16, 5, 5), (33, 16, 1, 1)),
    "1x1, strides": (Geometry((1, 1), (2, 3), (0, 0), (1, 1), 1), (4, 16, 7, 8), (24, 16, 1, 1)),
    "linear": (None, (7, 3, 40), (21, 40)),
}
PAIRS = [
    ("int8/channel", "uint8/asym", "lsq"),
    ("int8", "int8", "lsq"),
    ("int4/channel", "uint4/asym", "lsq+"),
    ("int4/channel", "uint4", "pact"),
    ("ternary/channel", "int8", "none"),
]


def operand(x: Tensor, text: str, rule: str, share: float = 0.6) -> tuple[Operand, list[Tensor]]:
    """An operand whose range clips some values, and the parameters that learn."""
    spec = QuantSpec.parse(text)
    found = live_qparams(x * share, spec)
    scale = found.scale.clone().requires_grad_(rule != "none")
    offset = None
    if rule == "lsq+" and found.zero_point is not None:
        offset = (-found.zero_point * found.scale).requires_grad_()
    learning = Learning(rule, 0.3)  # type: ignore[arg-type]
    learned = [t for t in (scale, offset) if t is not None and t.requires_grad]
    return Operand(spec, found, learning, scale if scale.requires_grad else None, offset), learned


def in_torch(x: Tensor, weight: Tensor, bias: Tensor, a: Operand, w: Operand, geometry: Geometry | None) -> Tensor:
    def codes(t: Tensor, side: Operand) -> Codes:
        values = codes_with_gradient(t, side.spec, side.qparams, side.learning, side.scale, side.offset)
        return Codes(values, side.qparams.scale, largest_code(side.spec))

    if geometry is None:
        return reference.linear(codes(x, a), codes(weight, w), bias)
    return reference.conv2d(codes(x, a), codes(weight, w), bias, geometry)


def gradients(out: Tensor, direction: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((out * direction).sum(), leaves))


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert error < tolerance


@pytest.mark.parametrize("kind", GEOMETRIES)
@pytest.mark.parametrize(("weight_spec", "input_spec", "rule"), PAIRS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_native_products_equal_those_in_torch(
    kind: str, weight_spec: str, input_spec: str, rule: str, layout: torch.memory_format
) -> None:
    geometry, shape, filters = GEOMETRIES[kind]
    x = torch.randn(shape)
    x = x.relu() if input_spec == "uint4" else x
    x = (x.contiguous(memory_format=layout) if x.dim() == 4 else x).requires_grad_()
    weight, bias = torch.randn(filters, requires_grad=True), torch.randn(len(torch.empty(filters)), requires_grad=True)
    (a, learn_a) = operand(x.detach(), input_spec, rule)
    (w, learn_w) = operand(weight.detach(), weight_spec, "none" if rule == "none" else "lsq")
    assert training.serves(x, weight, a.spec, w.spec)
    found = training.product(x, weight, bias, a, w, geometry)
    expected = in_torch(x, weight, bias, a, w, geometry)
    assert torch.equal(found, expected)
    leaves = [x, weight, bias, *learn_a, *learn_w]
    direction = torch.randn_like(found)
    for ours, theirs in zip(gradients(found, direction, leaves), gradients(expected, direction, leaves), strict=True):
        close(ours, theirs, 2e-5)


@pytest.mark.parametrize(("weight_spec", "input_spec", "rule"), GROUPED)
def test_native_products_with_groups_equal_those_in_torch(weight_spec: str, input_spec: str, rule: str) -> None:
    live = input_spec.endswith("dynamic")
    x, weight = torch.randn(7, 3, 40, requires_grad=True), torch.randn(21, 40, requires_grad=True)
    bias = torch.randn(21, requires_grad=True)
    a, learn_a = operand(x.detach(), input_spec, "none" if live else rule, share=1.0 if live else 0.6)
    w, learn_w = operand(weight.detach(), weight_spec, "none" if rule == "none" else "lsq")
    assert training.serves(x, weight, a.spec, w.spec)
    found, expected = (product(x, weight, bias, a, w, None) for product in (training.product, in_torch))
    assert torch.equal(found, expected)
    leaves, direction = [x, weight, bias, *learn_a, *learn_w], torch.randn_like(found)
    for ours, theirs in zip(gradients(found, direction, leaves), gradients(expected, direction, leaves), strict=True):
        close(ours, theirs, 2e-5)


def test_groups_that_the_kernel_cannot_read_are_left_to_torch() -> None:
    x, weight, int8 = torch.randn(2, 40), torch.randn(3, 40), QuantSpec.parse("int8")
    assert not training.serves(x, weight, int8, QuantSpec.parse("int4/group10"))
    assert training.serves(torch.randn(2, 65600 * 2), torch.randn(3, 65600 * 2), int8, QuantSpec.parse("int4/group64"))


@pytest.mark.parametrize("kind", ["3x3", "linear"])
def test_a_narrow_backward_is_near_and_leaves_the_forward_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, shape, filters = GEOMETRIES[kind]
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(filters, requires_grad=True)
    (a, learn_a), (w, learn_w) = (
        operand(x.detach(), "uint8/asym", "lsq"),
        operand(weight.detach(), "int8/channel", "lsq"),
    )
    wide = training.product(x, weight, None, a, w, geometry)
    monkeypatch.setattr(training, "_HAS_BF16", True)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = training.product(x, weight, None, a, w, geometry)
    assert narrow.dtype is torch.float32
    assert torch.equal(narrow, wide)
    direction = torch.randn_like(wide)
    leaves = [x, weight, *learn_a, *learn_w]
    pairs = list(zip(gradients(narrow, direction, leaves), gradients(wide, direction, leaves), strict=True))
    for ours, theirs in pairs:
        assert ours.dtype is torch.float32
        close(ours, theirs, 0.05)
    assert not all(torch.equal(ours, theirs) for ours, theirs in pairs)  # it really was computed in bfloat16


@pytest.mark.parametrize("input_spec", ["uint8/asym", "int8/token", "int8", "uint8/token/asym"])
def test_ranges_from_the_live_tensor_pass_every_gradient(input_spec: str) -> None:
    x, weight = torch.randn(5, 24, requires_grad=True), torch.randn(7, 24, requires_grad=True)
    spec = QuantSpec.parse(f"{input_spec}/dynamic")
    a = Operand(spec, live_qparams(x.detach(), spec), Learning(), None, None)
    w, _ = operand(weight.detach(), "int8/channel", "none")
    found = training.product(x, weight, None, a, w, None)
    assert torch.equal(found, in_torch(x, weight, torch.zeros(7), a, w, None))
    direction = torch.randn_like(found)
    dx, dw = gradients(found, direction, [x, weight])
    values = codes_with_gradient(weight.detach(), w.spec, w.qparams, Learning(), None, None) * w.qparams.scale
    close(dx, direction @ values, 1e-5)
    close(dw, gradients(in_torch(x, weight, torch.zeros(7), a, w, None), direction, [weight])[0], 1e-5)


@pytest.mark.parametrize("rule", ["lsq", "none"])
@pytest.mark.parametrize("count", [1, 15, 16, 33, 8192, 40001])
def test_the_pass_through_a_quantizer_is_that_of_torch_for_any_length(rule: str, count: int) -> None:
    a, b = torch.randn(1, count, requires_grad=True), torch.randn(1, count, requires_grad=True)
    (left, learn_a), (right, learn_b) = operand(a.detach(), "uint8/asym", rule), operand(b.detach(), "int4", rule)
    assert training.serves_add(a, b, left.spec, right.spec)
    found = training.add(a, b, left, right)

    def value(x: Tensor, side: Operand) -> Tensor:
        codes = codes_with_gradient(x, side.spec, side.qparams, side.learning, side.scale, side.offset)
        return codes * side.qparams.scale

    expected = value(a, left) + value(b, right)
    assert torch.equal(found, expected)
    direction = torch.randn_like(found)
    leaves = [a, b, *learn_a, *learn_b]
    for ours, theirs in zip(gradients(found, direction, leaves), gradients(expected, direction, leaves), strict=True):
        close(ours, theirs, 1e-4)


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    def run(threads: int) -> list[Tensor]:
        torch.manual_seed(0)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            a, b = torch.randn(3, 90001, requires_grad=True), torch.randn(3, 90001, requires_grad=True)
            (left, learn_a), (right, learn_b) = (
                operand(a.detach(), "uint8/asym", "lsq"),
                operand(b.detach(), "int8", "lsq"),
            )
            out = training.add(a, b, left, right)
            return [*gradients(out, torch.randn_like(out), [a, b, *learn_a, *learn_b])]
        finally:
            torch.set_num_threads(before)

    assert all(torch.equal(one, two) for one, two in zip(run(1), run(2), strict=True))


@pytest.mark.parametrize("shape", [(9, 5, 4, 3), (700, 6), (2, 33, 17, 16)])
def test_moments_are_unbiased_variance_and_mean(shape: tuple[int, ...]) -> None:
    y = torch.randn(shape) * 3 + 100
    origin = torch.full((shape[1],), 99.0)
    axes = [axis for axis in range(y.dim()) if axis != 1]
    for laid_out in (y, y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y):
        var, mean = training.moments(laid_out, origin)
        expected = torch.var_mean(y.double(), axes, correction=1)
        torch.testing.assert_close(var, expected[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(mean, expected[1], rtol=1e-12, atol=0)


REFUSED: dict[str, Callable[[], tuple[Tensor, Tensor, str, str]]] = {
    "float64": lambda: (torch.zeros(2, 4).double(), torch.zeros(3, 4), "uint8", "int8"),
    "no rows": lambda: (torch.zeros(0, 4), torch.zeros(3, 4), "uint8", "int8"),
    "16 bits": lambda: (torch.zeros(2, 4), torch.zeros(3, 4), "int16", "int8"),
    "unsigned weight": lambda: (torch.zeros(2, 4), torch.zeros(3, 4), "uint8", "uint8"),
    "a sum that could pass 32 bits": lambda: (torch.zeros(1, 70000), torch.zeros(1, 70000), "uint8", "int8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_products_that_are_not_exact_natively_are_left_to_torch(case: str) -> None:
    x, weight, x_spec, w_spec = REFUSED[case]()
    assert not training.serves(x, weight, QuantSpec.parse(x_spec), QuantSpec.parse(w_spec))


def test_only_the_operands_are_kept_for_the_backward() -> None:
    x, weight = torch.randn(64, 256, requires_grad=True), torch.randn(32, 256, requires_grad=True)
    a, w = operand(x.detach(), "uint8/asym", "lsq")[0], operand(weight.detach(), "int8/channel", "lsq")[0]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        training.product(x, weight, None, a, w, None)
    large = [t for t in kept if t.numel() > 64]
    assert {t.data_ptr() for t in large} == {x.data_ptr(), weight.data_ptr()}


def test_qparams_are_constants_of_a_product() -> None:
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    fixed = Operand(
        QuantSpec.parse("uint8/asym"), live_qparams(x, QuantSpec.parse("uint8/asym")), Learning(), None, None
    )
    w = Operand(QuantSpec.parse("int8"), QParams(torch.tensor([0.01])), Learning(), None, None)
    assert not training.product(x, weight, None, fixed, w, None).requires_grad


@pytest.mark.parametrize("kind", ["3x3", "linear"])
def test_nan_in_an_activation_reaches_the_loss(kind: str) -> None:
    geometry, shape, filters = GEOMETRIES[kind]
    x, weight = torch.randn(shape), torch.randn(filters)
    a, w = operand(x, "uint8/asym", "none")[0], operand(weight, "int8/channel", "none")[0]
    x.view(-1)[5] = torch.nan
    assert training.product(x, weight, None, a, w, geometry).isnan().any()
