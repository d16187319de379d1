"""Weights tied across modules in training: one parameter, one quantizer, gradients that add up, one stored tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bitwright.flow.convert import convert
from bitwright.nn.layer import QLayer
from bitwright.plan.plan import Plan
from nets import calibrated, layers_of, one_thread, trained, unequal_kernels  # noqa: F401


class Chain(nn.Module):
    """Layers in a row with a ReLU between; float inputs where they take indices."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x)) if x.is_floating_point() else layer(x)
        return x


def tied(one: nn.Module, other: nn.Module, *between: nn.Module) -> Chain:
    other.weight = one.weight
    return Chain(one, *between, other)


def ids() -> Tensor:
    return torch.randint(0, 20, (4, 7))


TIES: dict[str, tuple[Callable[[], Chain], Callable[[], Tensor]]] = {
    "embedding and head": (lambda: tied(nn.Embedding(20, 16), nn.Linear(16, 20, bias=False), nn.Linear(16, 16)), ids),
    "bag and head": (lambda: tied(nn.EmbeddingBag(20, 16, mode="sum"), nn.Linear(16, 20)), ids),
    "linear": (lambda: tied(nn.Linear(8, 8), nn.Linear(8, 8)), lambda: torch.randn(5, 8)),
    "convolutions": (
        lambda: tied(nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)),
        lambda: torch.randn(3, 6, 5, 5),
    ),
    "transposed": (
        lambda: tied(nn.ConvTranspose2d(6, 6, 3, groups=2), nn.ConvTranspose2d(6, 6, 3, groups=2)),
        lambda: torch.randn(3, 6, 5, 5),
    ),
}
RULES = {"*.weight": "int4/channel", "*.input": "uint8/asym"}


def ends(model: nn.Module) -> tuple[QLayer, QLayer]:
    layers = list(layers_of(model).values())
    return layers[0], layers[-1]


@pytest.mark.parametrize("name", TIES)
def test_tied_weights_train_as_one_and_ship_as_one(name: str) -> None:
    make, example = TIES[name]
    net, x = make(), example()
    plan = Plan.preset("w8a8", net, x, sites=RULES)
    model = calibrated(net, plan, [x])
    first, last = ends(model)
    assert first.weight is last.weight
    assert first.weight_quantizer is last.weight_quantizer
    names = [name for name, parameter in model.named_parameters() if parameter is first.weight]
    assert len(names) == 1
    before = first.weight.detach().clone()
    simulated = trained(model, [x])
    first, last = ends(simulated)
    assert first.weight is last.weight
    assert not torch.equal(first.weight, before)
    assert unequal_kernels(simulated, [x]) == []
    shipped = [module for module in convert(simulated).modules() if hasattr(module, "packed")]
    assert shipped[0].packed is shipped[-1].packed


@pytest.mark.parametrize("name", TIES)
def test_gradients_of_tied_weights_and_of_their_range_add_up(name: str) -> None:
    make, example = TIES[name]
    net, x = make(), example()
    plan = Plan.preset("w8a8", net, x, sites=RULES)
    model = calibrated(net, plan, [x]).train()
    first, last = ends(model)
    quantizer = first.weight_quantizer
    with torch.no_grad():
        quantizer.scale *= 0.7
    quantizer.scale.requires_grad_(True)
    out = model(x)
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    total, scale = first.weight.grad.clone(), quantizer.scale.grad.clone()

    parts = []
    for chosen, other in ((first, last), (last, first)):  # the same forward, one end at a time as a copy without tie
        model.zero_grad()
        kept = other.weight
        other.weight = nn.Parameter(kept.detach().clone(), requires_grad=False)
        held, other.weight_quantizer = other.weight_quantizer, _frozen(quantizer)
        (model(x) * direction).sum().backward()
        parts.append((chosen.weight.grad.clone(), quantizer.scale.grad.clone()))
        other.weight, other.weight_quantizer = kept, held
    assert all(part.abs().max() > 0 for pair in parts for part in pair)
    assert torch.allclose(parts[0][0] + parts[1][0], total, rtol=1e-4, atol=1e-5)
    assert torch.allclose(parts[0][1] + parts[1][1], scale, rtol=1e-4, atol=1e-4)


def _frozen(quantizer: nn.Module) -> nn.Module:
    twin = copy.deepcopy(quantizer)
    twin.scale.requires_grad_(False)
    twin.scale.grad = None
    return twin
