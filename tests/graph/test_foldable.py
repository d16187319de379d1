"""Fold points read off a record: attention written out, bilinear gates, several readers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitwright.graph.dataflow import record
from bitwright.graph.foldable import FoldPoint, fold_points, query_and_key


class Written(nn.Module):
    """Attention of products and a softmax; two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.v, self.o, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).view(2, 3, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        probs = torch.softmax(q @ k.transpose(-2, -1) / 2.0, -1)
        mixed = self.o((probs @ v).transpose(1, 2).reshape(2, 3, 8))
        return x + mixed * self.other(y)


LINEARS = ("q", "k", "v", "o", "other")


def test_attention_written_out() -> None:
    net = Written()
    flow = record(net, torch.randn(2, 3, 8))
    points, refused = fold_points(flow, net, LINEARS)
    assert points == [FoldPoint("norm", ("q", "k", "v", "other")), FoldPoint("v", ("o",))]
    assert not refused
    assert query_and_key(flow, net, LINEARS) == {"q", "k"}


def test_layers_that_are_not_asked_about_count_as_other_readers() -> None:
    net = Written()
    points, refused = fold_points(record(net, torch.randn(2, 3, 8)), net, ("q", "k", "v", "o"))
    assert points == [FoldPoint("v", ("o",))]
    assert refused == {("q", "k", "v"): "its input also goes into 'other'"}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.layer(y) + self.layer(y)


def test_a_layer_that_runs_twice_has_no_fold_point() -> None:
    net = Twice()
    points, refused = fold_points(record(net, torch.randn(2, 8)), net, ["layer"])
    assert not points
    assert refused == {("layer", "layer"): "it runs several times in one forward"}
