"""Gradients of learned ranges against torch's own kernels and the vectors of the papers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitwright.numerics.affine import choose_qparams
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.numerics.ste import Learning, Rule, simulated

# Scale 0.5 and codes -8..7: values clipped below, inside, and above.
X = torch.tensor([-5.0, -1.3, -0.4, 0.1, 0.74, 2.2, 9.0])


def values(size: float = 3.0, step: float = 0.1) -> Tensor:
    """100 000 random values, and every tie and code of a scale of ``step`` well past the range."""
    random = torch.Generator().manual_seed(5)
    return torch.cat([torch.randn(100_000, generator=random) * size, torch.arange(-900, 900) * (step / 2)])


def run(
    x: Tensor,
    spec: str,
    scale: Tensor,
    rule: Rule = "none",
    *,
    zero_point: Tensor | None = None,
    offset: Tensor | None = None,
    gain: float = 1.0,
    direction: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output and the gradients to x, the scale and the offset."""
    x, learned = x.clone().requires_grad_(True), scale.clone().requires_grad_(True)
    offset = None if offset is None else offset.clone().requires_grad_(True)
    parsed = QuantSpec.parse(spec)
    y = simulated(x, parsed, QParams(scale, zero_point), Learning(rule, gain), learned, offset)
    y.backward(torch.ones_like(y) if direction is None else direction)
    assert x.grad is not None
    return y.detach(), x.grad, learned.grad, None if offset is None else offset.grad


@pytest.mark.parametrize(
    ("spec", "zero", "low", "high"),
    [("int8", 0, -128, 127), ("int4", 0, -8, 7), ("uint8/asym", 117, 0, 255), ("uint4/asym", 3, 0, 15)],
)
def test_a_fixed_range_is_torchs_fake_quantization(spec: str, zero: int, low: int, high: int) -> None:
    for step in (0.1, 0.5, 0.0371):
        x = values(step=step)
        direction = torch.randn(len(x), generator=torch.Generator().manual_seed(1))
        zero_point = torch.tensor([float(zero)]) if "asym" in spec else None
        y, dx, ds, _ = run(x, spec, torch.tensor([step]), zero_point=zero_point, direction=direction)
        other = x.clone().requires_grad_(True)
        expected = torch.fake_quantize_per_tensor_affine(other, step, zero, low, high)
        expected.backward(direction)
        assert other.grad is not None
        # torch multiplies by 1 / s, which rounds some ties to another code unless s is a power of two
        scale = torch.tensor([step])
        same = (x / scale).round() == (x * (1 / scale)).round()
        assert same.float().mean() > (0.99 if step != 0.5 else 0.9999999)
        assert torch.allclose(y[same], expected[same].detach(), rtol=0, atol=1e-6 * step * 300)
        assert torch.equal(dx[same] == 0, other.grad[same] == 0)
        assert torch.allclose(dx[same], other.grad[same], rtol=1e-6)
        assert 0 < (dx == 0).sum() < len(x)
        assert ds is None


def test_lsq_vector() -> None:
    scale = torch.tensor([0.5])
    y, dx, ds, _ = run(X, "int4", scale, "lsq")
    assert y.tolist() == [-4.0, -1.5, -0.5, 0.0, 0.5, 2.0, 3.5]
    assert dx.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    terms = [run(X[i : i + 1], "int4", scale, "lsq")[2] for i in range(len(X))]
    assert torch.cat([t for t in terms if t is not None]).tolist() == pytest.approx(
        [-8.0, -0.4, -0.2, -0.2, -0.48, -0.4, 7.0], abs=1e-6
    )
    assert ds is not None
    assert ds.item() == pytest.approx(-2.68, abs=1e-5)


def test_lsq_is_torchs_learnable_fake_quantization() -> None:
    x, scale = X.clone().requires_grad_(True), torch.tensor([0.5], requires_grad=True)
    expected = torch._fake_quantize_learnable_per_tensor_affine(x, scale, torch.tensor([0.0]), -8, 7, 1.0)
    expected.sum().backward()
    y, dx, ds, _ = run(X, "int4", scale.detach(), "lsq")
    assert torch.equal(y, expected.detach())
    assert torch.equal(dx, x.grad)
    assert torch.allclose(ds, scale.grad)


def test_lsq_clips_before_it_rounds_and_torch_after() -> None:
    """Beyond the ends by less than half a step the paper has the gradient of the clip, torch that of the rounding."""
    x = values()
    v = x / torch.tensor([0.1])
    border = ((v > 7) & (v <= 7.5)) | ((v < -8) & (v >= -8.5))
    assert border.any()
    for part, agree in ((x[~border & (v != 7) & (v != -8)], True), (x[border & (v.abs() % 1 != 0.5)], False)):
        leaf, scale = part.clone().requires_grad_(True), torch.tensor([0.1], requires_grad=True)
        torch._fake_quantize_learnable_per_tensor_affine(leaf, scale, torch.tensor([0.0]), -8, 7, 1.0).sum().backward()
        _, dx, ds, _ = run(part, "int4", scale.detach(), "lsq")
        steps = part / torch.tensor([0.1])
        off = (steps - steps.round()).abs() < 0.499  # ties differ, see above
        assert torch.equal(dx[off], leaf.grad[off]) is agree
        assert torch.allclose(ds, scale.grad, rtol=1e-2) is agree


@pytest.mark.parametrize("gain", [1.0, 0.25])
def test_the_gain_multiplies_the_ranges_gradient_only(gain: float) -> None:
    _, dx, ds, _ = run(X, "int4", torch.tensor([0.5]), "lsq", gain=gain)
    assert ds.item() == pytest.approx(-2.68 * gain, abs=1e-5)
    assert dx.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def published(x: Tensor, scale: Tensor, offset: Tensor, low: int, high: int) -> Tensor:
    """LSQ+ as printed: ``rint(clamp((x - beta) / s, low, high)) s + beta`` with a straight-through rounding."""
    v = ((x - offset) / scale).clamp(low, high)
    return (v + (v.round() - v).detach()) * scale + offset


@pytest.mark.parametrize(("spec", "zero"), [("uint4/asym", 3.0), ("int4/asym", -2.0), ("uint8/asym", 40.0)])
def test_lsq_plus_has_the_published_gradients(spec: str, zero: float) -> None:
    fmt = QuantSpec.parse(spec).format
    x = torch.randn(5000, generator=torch.Generator().manual_seed(2)).double() * 2
    scale, offset = torch.tensor([0.25]).double(), torch.tensor([-zero * 0.25]).double()
    leaves = [leaf.clone().requires_grad_(True) for leaf in (x, scale, offset)]
    expected = published(*leaves, fmt.qmin, fmt.qmax)
    expected.sum().backward()
    zero_point = torch.tensor([zero])
    y, dx, ds, db = run(x.float(), spec, scale.float(), "lsq+", zero_point=zero_point, offset=offset.float())
    assert torch.allclose(y.double(), expected.detach(), atol=1e-5)
    for found, leaf in zip((dx, ds, db), leaves, strict=True):
        assert found is not None
        assert leaf.grad is not None
        assert torch.allclose(found.double(), leaf.grad, rtol=1e-4)


def test_the_offset_learns_where_values_are_clipped_only() -> None:
    fixed = {"zero_point": torch.tensor([3.0]), "offset": torch.tensor([-1.5])}
    for x, expected in (([0.1, 0.3], 0), ([-9.0, 9.0, 20.0], 3)):
        _, _, _, db = run(torch.tensor(x), "uint4/asym", torch.tensor([0.5]), "lsq+", **fixed)
        assert db.item() == expected


def test_pact_is_a_clamp_with_the_gradient_of_its_upper_end() -> None:
    alpha = 2.25
    scale = torch.tensor([alpha / 15])
    x = torch.cat([values(2.0), torch.tensor([alpha, 0.0])])
    y, dx, ds, _ = run(x, "uint4", scale, "pact")
    assert (y - x.clamp(0, alpha)).abs().max() <= scale.item() / 2 + 1e-6
    inside = (x / scale >= 0) & (x / scale <= 15)
    assert torch.equal(dx, inside.float())
    assert ds.item() == pytest.approx(15 * (x / scale >= 15).sum().item())  # d alpha = 1 there, d alpha / d s = 15


def test_groups_and_channels_have_their_own_sums() -> None:
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
    for spec, rows in (("int4/channel", x), ("int4/group4", x.view(12, 4))):
        parsed = QuantSpec.parse(spec)
        shape = parsed.granularity.scale_shape(x.shape)
        scale = torch.rand(shape, generator=torch.Generator().manual_seed(4)) * 0.1 + 0.1
        _, dx, ds, _ = run(x, spec, scale, "lsq")
        for row, step, found, gradient in zip(rows, scale.flatten(), ds.flatten(), dx.view_as(rows), strict=True):
            _, alone, expected, _ = run(row, "int4", step.view(1), "lsq")
            assert torch.allclose(found, expected, atol=1e-5)
            assert torch.equal(gradient, alone)


def test_a_range_learned_by_gradient_descent_finds_the_scale_of_least_error() -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(6))
    spec = QuantSpec.parse("int4")
    scale = choose_qparams(x.min().view(1), x.max().view(1), spec).scale.clone().requires_grad_(True)
    for _ in range(200):
        scale.grad = None
        error = (simulated(x, spec, QParams(scale.detach()), Learning("lsq"), scale, None) - x).square().mean()
        error.backward()
        with torch.no_grad():
            scale -= 0.05 * scale.grad
    # Gaussian, 16 uniform levels without a level shift: step 0.3352, so 0.0115 squared error (Max 1960, table II)
    assert scale.item() == pytest.approx(0.335, rel=0.05)
    assert error.item() == pytest.approx(0.0115, rel=0.1)
