"""Which modules are reconstructed together, in published architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from bitwright.algorithms.blocks import find_blocks
from bitwright.graph.dataflow import call
from nets import ResidualBlock, ResNet20, layers_of, one_thread  # noqa: F401

IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def blocks_of(net: nn.Module, example: Any) -> dict[str, list[str]]:
    model = bw.prepare(net.eval(), bw.Plan.preset("w8a8", net, example))
    return find_blocks(model, example, call, layers_of(model))


def test_basic_blocks_of_a_residual_network() -> None:
    blocks = blocks_of(ResNet20(), torch.zeros(2, 3, 32, 32))
    units = {f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(3)}
    assert {path for path, layers in blocks.items() if len(layers) == 2} == units
    assert blocks["layer2.0"] == ["layer2.0.conv1", "layer2.0.conv2"]
    assert blocks["conv1"] == ["conv1"]


def test_a_plain_network_is_reconstructed_layer_by_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 5), nn.ReLU())
    assert blocks_of(net, torch.zeros(2, 3, 6, 6)) == {path: [path] for path in ("0", "2", "4")}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_transformer_layers_of_a_library(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 50}
    if name == "bert":
        net = transformers.BertModel(transformers.BertConfig(num_attention_heads=2, **sizes), add_pooling_layer=False)
        wanted = {"encoder.layer.0": 6, "encoder.layer.1": 6}
    else:
        net = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=4, **sizes))
        wanted = {"model.layers.0": 7, "model.layers.1": 7}
    found = {path: len(inside) for path, inside in blocks_of(net, {"input_ids": IDS}).items() if len(inside) > 1}
    assert found == wanted


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Long(nn.Module):
    """Units, and a way around all of them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.units, self.last = nn.Sequential(*(Feed() for _ in range(count))), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.units(x))


def test_halves_merge_and_stages_do_not() -> None:
    few, many = (blocks_of(nn.Sequential(Long(count), nn.ReLU()), torch.zeros(2, 6)) for count in (2, 3))
    assert set(few) == {"0"}
    assert set(many) == {"0.units.0", "0.units.1", "0.units.2", "0.last"}


class Flat(nn.Module):
    """Many residual adds in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Twice(nn.Module):
    """A unit that runs two times."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = Feed()

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self.unit(x))


def test_a_forward_with_many_adds_and_a_unit_that_runs_twice_are_no_blocks() -> None:
    assert set(blocks_of(Flat(), torch.zeros(2, 6))) == {f"layers.{i}" for i in range(4)}
    assert set(blocks_of(Twice(), torch.zeros(2, 6))) == {"unit.up", "unit.down"}


class Pooled(nn.Module):
    """Attention without a way around it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


def test_attention_alone_is_a_block() -> None:
    assert blocks_of(nn.Sequential(Pooled(), nn.Linear(6, 2)), torch.zeros(2, 3, 6))["0"] == [
        "0.query",
        "0.key",
        "0.value",
    ]
