"""Tables of whole numbers in integer products: their numbers are their values; gradients pass straight through."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bitwright.kernels.reference import codes_of, largest_code, not_integers
from bitwright.kernels.row import pack_products, product_codes
from bitwright.numerics.affine import live_qparams
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.qtensor import dequantize, quantize
from bitwright.numerics.spec import QuantSpec
from bitwright.numerics.ste import Learning, codes_with_gradient, simulated

WHOLE = {"midrise2": "int3", "midrise3": "int4", "binary": "int2"}


def test_only_tables_of_whole_numbers_are_multiplied_as_integers():
    tables = {name: fmt.integer for name, fmt in FORMATS.items() if fmt.is_table and fmt.integer is not None}
    assert {name: fmt.name for name, fmt in tables.items()} == WHOLE
    assert all(fmt.qmax == largest_code(QuantSpec.parse(name)) for name, fmt in tables.items())
    uint8 = QuantSpec.parse("uint8/asym")
    assert not not_integers(QuantSpec.parse("midrise2/channel"), uint8)
    assert not_integers(QuantSpec.parse("nf4/channel"), uint8) == "needs whole numbers of at most 8 bits"
    assert not_integers(QuantSpec.parse("int8"), QuantSpec.parse("midrise3")) == "needs whole numbers of at most 8 bits"


@pytest.mark.parametrize("text", ["midrise2/channel", "midrise3", "binary/channel", "int3/channel", "midrise2/group8"])
def test_product_codes_times_the_scale_are_the_values_and_give_the_bytes_back(text):
    spec = QuantSpec.parse(text)
    stored = quantize(torch.randn(6, 16), spec)
    products = product_codes(stored)
    scale = stored.qparams.scale.repeat_interleave(8, 1) if "group" in text else stored.qparams.scale
    assert torch.equal(products.float() * scale, dequantize(stored))
    assert torch.equal(pack_products(products.to(torch.int8), spec), stored.packed)


@pytest.mark.parametrize("text", ["midrise2/channel", "midrise2/group8"])
def test_the_gradient_of_levels_passes_straight_through(text):
    spec, target = QuantSpec.parse(text), torch.randn(3, 16)
    x = torch.randn(3, 16, requires_grad=True)
    qparams = live_qparams(x.detach(), spec)
    codes = codes_with_gradient(x, spec, qparams, Learning(), None, None)
    assert torch.equal(codes.detach(), codes_of(x.detach(), spec, qparams).values)
    scale = qparams.scale.repeat_interleave(8, 1) if "group" in text else qparams.scale
    F.mse_loss(codes * scale, target).backward()
    y = x.detach().clone().requires_grad_()
    F.mse_loss(simulated(y, spec, qparams, Learning(), None, None), target).backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-6, atol=0)
