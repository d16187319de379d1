"""The integer product with zero points, and stochastic rounding (algorithms.md 2.4, 2.5)."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.numerics.affine import QParams, decode, encode, round_stochastic
from bitwright.numerics.spec import QuantSpec


@given(
    st.integers(1, 40),
    st.integers(-8, 7),
    st.integers(0, 255),
    st.sampled_from([0.5, 0.0625, 2.0]),
    st.integers(0, 999),
)
def test_a_product_of_values_is_the_product_of_codes_with_its_corrections(k, z_w, z_x, scale, seed):
    random = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, k, generator=random) * 9 for n in (3, 5))
    spec_x, spec_w = QuantSpec.parse("uint8/asym"), QuantSpec.parse("int4/asym")
    params_x, params_w = (QParams(torch.tensor([s]), torch.tensor([float(z)])) for s, z in ((scale, z_x), (0.25, z_w)))
    q_x, q_w = encode(x, spec_x, params_x).long(), encode(w, spec_w, params_w).long()
    acc = q_x @ q_w.T - z_w * q_x.sum(1, keepdim=True) - z_x * q_w.sum(1) + k * z_x * z_w
    values = decode(q_x, spec_x, params_x).double() @ decode(q_w, spec_w, params_w).double().T
    assert torch.equal(acc.double() * scale * 0.25, values)  # exact: the scales are powers of two


def test_stochastic_rounding_is_right_on_average_with_the_variance_of_a_coin():
    random = torch.Generator().manual_seed(1)
    for value in (0.3, -1.75, 2.5):
        x = torch.full((400_000,), value)
        found, part = round_stochastic(x, random), value % 1
        assert set(found.unique().tolist()) == {float(value // 1), float(value // 1 + 1)}
        deviation = (part * (1 - part)) ** 0.5
        assert abs(found.double().mean().item() - value) < 4 * deviation / len(x) ** 0.5
        assert abs(found.var().item() - deviation**2) < 0.01
