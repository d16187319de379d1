"""Rotation: the model stays, outliers go, and models whose stream is not to be rotated are refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import IDS, Decoder, RMSNorm, decoder, prepared, relative
from torch import Tensor, nn

import bitwright as bw
from bitwright.algorithms.pipeline import outcomes
from bitwright.algorithms.rotate import rotate
from bitwright.graph.dataflow import call
from nets import one_thread  # noqa: F401


def kurtosis(model: nn.Module) -> float:
    """Of the residual stream in front of the last norm."""
    seen: list[Tensor] = []
    hook = model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS[0])
    hook.remove()
    x = seen[0].flatten() - seen[0].mean()
    return (x**4).mean().item() / (x**2).mean().item() ** 2


@pytest.mark.parametrize("width", [32, 40, 48])
def test_the_model_stays_and_outliers_go(width: int) -> None:
    net = decoder(width=width)
    model = prepared(net, IDS[0])
    found = rotate(model, IDS, call, {"seed": 0})
    assert {o.path for o in found} == {"embed", "head"} | {
        f"blocks.{i}.{name}" for i in range(2) for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    with torch.no_grad():
        assert relative(model(IDS[0]), net(IDS[0])) < 1e-10
    assert kurtosis(model) < 0.5 * kurtosis(net)
    assert all((module.weight == 1).all() for module in model.modules() if isinstance(module, RMSNorm))


def test_in_float64_it_stays_to_the_last_digits() -> None:
    net = decoder(bias=True)
    model = prepared(net, IDS[0]).double()
    rotate(model, IDS, call, {"seed": 3})
    with torch.no_grad():
        wanted = net.double()(IDS[0])
        assert (model(IDS[0]) - wanted).abs().max() < 1e-12 * wanted.abs().max()


def test_four_bits_on_both_sides_gain_and_the_rotated_model_ships(tmp_path: Path) -> None:
    net, errors = decoder(width=64), []
    sites = {"embed.weight": "float", "*.o.*": "float", "*.down.*": "float"}  # what these read is not rotated
    for steps in ((), ("rotate",)):
        model = prepared(net, IDS[0], "w4a4", sites=sites, steps=steps)
        bw.calibrate(model, IDS)
        with torch.no_grad():
            errors.append(relative(model(IDS[0]), net(IDS[0])))
    assert errors[1] < 0.7 * errors[0]
    bw.save(bw.convert(model), tmp_path / "shipped")
    with torch.no_grad():
        assert torch.equal(bw.load(tmp_path / "shipped", decoder(width=64))(IDS[0]), model(IDS[0]))
    assert all(not o.skipped for o in outcomes(model))


class Scaled(Decoder):
    """Multiplies its embeddings by a constant."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * 2.0
        return self.head(self.norm(self.blocks[1](self.blocks[0](x))))


class OffRMSNorm(RMSNorm):
    """Not what it seems."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[..., :1]


REFUSED: list[tuple[Any, str]] = [
    (lambda: decoder(norm=nn.LayerNorm), "'blocks.0.norm1' subtracts the mean"),
    (lambda: decoder(tied=True), "'embed' shares its weight with another module"),
    (Scaled, "'mul' reads the residual stream without a norm before it"),
    (lambda: decoder(norm=OffRMSNorm), "computes something else"),
    (lambda: nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 4)), "'1' reads the residual stream without a norm"),
    (lambda: nn.Sequential(nn.Embedding(50, 8), RMSNorm(8)), "the output of '1' is an output of the model"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_other_models_are_refused_and_left_as_they_were(make: Any, reason: str) -> None:
    model = prepared(make(), IDS[0])
    before = [p.clone() for p in model.parameters()]
    [found] = rotate(model, IDS, call, {"seed": 0})
    assert reason in found.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
