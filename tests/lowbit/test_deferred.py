"""Results that wait: bit for bit those of running every layer at once, whatever Python code lies between the layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from bitwright.kernels import cpu, images
from bitwright.kernels.images import Encoding, Request, Window
from bitwright.lowbit.deferred import Deferred
from bitwright.numerics.affine import encode
from bitwright.numerics.spec import QParams, QuantSpec

pytestmark = pytest.mark.skipif(cpu.native is None, reason="needs the native kernels")


class Net(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def both(model: nn.Module, x: Tensor) -> tuple[nn.Module, nn.Module]:
    """The simulated and the shipped model."""
    prepared = bw.prepare(model.eval(), bw.Plan.preset("w8a8", model, x))
    bw.calibrate(prepared, [x])
    return prepared.eval(), bw.convert(prepared)


def images_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def keep_an_item(x: Tensor) -> Tensor:
    kept = x.numpy().copy()
    return x + torch.from_numpy(kept) * 0


def change_in_place(x: Tensor) -> Tensor:
    y = F.relu(x)
    x += 1.0
    x.mul_(0.5)
    return F.relu(x) + y


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu by name": lambda x: torch.relu(input=x),
    "relu twice": lambda x: torch.relu_(torch.relu(x)),
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.25, 0.5),
    "relu of hardtanh": lambda x: F.hardtanh(x, -0.25, 0.5).relu(),
    "gelu": F.gelu,
    "pooling": lambda x: F.max_pool2d(F.relu(x), 2),
    "relu after pooling": lambda x: F.relu(F.max_pool2d(x, 3, 2, 1)),
    "pooling that overlaps": lambda x: nn.MaxPool2d((3, 2), (1, 2), (1, 0))(F.relu6(x)),
    "pooling twice": lambda x: F.max_pool2d(F.max_pool2d(x, 2, stride=1), kernel_size=[2]),
    "pooling with dilation": lambda x: F.max_pool2d(x, 2, dilation=2),
    "pooling with ceil_mode": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "pooling and all": lambda x: F.max_pool2d(F.relu(x), 3, 1, 1) + x,
    "pooling, then in place": lambda x: F.relu(F.max_pool2d(x, 3, 1, 1)) + x.mul_(0.5),
    "before and after": lambda x: x * 0.5 + F.relu(x),
    "numpy": keep_an_item,
    "in place": change_in_place,
    "control flow": lambda x: F.relu(x) if x.max() > 100 else x.abs(),
    "shape": lambda x: x.view(x.shape[0], x.size(1), *x.shape[2:]),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_lies_between_two_layers_does_not_matter(name: str) -> None:
    torch.manual_seed(0)
    x = images_of(1, 2, 3, 8, 8)
    simulated, shipped = both(Net(BETWEEN[name]), x)
    with torch.no_grad():
        for _ in range(3):  # a layer learns what is asked of it
            out = shipped(x)
            assert type(out) is Tensor
            assert torch.equal(out, simulated(x))


class Residual(nn.Module):
    """A block whose result two quantizers read: that of a convolution and that of a sum."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.pool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.stem(x)))
        return self.head(F.relu(x + self.body(x)))


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("change", [1.0, 1.5])
def test_a_result_for_several_quantizers(change: float, pool: bool) -> None:
    """Equal ones share the bytes, different ones get float32."""
    torch.manual_seed(0)
    x = images_of(1, 2, 3, 9, 7)
    simulated, shipped = both(Residual(pool), x)
    state = shipped.state_dict()
    state["body.input_scale"] = state["body.input_scale"] * change
    shipped.load_state_dict(state)
    at_once = bw.convert(simulated, features=frozenset())
    at_once.load_state_dict(state)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(shipped(x), at_once(x))
        assert torch.equal(copy.deepcopy(shipped)(x), at_once(x))
    stem: Any = shipped.get_submodule("stem")
    asked = next(iter(stem.asked.pooled.values())) if pool else stem.asked
    assert len(asked.requests) == (1 if change == 1.0 else 2)


def test_a_layer_alone_answers_later_and_is_not_misled() -> None:
    """The input is read at once: changing it afterwards changes nothing."""
    torch.manual_seed(0)
    x = images_of(1, 1, 3, 6, 6)
    _, shipped = both(Net(F.relu), x)
    layer = shipped.get_submodule("first")
    with torch.no_grad():
        wanted = layer(x) + 0
        later = layer(x)
        x.zero_()
        assert type(later) is Deferred
        assert later.shape == wanted.shape
        assert torch.equal(later, wanted)
        assert repr(later) == repr(wanted)


def test_part_of_a_model_may_be_compiled() -> None:
    torch.manual_seed(0)
    x = images_of(1, 1, 3, 6, 6)
    simulated, shipped = both(Net(F.relu), x)
    net: Any = shipped
    net.second = torch.compile(net.second, backend="eager")
    with torch.no_grad():
        assert torch.equal(shipped(x), simulated(x))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, 9),) * 3, st.integers(1, 20)),
    spec=st.sampled_from(["uint8/asym", "int8", "uint4/asym", "int4"]),
    low=st.sampled_from([-torch.inf, 0.0, -0.3]),
    high=st.sampled_from([torch.inf, 0.7, 6.0]),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_bytes_are_codes(
    sizes: tuple[int, int, int, int], spec: str, low: float, high: float, last: bool, seed: int
) -> None:
    n, h, w, c = sizes
    x = images_of(seed, n, c, h, w) * 2
    x = x.to(memory_format=torch.channels_last) if last else x
    known = QuantSpec.parse(spec)
    zero = 0.0 if known.symmetric else float(known.format.qmax // 3)
    encoding = Encoding(0.0625, zero, known.format.qmin, known.format.qmax)
    found = images.encode(x, Request(encoding, low, high))
    qparams = QParams(torch.tensor([0.0625]), None if known.symmetric else torch.tensor([zero]))
    codes = encode(x.clamp(low, high), known, qparams).permute(0, 2, 3, 1)
    shift = 128 if encoding.qmin < 0 else 0
    assert torch.equal(found[..., :c].to(torch.int16) - shift, codes.to(torch.int16))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(3, 9), st.integers(3, 9)),
    kernel_size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 99),
)
def test_largest_bytes(
    sizes: tuple[int, ...], kernel_size: tuple[int, int], stride: tuple[int, int], seed: int
) -> None:
    x = torch.randint(0, 256, sizes, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    window = Window(kernel_size, stride, (kernel_size[0] // 2, kernel_size[1] // 2))
    found = images.max_pool(x.permute(0, 2, 3, 1).contiguous(), window)
    assert torch.equal(found.permute(0, 3, 1, 2).float(), F.max_pool2d(x.float(), *window))


@pytest.mark.parametrize("options", [{"padding": 2}, {"kernel_size": 9}, {"stride": (0, 1)}, {"padding": -1}])
def test_pooling_that_torch_refuses(options: Any) -> None:
    torch.manual_seed(0)
    _, shipped = both(Net(F.relu), images_of(1, 1, 3, 6, 6))
    later = shipped.get_submodule("first")(images_of(1, 1, 3, 6, 6))
    pool: Any = nn.MaxPool2d(**{"kernel_size": 3, **options})
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"(?i)pad|output size|stride"):
        pool(later)


def test_a_gradient_that_ends_here_is_not_silent() -> None:
    torch.manual_seed(0)
    x = images_of(1, 1, 3, 6, 6)
    _, shipped = both(Net(F.relu), x)
    with pytest.warns(UserWarning, match=r"bitwright::conv2d: an autograd kernel was not registered"):
        shipped(x.requires_grad_()).sum().backward()


def test_a_sum_follows_the_scales_that_are_loaded() -> None:
    torch.manual_seed(0)
    x = images_of(1, 2, 3, 9, 7)
    simulated, shipped = both(Residual(pool=False), x)
    state = shipped.state_dict()
    for name in [name for name in state if "input_scale_" in name]:
        state[name] = state[name] * 3
    shipped.load_state_dict(state)
    at_once = bw.convert(simulated, features=frozenset())
    at_once.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(shipped(x), at_once(x))
        assert not torch.equal(shipped(x), simulated(x))
