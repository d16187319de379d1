"""Contracts C1 and C2 for transposed convolutions, volume convolutions and embedding bags."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bitwright.flow.convert import convert
from bitwright.flow.coverage import coverage
from bitwright.lowbit.layer import LowbitLayer
from bitwright.numerics.affine import encode
from bitwright.plan.plan import Plan
from nets import calibrated, layer_plan, layers_of, one_thread, trained, unequal_kernels  # noqa: F401

CONVS: dict[str, Callable[[], nn.Module]] = {
    "1-d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "1-d, strided, padded, dilated": lambda: nn.ConvTranspose1d(4, 6, 3, 3, 2, 2, dilation=2),
    "2-d": lambda: nn.ConvTranspose2d(5, 7, 3),
    "2-d, doubling": lambda: nn.ConvTranspose2d(5, 7, 3, stride=2, padding=1, output_padding=1),
    "2-d, uneven": lambda: nn.ConvTranspose2d(5, 7, (2, 3), stride=(2, 3), padding=(0, 1), output_padding=(1, 2)),
    "2-d, groups": lambda: nn.ConvTranspose2d(6, 9, 3, stride=2, groups=3),
    "2-d, square groups": lambda: nn.ConvTranspose2d(8, 8, 3, stride=2, groups=2),
    "2-d, depthwise": lambda: nn.ConvTranspose2d(6, 12, 4, stride=2, padding=1, groups=6, bias=False),
    "2-d, dilated": lambda: nn.ConvTranspose2d(5, 7, 3, dilation=(2, 1)),
    "2-d, sums beyond 2**24": lambda: nn.ConvTranspose2d(160, 3, 3, padding=1),
    "2-d, sums beyond 2**24 in groups": lambda: nn.ConvTranspose2d(320, 4, 3, padding=1, groups=2),
    "3-d transposed": lambda: nn.ConvTranspose3d(3, 4, 2, stride=2, groups=1),
    "3-d": lambda: nn.Conv3d(3, 5, 3),
    "3-d, strided, groups": lambda: nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2),
    "3-d, same, dilated": lambda: nn.Conv3d(3, 5, 3, padding="same", dilation=2, bias=False),
    "3-d, replicate": lambda: nn.Conv3d(3, 5, 3, padding=1, padding_mode="replicate"),
    "3-d, sums beyond 2**24": lambda: nn.Conv3d(40, 2, 3, padding=1),
}
SIZES = {1: (9,), 2: (5, 6), 3: (4, 5, 3)}


def example(layer: nn.Module, batch: int = 3) -> Tensor:
    return torch.randn(batch, layer.in_channels, *SIZES[len(layer.kernel_size)])


def hard(x: Tensor, simulated: nn.Module) -> list[Tensor]:
    """Inputs as in calibration, beyond its range, at the ties of the scale, zeros, one sample, no batch axis."""
    quantizer = next(iter(layers_of(simulated).values())).input_quantizer
    step = 0.05 if quantizer is None or quantizer.qparams is None else quantizer.qparams.scale.item()
    return [x, 3 * x, torch.randint(-40, 40, x.shape) * (step / 2), torch.zeros_like(x), x[:1], x[0]]


@pytest.mark.parametrize("shape", CONVS)
@pytest.mark.parametrize(("weight", "input"), [("int8/channel", "uint8/asym"), ("int4", "int4")])
def test_trained_convolutions_equal_shipped(shape: str, weight: str, input: str) -> None:
    layer = CONVS[shape]()
    x = example(layer)
    simulated = trained(calibrated(layer, layer_plan(layer, weight, input), [x]), [x])
    assert unequal_kernels(simulated, hard(x, simulated)) == []


FORMATS = [
    ("ternary/channel", "uint4/asym"),
    ("int3/channel", "uint8"),
    ("int8", "int8/dynamic"),
    ("int4/channel", "uint8/asym/dynamic"),
    ("int4/channel", None),
    ("uint8/channel/asym", None),
    ("nf4/channel", None),
    ("fp16", None),
]


@pytest.mark.parametrize("shape", ["2-d, groups", "3-d"])
@pytest.mark.parametrize(("weight", "input"), FORMATS)
def test_trained_convolutions_equal_shipped_in_every_format(shape: str, weight: str, input: str | None) -> None:
    layer = CONVS[shape]()
    x = example(layer).abs() if input == "uint8" else example(layer)
    simulated = trained(calibrated(layer, layer_plan(layer, weight, input), [x]), [x])
    assert unequal_kernels(simulated, [x, 3 * x, x[:1]]) == []


@pytest.mark.parametrize("shape", ["1-d", "2-d, doubling", "2-d, groups", "3-d transposed"])
def test_an_output_size_is_reached_in_both_forms(shape: str) -> None:
    layer = CONVS[shape]()
    x = example(layer)
    simulated = trained(calibrated(layer, layer_plan(layer, "int8/channel", "uint8/asym"), [x]), [x])
    shipped = convert(simulated)
    low = [(s - 1) * t - 2 * p + d * (k - 1) + 1 for s, t, p, d, k in
           zip(x.shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True)]  # fmt: skip
    high = [size + stride - 1 for size, stride in zip(low, layer.stride, strict=True)]
    for size in (low, high, [*x.shape[:1], layer.out_channels, *high]):
        assert simulated(x, size).shape == layer(x, size).shape
        assert torch.equal(shipped(x, output_size=size), simulated(x, output_size=size))
    for model in (simulated, shipped):
        with pytest.raises(ValueError, match="output size"):
            model(x, [size + 9 for size in high])


@pytest.mark.parametrize("shape", ["2-d, groups", "2-d, uneven", "3-d transposed", "3-d"])
def test_the_codes_of_the_last_step_are_those_in_the_file(shape: str) -> None:
    layer = CONVS[shape]()
    x = example(layer)
    simulated = trained(calibrated(layer, layer_plan(layer, "int4/channel", "uint8/asym"), [x]), [x])
    quantizer, shipped = simulated.weight_quantizer, convert(simulated)
    codes = encode(simulated.as_rows(simulated.weight), quantizer.spec, quantizer.qparams)
    assert torch.equal(shipped.weight.codes.float(), codes)
    assert shipped.packed.shape[0] == layer.out_channels
    assert shipped.weight_scale.shape == (layer.out_channels, *[1] * (layer.weight.dim() - 1))
    assert sum(row.elements for row in coverage(shipped) if row.path.endswith("weight")) == layer.weight.numel()


@pytest.mark.parametrize("shape", ["2-d, groups", "2-d, square groups", "1-d"])
def test_a_channel_is_an_output_channel(shape: str) -> None:
    """Each output channel of a transposed convolution has a scale of its own: a loud one leaves the others exact."""
    layer = CONVS[shape]()
    with torch.no_grad():
        rows = torch.randint(-7, 8, layer.weight.shape).float()
        layer.weight.copy_(rows)
        per_group = layer.out_channels // layer.groups
        first = layer.weight.unflatten(0, (layer.groups, -1))[0, :, 0]
        first.mul_(1000.0)
        layer.weight.unflatten(0, (layer.groups, -1))[:, 0, :, 0] = 7.0  # every channel has its largest code
        first[0] = 7000.0
    x = example(layer)
    simulated = calibrated(layer, layer_plan(layer, "int4/channel", None), [x])
    assert per_group > 1
    assert torch.allclose(simulated.weight_quantizer.scale.flatten()[1:], torch.ones(layer.out_channels - 1))
    assert torch.allclose(simulated(x), layer(x), rtol=1e-4, atol=1e-2)


class Folded(nn.Module):
    """Four layers, each with a batch norm behind it."""

    def __init__(self, *, affine: bool = True, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.volume, self.bn0 = nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4, affine=affine, momentum=momentum)
        self.up, self.bn1 = nn.ConvTranspose3d(4, 4, 2, groups=2), nn.BatchNorm3d(4, affine=affine, momentum=momentum)
        self.wide = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(6, affine=affine, momentum=momentum)
        self.line, self.bn3 = nn.ConvTranspose1d(6, 5, 3), nn.BatchNorm1d(5, affine=affine, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.up(torch.relu(self.bn0(self.volume(x))))))
        x = torch.relu(self.bn2(self.wide(x.flatten(3))))
        return self.bn3(self.line(x.flatten(2)))


def with_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """``model`` with batch norms as after training: gains and offsets moved, statistics that fit the data."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            for parameter, (low, high) in zip(module.parameters(), ((0.5, 1.5), (-0.3, 0.3)), strict=False):
                nn.init.uniform_(parameter, low, high)
    model.train()
    for _ in range(40):
        model(x + 0.1 * torch.randn_like(x))
    return model


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norms_fold_into_output_channels(affine: bool, momentum: float | None) -> None:
    x = torch.randn(4, 2, 4, 5, 3)
    net = with_statistics(Folded(affine=affine, momentum=momentum), x)
    plan = Plan.preset("w8a8", net, x)
    assert plan.folds == {"volume": "bn0", "up": "bn1", "wide": "bn2", "line": "bn3"}
    model = calibrated(net, plan, [x])
    with torch.no_grad():
        expected = net.eval()(x)
        assert (model(x) - expected).abs().max() < 0.05 * expected.abs().max()
    counts = [norm.num_batches_tracked.item() for norm in (model.bn0, model.bn3)]
    simulated = trained(model, [x], lr=0.1)
    assert simulated.bn0.num_batches_tracked.item() > counts[0]
    assert unequal_kernels(simulated, [x, 3 * x]) == []
    shipped = convert(simulated)
    assert isinstance(shipped.bn0, nn.Identity)
    assert sum(isinstance(module, LowbitLayer) for module in shipped.modules()) == 4


def test_norms_without_running_statistics_stay_norms() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
    x = torch.randn(3, 3, 5, 5)
    plan = Plan.preset("w8a8", net, x)
    assert plan.folds == {}
    simulated = trained(calibrated(net, plan, [x]), [x])
    assert isinstance(simulated[1], nn.BatchNorm2d)
    assert unequal_kernels(simulated, [x]) == []


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("weight", ["int8/channel", "int4", "uint4/channel/asym", "nf4/group4", "bf16"])
def test_trained_embedding_bags_equal_shipped(mode: str, padding: int | None, weight: str) -> None:
    layer = nn.EmbeddingBag(11, 16, mode=mode, padding_idx=padding)
    ids = torch.tensor([[0, 2, 10, 3], [4, 4, 2, 9]])
    simulated = trained(calibrated(layer, layer_plan(layer, weight), []), [ids])
    assert unequal_kernels(simulated, [ids, ids[:1], torch.full((2, 3), 2)]) == []
    shipped = convert(simulated)
    flat, starts = torch.tensor([1, 2, 4, 5, 4, 3, 2, 9]), torch.tensor([0, 4, 4])
    with torch.no_grad():
        assert torch.equal(shipped(flat, starts), simulated(flat, starts))
        rows = simulated.weight_quantizer.simulate(simulated.weight)
        expected = nn.functional.embedding_bag(flat, rows, starts, mode=mode, padding_idx=padding)
        assert torch.allclose(simulated(flat, starts), expected, atol=1e-6)
        if mode == "sum":
            weights = torch.rand(8)
            assert torch.equal(shipped(flat, starts, weights), simulated(flat, starts, weights))
            expected = nn.functional.embedding_bag(
                flat, rows, starts, mode=mode, padding_idx=padding, per_sample_weights=weights
            )
            assert torch.allclose(simulated(flat, starts, weights), expected, atol=1e-6)


def test_embedding_bags_take_last_offsets_and_empty_bags() -> None:
    layer = nn.EmbeddingBag(11, 16, mode="mean", include_last_offset=True)
    flat, starts = torch.tensor([1, 2, 4, 5]), torch.tensor([0, 2, 2, 4])
    simulated = calibrated(layer, layer_plan(layer, "int8/channel"), [])
    assert torch.equal(convert(simulated)(flat, starts), simulated(flat, starts))
    assert simulated(flat, starts).shape == (3, 16)
    assert simulated(flat, starts)[1].abs().max() == 0
