"""Contract C2: after training, the shipped model computes bit for bit what was trained, with every kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.flow.convert import convert
from bitwright.graph.calls import Add
from bitwright.lowbit.layer import LowbitLayer
from bitwright.plan.plan import Plan
from models import Conv1dNet, Mlp, ResidualCnn, image, with_statistics
from nets import FEATURES, calibrated, layer_plan, layers_of, one_thread, trained, unequal_kernels  # noqa: F401

WEIGHTS = [
    *("int8/channel", "int4/channel", "int3/channel", "int2/channel", "ternary/channel", "int6", "int8"),
    *("midrise2/channel", "midrise3"),
]
STATIC = ["uint8/asym", "uint8", "int8", "uint4/asym", "int4"]
LINEAR_INPUTS = [*STATIC, "int8/token/dynamic", "uint8/asym/dynamic", "int8/dynamic", "uint8/token/asym/dynamic"]
CONV_INPUTS = [*STATIC, "uint8/asym/dynamic", "int8/dynamic"]


def hard_inputs(x: Tensor, simulated: nn.Module) -> list[Tensor]:
    """Inputs like those of calibration, beyond the calibrated range, all ties of the input scale, and zeros."""
    quantizer = next(iter(layers_of(simulated).values())).input_quantizer
    step = 0.05 if quantizer is None or quantizer.qparams is None else quantizer.qparams.scale.item()
    return [x, 3 * x, torch.randint(-40, 40, x.shape) * (step / 2), torch.zeros_like(x)]


def positive(x: Tensor, spec: str) -> Tensor:
    """What a symmetric unsigned input is for."""
    return x.abs() if spec.startswith("uint") and "asym" not in spec else x


@pytest.mark.parametrize("input", LINEAR_INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_trained_linear_equals_shipped(weight: str, input: str) -> None:
    for inputs, outputs, shape in ((19, 7, (6,)), (700, 5, (2, 3))):  # 700 products of 8 bits exceed 2**24
        layer = nn.Linear(inputs, outputs)
        x = positive(torch.randn(*shape, inputs), input)
        simulated = trained(calibrated(layer, layer_plan(layer, weight, input), [x]), [x])
        assert unequal_kernels(simulated, hard_inputs(x, simulated)) == []


GROUPED_INPUTS = ["int8/token/dynamic", "uint8/token/asym/dynamic", "int8/dynamic", "uint8/asym", "int8", "uint4/asym"]


@pytest.mark.parametrize("input", GROUPED_INPUTS)
@pytest.mark.parametrize(
    "weight",
    [
        "int8/group32",
        "int4/group32",
        "int4/group128",
        "int3/group64",
        "ternary/group16",
        "midrise2/group32",
        "midrise3/group32",
    ],
)
def test_trained_linear_with_groups_equals_shipped(weight: str, input: str) -> None:
    for outputs, shape in ((7, (6,)), (37, (2, 3))):
        layer = nn.Linear(384, outputs)
        x = torch.randn(*shape, 384)
        simulated = trained(calibrated(layer, layer_plan(layer, weight, input), [x]), [x])
        assert simulated.weight_quantizer.scale.shape[1] == 384 // int(weight.split("group")[1])
        assert unequal_kernels(simulated, hard_inputs(x, simulated)) == []


@pytest.mark.parametrize("weight", ["int4/group6", "int3/group12", "int4/group384", "int8/group1024"])
def test_trained_linear_with_unusual_groups_equals_shipped(weight: str) -> None:
    layer = nn.Linear(2048 if "1024" in weight else 384, 9, bias=False)
    x = torch.randn(5, layer.in_features)
    for input in ("int8/token/dynamic", "uint8/asym"):
        simulated = trained(calibrated(layer, layer_plan(layer, weight, input), [x]), [x])
        assert unequal_kernels(simulated, hard_inputs(x, simulated)) == []


def test_training_with_groups_moves_weights_and_scales() -> None:
    layer, x = nn.Linear(64, 5), torch.randn(6, 64)
    simulated = calibrated(layer, layer_plan(layer, "int4/group32", "int8/token/dynamic"), [x])
    before = {name: value.clone() for name, value in simulated.state_dict().items()}
    after = trained(simulated, [x]).state_dict()
    for name in ("weight", "bias", "weight_quantizer.scale"):
        assert not torch.equal(before[name], after[name]), name


def test_linear_takes_one_sample_without_a_batch_axis() -> None:
    layer = nn.Linear(19, 7, bias=False)
    x = torch.randn(5, 19)
    for input in ("uint8/asym", "int8/token/dynamic"):
        simulated = trained(calibrated(layer, layer_plan(layer, "int4/channel", input), [x]), [x])
        assert unequal_kernels(simulated, [x[0], x[:1], x[None, None]]) == []


CONVS = {
    "3x3": lambda: nn.Conv2d(5, 7, 3),
    "strided": lambda: nn.Conv2d(5, 7, 3, stride=(2, 1), padding=(1, 2)),
    "1x1": lambda: nn.Conv2d(5, 18, 1, stride=2),
    "same": lambda: nn.Conv2d(5, 7, 3, padding="same"),
    "same, even": lambda: nn.Conv2d(5, 7, (2, 4), padding="same"),
    "same, dilated": lambda: nn.Conv2d(5, 7, 3, padding="same", dilation=2),
    "valid": lambda: nn.Conv2d(5, 7, 3, padding="valid"),
    "reflect": lambda: nn.Conv2d(5, 7, 3, padding=2, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(5, 7, 3, padding=(0, 1), padding_mode="replicate"),
    "circular": lambda: nn.Conv2d(5, 7, 3, padding=1, padding_mode="circular"),
    "same, circular": lambda: nn.Conv2d(5, 7, (4, 3), padding="same", padding_mode="circular"),
    "dilated": lambda: nn.Conv2d(5, 7, 3, padding=2, dilation=(2, 1)),
    "groups": lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "depthwise, two filters each": lambda: nn.Conv2d(6, 12, 3, groups=6, bias=False),
    "no bias": lambda: nn.Conv2d(5, 7, 3, bias=False),
    "sums beyond 2**24": lambda: nn.Conv2d(64, 3, 3, padding=1),
    "sums beyond 2**24 in groups": lambda: nn.Conv2d(140, 4, 3, padding=1, groups=2),
    "1-d": lambda: nn.Conv1d(5, 7, 3),
    "1-d, strided": lambda: nn.Conv1d(5, 7, 4, stride=3, padding=2, bias=False),
    "1-d, same, even": lambda: nn.Conv1d(5, 7, 4, padding="same"),
    "1-d, reflect": lambda: nn.Conv1d(5, 7, 3, padding=2, padding_mode="reflect"),
    "1-d, circular": lambda: nn.Conv1d(5, 7, 3, padding=1, padding_mode="circular"),
    "1-d, depthwise": lambda: nn.Conv1d(6, 6, 5, padding=4, dilation=2, groups=6),
}


def conv_inputs(layer: nn.Conv1d | nn.Conv2d, input: str) -> Tensor:
    return positive(torch.randn(3, layer.in_channels, *(9, 8)[: len(layer.kernel_size)]), input)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("weight", "input"),
    [
        ("int8/channel", "uint8/asym"),
        ("int4/channel", "uint4/asym"),
        ("ternary/channel", "int8"),
        ("int8", "uint8/asym/dynamic"),
    ],
)
@pytest.mark.parametrize("shape", CONVS)
def test_trained_conv_equals_shipped_in_every_geometry(shape: str, weight: str, input: str) -> None:
    layer = CONVS[shape]()
    x = conv_inputs(layer, input)
    simulated = trained(calibrated(layer, layer_plan(layer, weight, input), [x]), [x])
    inputs = [*hard_inputs(x, simulated), x[0]]
    if x.dim() == 4:
        inputs.append(x.contiguous(memory_format=torch.channels_last))
    assert unequal_kernels(simulated, inputs) == []


@pytest.mark.parametrize("input", CONV_INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_trained_conv_equals_shipped_in_every_format(weight: str, input: str) -> None:
    layer = nn.Conv2d(5, 18, 3, padding=1)
    x = conv_inputs(layer, input)
    simulated = trained(calibrated(layer, layer_plan(layer, weight, input), [x]), [x])
    assert unequal_kernels(simulated, hard_inputs(x, simulated)) == []


ROWS = ["int8/channel", "int4/channel", "int8", "ternary/channel", "uint8/channel/asym", "nf4/channel", "fp16", "bf16"]


@pytest.mark.parametrize("weight", [*ROWS, "nf4/group4", "int4/group4", "uint4/group8/asym"])
def test_trained_embedding_equals_shipped(weight: str) -> None:
    layer = nn.Embedding(11, 16, padding_idx=2)
    ids = torch.tensor([[0, 2, 10, 3], [4, 4, 5, 9]])
    simulated = trained(calibrated(layer, layer_plan(layer, weight), []), [ids])
    assert unequal_kernels(simulated, [ids, ids[0], torch.arange(11)]) == []


@pytest.mark.parametrize("right", ["uint8/asym", "int8", "uint4/asym"])
@pytest.mark.parametrize("left", ["uint8", "int8/asym", "int4"])
def test_trained_add_equals_shipped(left: str, right: str) -> None:
    net = TwoBranches()
    x = torch.randn(4, 6, 5, 5)
    plan = Plan.preset("w8a8", net, x).with_sites({"add.input.0": left, "add.input.1": right})
    simulated = trained(calibrated(net, plan, [x]), [x])
    assert unequal_kernels(simulated, [x, 3 * x, x.contiguous(memory_format=torch.channels_last)]) == []


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.add = nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3), Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(F.relu(self.left(x)), self.right(x))


MIXED = {
    "*.weight": "int8/channel",
    "*conv1.weight": "int4/channel",
    "*conv2.weight": "ternary/channel",
    "*down.0.weight": "int3/channel",
    "*down.0.input": "uint4/asym",
    "fc.input": "int8/token/dynamic",
}
HEAD = {"fc.weight": "int8/channel", "fc.input": "uint8/asym"}


@pytest.mark.parametrize(
    ("preset", "rules"), [("w8a8", HEAD), ("w4a4", {}), ("w8a8-dynamic", HEAD), ("w8a8", MIXED)], ids=str
)
def test_trained_residual_cnn_equals_shipped(preset: str, rules: dict[str, str]) -> None:
    net = with_statistics(ResidualCnn())
    batches = [image(6, 12) for _ in range(2)]
    plan = Plan.preset(preset, net, batches[0], sites=rules)
    assert len(plan.folds) == 8
    simulated = trained(calibrated(net, plan, batches), batches)
    assert unequal_kernels(simulated, [*batches, 3 * batches[0], image(1, 7)]) == []


def test_weights_in_channels_last_memory_equal_shipped() -> None:
    net, x = with_statistics(ResidualCnn()).to(memory_format=torch.channels_last), image(4, 9)
    assert not net.stem.weight.is_contiguous()
    simulated = trained(calibrated(net, "w4a4", [x]), [x])
    assert unequal_kernels(simulated, [x, x.contiguous(memory_format=torch.channels_last)]) == []


def test_trained_conv1d_net_equals_shipped() -> None:
    net = with_statistics(Conv1dNet())
    x = torch.randn(6, 2, 20)
    simulated = trained(calibrated(net, "w4a4", [x]), [x])
    assert unequal_kernels(simulated, [x, 3 * x]) == []


def test_autocast_does_not_round_integer_products() -> None:
    net, x = Mlp(), torch.randn(6, 16)
    rules = {"0.*": "float", "4.weight": "int4/channel", "4.input": "uint8/asym"}  # what follows 0 sees bfloat16
    simulated = calibrated(net, Plan.preset("w8a8", net, x, sites=rules), [x])
    with torch.autocast("cpu", torch.bfloat16):
        assert simulated[0](x).dtype is torch.bfloat16
        assert simulated(x).dtype is torch.float32
        assert unequal_kernels(simulated, [x, 3 * x]) == []


def test_training_moves_weights_scales_and_statistics() -> None:
    net = with_statistics(ResidualCnn())
    x = image(6, 12)
    simulated = calibrated(net, "w4a4", [x])
    before = {name: value.clone() for name, value in simulated.state_dict().items()}
    after = trained(simulated, [x]).state_dict()
    for kind in ("conv1.weight", "weight_quantizer.scale", "input_quantizer.scale", "running_mean", "bn1.weight"):
        names = [name for name in before if name.endswith(kind)]
        assert names
        assert any(not torch.equal(before[name], after[name]) for name in names), kind


def test_each_feature_set_takes_its_own_kernels() -> None:
    net = with_statistics(ResidualCnn())
    simulated = calibrated(net, "w8a8", [image()])
    taken = {
        name: {
            m.kernel.name.split("/")[1] for m in convert(simulated, features=f).modules() if isinstance(m, LowbitLayer)
        }
        for name, f in FEATURES.items()
    }
    expected = {"reference": {"reference"}, "portable": {"portable"}, "avx2": {"avx2"}}
    assert {name: taken[name] for name in expected if name in taken} == {
        name: kernels for name, kernels in expected.items() if name in taken
    }
    assert len(taken["best"]) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler raises its own
@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_compiled_models_equal_eager_ones(kind: str) -> None:
    net, x = (Features(), image(4, 12)) if kind == "cnn" else (Mlp(), torch.randn(5, 16))
    rules = {"4.weight": "int4/channel", "4.input": "uint4/asym"} if kind == "mlp" else {"3.weight": "int4/channel"}
    simulated = trained(calibrated(net, Plan.preset("w8a8", net, x, sites=rules), [x]), [x])
    shipped = convert(simulated)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = simulated(x)
        assert torch.equal(shipped(x), expected)
        assert torch.equal(torch.compile(simulated, fullgraph=True)(x), expected)
        assert torch.equal(torch.compile(shipped, fullgraph=True)(x), expected)


class Features(nn.Sequential):
    """A small CNN that ends before its mean: the order of a float sum is a compiler's choice."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU()
        )
