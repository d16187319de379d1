"""What the record of each small model means."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.graph import patterns
from bitwright.graph.dataflow import Dataflow, record
from models import (
    ActivatedNorm,
    ControlFlow,
    Conv1dNet,
    EmbeddingNet,
    Encoder,
    Heads,
    Mlp,
    ResidualCnn,
    SharedReluBlock,
    TiedLm,
    image,
)


def recorded(model: nn.Module, example: object) -> tuple[Dataflow, nn.Module]:
    return record(model, example), model


CNN = ["layers.0", "layers.1", "layers.2"]


# --- folds -------------------------------------------------------------------------------------------------


def test_every_convolution_of_the_residual_net_folds_its_batch_norm():
    folds = patterns.fold_batchnorms(*recorded(ResidualCnn(), image()))
    expected = {"stem": "bn", "layers.1.down.0": "layers.1.down.1"}
    expected |= {f"{block}.conv{i}": f"{block}.bn{i}" for block in CNN for i in (1, 2)}
    assert folds == expected


def test_one_dimensional_convolutions_and_linear_layers_fold_too():
    assert patterns.fold_batchnorms(*recorded(Conv1dNet(), torch.randn(2, 2, 9))) == {"conv1": "norm1"}
    linear = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    assert patterns.fold_batchnorms(*recorded(linear, torch.randn(3, 4))) == {"0": "1"}
    deep = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2, affine=False))
    assert patterns.fold_batchnorms(*recorded(deep, torch.randn(1, 1, 2, 2, 2))) == {"0": "1"}


class Between(nn.Module):
    """A convolution and a batch norm with something between, beside or after them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> object:
        y = self.conv(x)
        if self.kind == "relu between":
            return self.bn(F.relu(y))
        if self.kind == "second consumer":
            return self.bn(y) * y.sigmoid()
        if self.kind == "output":
            return y, self.bn(y)
        if self.kind == "convolution twice":
            return self.bn(y) + self.conv(y)
        if self.kind == "norm twice":
            return self.bn(self.bn(y))
        return self.bn(x) + y


@pytest.mark.parametrize(
    "kind", ["relu between", "second consumer", "output", "convolution twice", "norm twice", "norm beside"]
)
def test_a_norm_that_is_not_the_only_direct_consumer_stays(kind):
    assert patterns.fold_batchnorms(*recorded(Between(kind), image())) == {}


def test_norms_that_compute_something_else_than_running_statistics_stay():
    live = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    activated = nn.Sequential(nn.Conv2d(3, 4, 3), ActivatedNorm(4))
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    for model in (live, activated, other):
        assert patterns.fold_batchnorms(*recorded(model, image())) == {}
    assert patterns.fusions(*recorded(activated, image())) == []


def test_a_norm_over_positions_of_a_sequence_is_not_folded_into_a_linear_layer():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    assert patterns.fold_batchnorms(*recorded(model, torch.randn(3, 5, 4))) == {}


# --- fusions -----------------------------------------------------------------------------------------------

FIVE = {
    "conv bn": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), ("0", "1")),
    "conv bn relu": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), ("0", "1", "2")),
    "conv relu": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), ("0", "1")),
    "linear relu": (lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU()), ("0", "1")),
    "bn relu": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), ("0", "1")),
}


@pytest.mark.parametrize("name", FIVE)
def test_each_of_the_five_patterns_is_found(name):
    make, chain = FIVE[name]
    assert patterns.fusions(*recorded(make(), image())) == [chain]


@pytest.mark.parametrize("relu", [F.relu, torch.relu, Tensor.relu, F.relu_, lambda x: F.relu(x, inplace=True)])
def test_functional_relus_fuse_like_modules(relu):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return relu(self.bn(self.conv(x)))

    [chain] = patterns.fusions(*recorded(Net(), image()))
    assert chain in [("conv", "bn", "relu"), ("conv", "bn", "relu_")]


def test_chains_of_the_residual_net_end_where_a_tensor_has_two_consumers():
    chains = patterns.fusions(*recorded(ResidualCnn(), image()))
    assert chains == [
        ("stem", "bn", "relu"),
        ("layers.0.conv1", "layers.0.bn1", "relu"),
        ("layers.0.conv2", "layers.0.bn2"),
        ("layers.1.conv1", "layers.1.bn1", "relu"),
        ("layers.1.conv2", "layers.1.bn2"),
        ("layers.1.down.0", "layers.1.down.1"),
        ("layers.2.conv1", "layers.2.bn1", "layers.2.relu"),
        ("layers.2.conv2", "layers.2.bn2"),
    ]


def test_a_shared_relu_fuses_only_where_it_follows_directly():
    chains = patterns.fusions(*recorded(SharedReluBlock(3), image()))
    assert chains == [("conv1", "bn1", "relu"), ("conv2", "bn2")]


def test_other_activations_and_outputs_break_chains():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 8))
    assert patterns.fusions(*recorded(model, torch.randn(2, 8))) == []
    assert patterns.fusions(*recorded(Between("output"), image())) == []


# --- consumers of one tensor ---------------------------------------------------------------------------------


def test_layers_that_read_one_tensor_are_grouped():
    flow = record(Encoder(), torch.randn(2, 5, 16))
    assert patterns.shared_inputs(flow, ["q", "k", "v", "out", "up", "down"]) == [["q", "k", "v"]]
    assert patterns.shared_inputs(flow, ["v", "q"]) == [["q", "v"]]
    assert patterns.shared_inputs(flow, ["q", "out"]) == []


def test_the_downsample_shares_the_input_of_the_first_convolution():
    flow = record(ResidualCnn(), image())
    paths = [node.name for node in flow.nodes if node.kind == "module"]
    assert ["layers.1.conv1", "layers.1.down.0"] in patterns.shared_inputs(flow, paths)


def test_a_module_that_is_called_twice_shares_with_nobody():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x) * self.a(x * 2)

    assert patterns.shared_inputs(record(Net(), torch.randn(1, 4)), ["a", "b"]) == []


# --- residual adds ---------------------------------------------------------------------------------------------


def residual_owners(model: nn.Module, example: object) -> list[tuple[str, int]]:
    return [(node.owner, node.ordinal) for node in patterns.residual_adds(*recorded(model, example))]


def test_residual_adds_of_the_residual_net_are_found_however_they_are_written():
    assert residual_owners(ResidualCnn(), image()) == [(block, 0) for block in CNN]


def test_residual_adds_of_the_encoder_are_found_and_rotary_adds_are_not():
    model, example = Encoder(), torch.randn(2, 5, 16)
    flow = record(model, example)
    assert sum(node.name == "add" for node in flow.nodes) == 4
    assert residual_owners(model, example) == [("", 2), ("", 3)]


def test_adding_position_embeddings_is_not_residual():
    model, example = EmbeddingNet(), torch.randint(0, 20, (2, 6))
    assert any(node.name == "add" for node in record(model, example).nodes)
    assert residual_owners(model, example) == []


class Adds(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.fc, self.gate = kind, nn.Linear(4, 4), nn.Linear(4, 1)
        self.offset = nn.Parameter(torch.ones(2, 4))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.fc(x)
        return {
            "constant": lambda: y + 1.0,
            "parameter": lambda: y + self.offset,
            "broadcast": lambda: self.gate(x) + x,
            "itself": lambda: y + y,
            "unrelated": lambda: y + other,
            "no layer": lambda: x * 2 + x,
        }[self.kind]()


@pytest.mark.parametrize("kind", ["constant", "parameter", "broadcast", "itself", "unrelated", "no layer"])
def test_adds_that_join_no_branches_are_not_residual(kind):
    assert residual_owners(Adds(kind), (torch.randn(2, 4), torch.randn(2, 4))) == []


def test_two_parallel_layers_that_are_added_are_residual():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    assert residual_owners(Net(), torch.randn(1, 4)) == [("", 0)]


def test_adds_into_layer_norms_are_told_apart_also_through_views():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.drop, self.norm = nn.Dropout(0.1), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(x)
            x = x + self.b(F.layer_norm(x, (4,)))
            x = self.c(x) + x
            return self.norm(self.drop(x.unsqueeze(0)))

    flow, model = recorded(Net(), torch.randn(2, 4))
    feeding = [patterns.feeds_layernorm(flow, node, model) for node in patterns.residual_adds(flow, model)]
    assert feeding == [True, False, True]
    flow, model = recorded(ResidualCnn(), image())
    assert not any(patterns.feeds_layernorm(flow, node, model) for node in flow.nodes)


# --- first and last layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "example", "first", "last"),
    [
        (ResidualCnn, image(), ["stem"], ["fc"]),
        (Mlp, torch.randn(1, 16), ["0"], ["4"]),
        (Conv1dNet, torch.randn(2, 2, 9), ["conv1"], ["head"]),
        (EmbeddingNet, torch.zeros(1, 4, dtype=torch.long), [], ["fc"]),
        (Encoder, torch.randn(1, 4, 16), ["q", "k", "v"], ["classifier"]),
        (ControlFlow, torch.randn(1, 8), ["stem"], ["fc"]),
        (TiedLm, torch.zeros(1, 4, dtype=torch.long), [], ["head"]),
        (lambda: Heads("dict"), torch.randn(1, 8), ["trunk"], ["left", "right"]),
        (lambda: Heads("dataclass"), torch.randn(1, 8), ["trunk"], ["left", "right"]),
    ],
)
def test_first_layers_and_classifiers(make, example, first, last):
    flow, model = recorded(make(), example)
    assert patterns.first_layers(flow, model) == first
    assert patterns.classifiers(flow, model) == last


@pytest.mark.parametrize(
    "end",
    [
        nn.Softmax(-1),
        nn.LogSoftmax(-1),
        nn.Sigmoid(),
        nn.Flatten(0),
        nn.Sequential(nn.Dropout(), nn.Softmax(-1), nn.Flatten()),
    ],
)
def test_a_classifier_is_seen_through_modules_that_only_shape_the_output(end):
    assert patterns.classifiers(*recorded(nn.Sequential(Mlp(), end), torch.randn(2, 16))) == ["0.4"]


@pytest.mark.parametrize(
    "end", [F.softmax, F.log_softmax, lambda x, dim: x.sigmoid(), lambda x, dim: x.view(-1).squeeze()]
)
def test_a_classifier_is_seen_through_functions_that_only_shape_the_output(end):
    class Net(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return end(super().forward(x), dim=-1)

    assert patterns.classifiers(*recorded(Net(), torch.randn(2, 16))) == ["4"]


def test_a_module_that_is_merely_called_softmax_hides_the_classifier():
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(4, 4))
    model.add_module("softmax", nn.LayerNorm(4))
    assert patterns.classifiers(*recorded(model, torch.randn(2, 4))) == []


def test_layers_behind_an_activation_are_no_classifiers():
    assert patterns.classifiers(*recorded(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(1, 4))) == []
    assert patterns.classifiers(*recorded(nn.Sequential(nn.Conv2d(3, 4, 1)), image())) == []


# --- parameters read behind a module's back ----------------------------------------------------------------------


def test_bypassed_parameters_are_named_with_the_function_that_reads_them():
    tied = record(TiedLm(functional=True), torch.zeros(1, 4, dtype=torch.long))
    assert patterns.bypassed_parameters(tied) == {"embedding.weight": "linear"}
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)  # its attention is one leaf
    assert patterns.bypassed_parameters(record(layer, torch.randn(1, 4, 16))) == {}


@pytest.mark.parametrize("model", [Mlp(), ResidualCnn()], ids=["mlp", "cnn"])
def test_ordinary_models_bypass_nothing(model):
    assert patterns.bypassed_parameters(record(model, torch.randn(1, 16) if isinstance(model, Mlp) else image())) == {}


# --- real models -------------------------------------------------------------------------------------------------


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.shared_data
def test_the_pretrained_resnet20_is_understood_completely(shared_data):
    folder = shared_data / "cifar10_resnet"
    model = script(folder / "rn.py").load(str(folder / "resnet20-12fca82f.th"), 20)
    flow = record(model, image(1, 32))
    folds = patterns.fold_batchnorms(flow, model)
    assert len(folds) == 19
    assert all(norm == conv.replace("conv", "bn") for conv, norm in folds.items())
    assert len(patterns.residual_adds(flow, model)) == 9
    assert patterns.classifiers(flow, model) == ["linear"]
    assert patterns.first_layers(flow, model) == ["conv1"]
    assert sum(len(chain) == 3 for chain in patterns.fusions(flow, model)) == 10
    assert patterns.bypassed_parameters(flow) == {}


@pytest.mark.shared_data
def test_the_pretrained_mobilenet_folds_all_27_batch_norms(shared_data):
    folder = shared_data / "mlperf_tiny"
    model = script(folder / "tiny_models.py").MobileNetV1_025()
    model.load_state_dict(torch.load(folder / "vww_mobilenetv1_025.pt", weights_only=True))
    flow = record(model, image(1, 96))
    assert len(patterns.fold_batchnorms(flow, model)) == 27
    assert patterns.residual_adds(flow, model) == []
    assert patterns.classifiers(flow, model) == ["fc"]
    assert patterns.first_layers(flow, model) == ["stem.conv"]
    assert sum(len(chain) == 3 for chain in patterns.fusions(flow, model)) == 27
