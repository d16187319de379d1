"""Fold points: which are found, that folding changes nothing in float, and that what would change is refused."""

from __future__ import annotations

import pytest
import torch
from decoders import IDS, RMSNorm, decoder, prepared
from torch import Tensor, nn

from bitwright.algorithms.scaling import close, find_points, fold, width_of
from bitwright.graph.dataflow import call
from nets import one_thread  # noqa: F401


@pytest.mark.parametrize(("norm", "bias"), [(RMSNorm, False), (nn.LayerNorm, True)])
def test_norms_value_projections_and_gates_absorb_factors_exactly(norm: type, bias: bool) -> None:
    net = decoder(norm=norm, bias=bias)
    model = prepared(net, IDS[0])
    _, points, refused = find_points(model, IDS[0], call)
    named = {(p.source, p.consumers): (p.repeats, p.head) for p in points}
    assert named == {
        pair: heads
        for i in range(2)
        for pair, heads in {
            (f"blocks.{i}.norm1", tuple(f"blocks.{i}.{n}" for n in "qkv")): (1, 1),
            (f"blocks.{i}.v", (f"blocks.{i}.o",)): (2, 8),
            (f"blocks.{i}.norm2", (f"blocks.{i}.gate", f"blocks.{i}.up")): (1, 1),
            (f"blocks.{i}.up", (f"blocks.{i}.down",)): (1, 1),
        }.items()
    } | {("norm", ("head",)): (1, 1)}
    assert not refused
    model, wanted = model.double(), net.double()(IDS[0])
    generator = torch.Generator().manual_seed(2)
    for point in points:
        fold(model, point, torch.rand(width_of(model, point), generator=generator) * 4 + 0.1)
    with torch.no_grad():
        found = model(IDS[0])
    assert (found - wanted).abs().max() < 5e-14 * wanted.abs().max()


class PostNorm(nn.Module):
    """The norm's output is also the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.outer(self.inner(x).relu())


class OneMoreRMSNorm(RMSNorm):
    """Multiplies by one more than its weight, as some libraries do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def test_what_would_change_the_model_is_refused_with_the_reason() -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    _, points, refused = find_points(prepared(PostNorm(), x), x, call)
    assert not points
    assert refused == {("inner",): "its input also goes into 'add_0'", ("outer",): "its input comes from 'relu'"}
    net = nn.Sequential(OneMoreRMSNorm(8), nn.Linear(8, 8), RMSNorm(8), nn.Linear(8, 4), nn.Linear(4, 3))
    kept = [p.clone() for p in net.parameters()]
    _, points, refused = find_points(prepared(net, x), x, call)
    assert [p.source for p in points] == ["2"]
    assert refused == {("1",): "what '0' absorbs changes what the model computes", ("4",): "its input comes from '3'"}
    assert all(torch.equal(a, b) for a, b in zip(kept, net.parameters(), strict=True))


def test_layers_with_shared_parameters_are_left_alone() -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    norm = nn.LayerNorm(8)
    twin = nn.LayerNorm(8)
    twin.weight = norm.weight
    net = nn.Sequential(norm, nn.Linear(8, 8), twin, nn.Linear(8, 4))
    _, points, refused = find_points(prepared(net, x), x, call)
    assert not points
    assert set(refused.values()) == {f"'{i}' shares its parameters with another module" for i in (0, 2)}


def test_tensors_are_close_relative_to_the_largest_value() -> None:
    assert close(torch.tensor([1e-7, 1.0]), torch.tensor([0.0, 1.0]))
    assert not close(torch.tensor([1e-4, 1.0]), torch.tensor([0.0, 1.0]))
    assert close(torch.tensor([-torch.inf, 1.0]), torch.tensor([-torch.inf, 1.0]))
