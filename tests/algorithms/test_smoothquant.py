"""SmoothQuant: the balance it strikes, what it gains where a channel is an outlier, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from decoders import IDS, decoder, prepared, relative
from torch import Tensor, nn

import bitwright as bw
from bitwright.algorithms.pipeline import outcomes
from bitwright.algorithms.products import watch
from bitwright.algorithms.scaling import find_points
from bitwright.algorithms.smoothquant import smoothquant
from bitwright.graph.dataflow import call
from nets import one_thread  # noqa: F401


def most(model: nn.Module, layers: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    weights = torch.stack([model.get_submodule(path).weight.detach().abs().amax(0) for path in layers]).amax(0)
    return watch(model, IDS, call, layers)[layers[0]].most, weights


def test_half_balances_inputs_and_weights_of_all_layers_that_share_an_input() -> None:
    net = decoder()
    model = prepared(net, IDS[0])
    smoothquant(model, IDS, call, {"alpha": 0.5, "search": False})
    for layers in (("blocks.0.q", "blocks.0.k", "blocks.0.v"), ("blocks.1.gate", "blocks.1.up"), ("blocks.0.down",)):
        inputs, weights = most(model, layers)
        assert torch.allclose(inputs, weights, rtol=1e-5)
    q, k = (model.get_submodule(f"blocks.0.{name}") for name in "qk")
    ratio = q.weight / net.blocks[0].q.weight
    assert torch.allclose(ratio, ratio[:1].expand(ratio.shape))
    assert torch.allclose(k.weight / net.blocks[0].k.weight, ratio[: len(k.weight)])
    with torch.no_grad():
        assert relative(model(IDS[0]), net(IDS[0])) < 1e-10


def test_one_moves_everything_into_the_weights() -> None:
    model = prepared(decoder(), IDS[0])
    smoothquant(model, IDS, call, {"alpha": 1.0, "search": False})
    inputs, _ = most(model, ("blocks.0.gate", "blocks.0.up"))
    assert torch.allclose(inputs, torch.ones(()), rtol=1e-5)
    inputs, _ = most(model, ("blocks.0.o",))  # heads that share a value head share its factors
    assert torch.allclose(inputs.view(2, 2, 8).amax(1), torch.ones(()), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"search": True}])
def test_an_outlier_channel_costs_less(options: dict[str, bool]) -> None:
    """Per tensor on both sides; one of 16 channels is 60 times as large as the others."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32)), torch.randn(128, 16)
    with torch.no_grad():
        net[0].weight[2] = 60.0
    sites, errors = {"1.weight": "int8", "1.input": "int8"}, []
    for steps in ((), ({"name": "smoothquant", **options},)):
        model = prepared(net, x, sites=sites, steps=steps)
        bw.calibrate(model, [x])
        with torch.no_grad():
            errors.append(relative(model(x), net(x)))
            assert torch.equal(bw.convert(model)(x), model(x))
    assert errors[1] < 0.2 * errors[0]
    [found] = outcomes(model)
    assert (found.path, found.before, found.after) == (
        "0",
        pytest.approx(errors[0], rel=0.3),
        pytest.approx(errors[1], rel=0.3),
    )


def test_search_never_ends_behind_no_factors_at_all() -> None:
    model = prepared(decoder(), IDS[0], "w4a8")
    found = smoothquant(model, IDS, call, {"alpha": 0.5, "search": True})
    assert any(not o.skipped for o in found)
    assert all(o.after < o.before for o in found if not o.skipped)
    _, points, _ = find_points(model, IDS[0], call)
    assert [o.path for o in found] == [p.source for p in points]


def test_weights_alone_are_nothing_to_smooth() -> None:
    net = decoder()
    model = prepared(net, IDS[0], "w4a16")
    found = smoothquant(model, IDS, call, {"alpha": 0.5, "search": False})
    assert {o.skipped for o in found} == {"no layer behind it has both operands quantized"}
    assert torch.equal(model.blocks[0].q.weight, net.blocks[0].q.weight)
