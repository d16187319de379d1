"""`convert` replaces every simulated layer by a packed one, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.errors import BitwrightError, ModelError
from bitwright.flow.convert import convert, is_converted
from bitwright.flow.prepare import prepare
from bitwright.graph.calls import Add
from bitwright.lowbit.layer import LowbitLayer
from bitwright.nn.layer import QLayer
from bitwright.nn.quantizer import Quantizer
from bitwright.plan.plan import Plan
from models import Mlp, ResidualCnn, TiedLayers, image, with_statistics
from nets import FEATURES, calibrated, one_thread, unequal_kernels  # noqa: F401


def test_no_simulation_and_no_float_copy_is_left() -> None:
    net = with_statistics(ResidualCnn())
    simulated = calibrated(net, "w4a4", [image(4)])
    shipped = convert(simulated.train())
    assert not any(isinstance(m, (QLayer, Quantizer, nn.Conv2d, nn.BatchNorm2d)) for m in shipped.modules())
    assert is_converted(shipped)
    assert not shipped.training
    floats = [name for name, value in shipped.state_dict().items() if value.is_floating_point() and value.dim() > 2]
    assert all(name.endswith("weight_scale") for name in floats)
    assert [name for name, _ in shipped.named_parameters()] == ["fc.weight", "fc.bias"]
    assert any(isinstance(module, QLayer) for module in simulated.modules())  # a copy was converted


def test_in_place_the_given_model_is_converted() -> None:
    simulated = calibrated(Mlp(), "w8a8", [torch.randn(4, 16)])
    assert convert(simulated, inplace=True) is simulated
    assert is_converted(simulated)


def test_a_converted_model_does_not_follow_the_simulated_one() -> None:
    x = torch.randn(4, 16)
    simulated = calibrated(Mlp(), "w8a8", [x])
    shipped = convert(simulated)
    expected = shipped(x)
    with torch.no_grad():
        for parameter in simulated.parameters():
            parameter.mul_(3)
    assert torch.equal(shipped(x), expected)


def test_converting_before_calibrating_names_the_first_site() -> None:
    net = Mlp()
    prepared = prepare(net, Plan.preset("w8a8", net, torch.zeros(1, 16)))
    with pytest.raises(
        ModelError, match=r"0\.weight has no scale yet \(4 sites in all\); call bitwright\.calibrate first"
    ):
        convert(prepared)


def test_converting_twice_or_a_float_model_is_refused() -> None:
    shipped = convert(calibrated(Mlp(), "w8a8", [torch.zeros(1, 16) + 0.5]))
    with pytest.raises(ModelError, match="no simulated layers: it was converted already"):
        convert(shipped)
    with pytest.raises(BitwrightError, match="Mlp was not prepared by bitwright"):
        convert(Mlp())


class Twins(nn.Module):
    """One layer under two names, also inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.all = nn.ModuleList([self.first, nn.Linear(8, 8), self.first])
        self.again = self.all
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.again:
            x = F.relu(layer(x))
        return self.out(self.first(x))


def test_a_layer_registered_under_several_names_becomes_one_shipped_layer() -> None:
    net, x = Twins(), torch.randn(4, 8)
    simulated = calibrated(net, "w8a8", [x])
    shipped = convert(simulated)
    assert isinstance(shipped.first, LowbitLayer)
    assert shipped.first is shipped.all[0] is shipped.all[2] is shipped.again[0]
    assert not any(isinstance(module, QLayer) for module in shipped.modules())
    assert torch.equal(shipped(x), simulated(x).detach())


def test_tied_layers_share_their_packed_bytes() -> None:
    net, x = TiedLayers(), torch.randn(4, 8)
    shipped = convert(calibrated(net, "w8a8", [x]))
    assert shipped.a.packed is shipped.b.packed
    assert not torch.equal(shipped.a.bias, shipped.b.bias)


def test_tied_convolutions_with_their_own_norms_keep_their_own_codes() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.c = nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.b.weight = self.c.weight = self.a.weight
            self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))))

    net, x = with_statistics(Tied()), torch.randn(3, 4, 6, 6)
    simulated = calibrated(net, "w8a8", [x])
    with torch.no_grad():
        assert (simulated(x) - net.eval()(x)).abs().max() < 0.05 * net(x).abs().max()
    assert unequal_kernels(simulated, [x, 2 * x]) == []


def test_features_restrict_the_kernels() -> None:
    simulated = calibrated(Mlp(), "w8a8", [torch.randn(4, 16)])
    assert convert(simulated, features=frozenset())[0].kernel.name == "linear/reference"
    if "portable" in FEATURES:
        assert convert(simulated, features=FEATURES["portable"])[0].kernel.name == "linear/portable"


def test_reloading_a_state_dict_lays_the_kernel_constants_out_again() -> None:
    x = torch.randn(4, 16)
    one, two = (convert(calibrated(Mlp(), "w4a8", [x])) for _ in range(2))
    assert not torch.equal(one(x), two(x))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x))


def test_a_shipped_model_says_what_it_is() -> None:
    shipped = convert(calibrated(Mlp(), "w8a8", [torch.randn(4, 16)]), features=frozenset())
    assert "LowbitLinear([32, 16], weight=int8/channel, input=uint8/asym, kernel=linear/reference)" in repr(shipped)


def test_an_add_module_is_shipped_too() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.add = nn.Linear(6, 6), nn.Linear(6, 6), Add()

        def forward(self, x: Tensor) -> Tensor:
            return self.add(self.left(x), self.right(x)).relu()

    x = torch.randn(4, 6)
    shipped = convert(calibrated(Sum(), "w8a8", [x]), features=frozenset())
    assert repr(shipped.add) == "LowbitAdd(inputs=uint8/asym, uint8/asym, kernel=add/reference)"


def test_negative_and_large_indices_are_refused_by_simulated_and_shipped_embeddings_alike() -> None:
    net = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    simulated = calibrated(net, "w8a8", [torch.arange(6)])
    for model in (net, simulated, convert(simulated)):
        for bad in (-1, 6):
            with pytest.raises(IndexError):
                model(torch.tensor([bad]))
