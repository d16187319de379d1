"""One copy of every weight: what a shipped layer holds against what `coverage` accounts for; sharing and loading."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.flow import ship
from bitwright.flow.checkpoint import load, save
from bitwright.flow.convert import convert
from bitwright.flow.coverage import coverage
from bitwright.kernels import cpu
from bitwright.kernels.row import Activation
from bitwright.lowbit.conv import LowbitConv
from bitwright.lowbit.embedding import LowbitEmbedding
from bitwright.lowbit.layer import LowbitLayer
from bitwright.lowbit.linear import LowbitLinear
from bitwright.numerics.qtensor import QTensor, quantize
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.plan.plan import Plan
from models import TiedLayers
from nets import FEATURES, calibrated, layer_plan

native = pytest.mark.skipif(cpu.native is None, reason="no native kernels here")


def tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object: attributes, containers, closures, weak references left out."""
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type, torch.dtype, torch.device)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, dict):
        children = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        children = list(value)
    else:
        slots = [getattr(value, name, None) for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        children = [*vars(value).values(), *slots] if hasattr(value, "__dict__") else slots
    children += [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    for child in children:
        yield from tensors(child, seen)


def held(module: nn.Module) -> int:
    """Bytes of the memory behind all tensors that can be reached from a module, shared memory once."""
    gc.collect()
    places = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(module, set())}
    return sum(places.values())


def linear(spec: str, input: str | None, n: int, k: int) -> LowbitLinear:
    codes = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    weight = quantize(codes, QuantSpec.parse(spec))
    activation = None
    if input is not None:
        encoding = QuantSpec.parse(input)
        zero_point = None if encoding.symmetric else torch.tensor([3.0])
        activation = Activation(encoding, None if encoding.dynamic else QParams(torch.tensor([0.1]), zero_point))
    return LowbitLinear(weight, torch.randn(n), activation, cpu.cpu_features())


def accounted(layer: LowbitLayer) -> int:
    model = nn.Sequential(layer)
    model.bitwright_plan = layer_plan(nn.Linear(1, 1), "int8")  # type: ignore[assignment]
    return sum(row.bytes for row in coverage(model))


@native
@pytest.mark.parametrize("n", [512, 1008])
@pytest.mark.parametrize("input", [None, "int8/token/dynamic", "int8"])
@pytest.mark.parametrize("granularity", ["channel", "group32", "group64", "group128"])
@pytest.mark.parametrize("fmt", ["int8", "int4", "int3", "int2"])
def test_a_linear_layer_holds_what_is_accounted(fmt: str, granularity: str, input: str | None, n: int) -> None:
    layer = linear(f"{fmt}/{granularity}", input, n, 640)
    family = "decode" if input is None else "groups" if granularity != "channel" else ""
    assert layer.kernel.name.startswith(f"linear/{family}")
    assert layer.kernel.name.split("/")[-1] in cpu.ISA
    assert accounted(layer) <= held(layer) <= 1.01 * accounted(layer)


@native
@pytest.mark.parametrize("input", [None, "int8/token/dynamic"])
@pytest.mark.parametrize("granularity", ["channel", "group32", "group128"])
def test_ternary_takes_two_bits_in_memory(granularity: str, input: str | None) -> None:
    """Files hold five codes per byte, the kernels read four."""
    layer = linear(f"ternary/{granularity}", input, 512, 640)
    saved, in_memory = 512 * 640 // 5, 512 * 640 // 4
    assert held(layer) <= 1.01 * (accounted(layer) - saved + in_memory)


@native
@pytest.mark.parametrize("granularity", ["channel", "group32"])
@pytest.mark.parametrize("fmt", ["int8", "int4", "int3", "int2"])
def test_zero_points_of_inputs_need_one_sum_per_scale(fmt: str, granularity: str) -> None:
    layer = linear(f"{fmt}/{granularity}", "uint8/asym", 512, 640)
    sums = 4 * 512 * (1 if granularity == "channel" else 640 // 32)
    assert held(layer) <= 1.01 * accounted(layer) + sums


@pytest.mark.parametrize("fmt", ["int8", "int4", "int3", "int2", "ternary", "nf4", "fp8_e4m3", "fp16"])
def test_an_embedding_holds_the_bytes_of_its_file(fmt: str) -> None:
    spec = QuantSpec.parse(fmt if fmt == "fp16" else f"{fmt}/channel")
    layer = LowbitEmbedding(quantize(torch.randn(300, 512), spec), None, None, frozenset())
    assert accounted(layer) <= held(layer) <= 1.01 * accounted(layer)


def convolution(spec: str, channels: int, groups: int, features: frozenset[str]) -> LowbitConv:
    layer = nn.Conv2d(channels, channels, 3, groups=groups)
    plan = layer_plan(layer, spec, "uint8/asym")
    shipped = convert(calibrated(layer, plan, [torch.randn(1, channels, 5, 5)]), features=features)
    assert isinstance(shipped, LowbitConv)
    return shipped


@native
@pytest.mark.parametrize("features", [name for name in FEATURES if name != "reference"])
@pytest.mark.parametrize("fmt", ["int8", "int4", "int3", "int2"])
def test_a_convolution_holds_what_is_accounted(fmt: str, features: str) -> None:
    """The sums of its outputs included."""
    shipped = convolution(f"{fmt}/channel", 256, 1, FEATURES[features])
    bytes = sum(row.bytes for row in coverage(shipped))
    assert bytes <= held(shipped) <= 1.01 * bytes


@native
@pytest.mark.parametrize(
    ("spec", "bits"), [("ternary", 2), ("midrise2", 3), ("midrise3/channel", 4), ("int5", 8), ("int6/channel", 8)]
)
def test_convolutions_of_other_formats_take_the_next_width(spec: str, bits: int) -> None:
    shipped = convolution(spec, 64, 1, cpu.cpu_features())
    assert shipped.kernel_layout.numel() == 64 * 64 * 9 * bits // 8


@native
def test_depthwise_convolutions_hold_bytes() -> None:
    assert convolution("int4/channel", 64, 64, cpu.cpu_features()).kernel_layout.numel() == 64 * 9


@pytest.mark.parametrize("groups", [1, 2, 128])
@pytest.mark.parametrize("features", FEATURES)
def test_a_convolution_of_8_bits_holds_its_codes_once(features: str, groups: int) -> None:
    shipped = convolution("int8/channel", 128, groups, FEATURES[features])
    sums = 0 if features == "reference" else 4 * 128
    assert held(shipped) <= 1.01 * sum(row.bytes for row in coverage(shipped)) + sums


@pytest.mark.parametrize("features", FEATURES)
def test_rows_in_torch_hold_one_byte_per_code_and_nothing_beside(features: str) -> None:
    weight = quantize(torch.randn(512, 512), QuantSpec.parse("int8/channel"))
    layer = LowbitLinear(weight, None, Activation(QuantSpec.parse("int8/token/dynamic"), None), frozenset())
    assert held(layer) <= 1.01 * accounted(layer)


@pytest.mark.parametrize("text", ["int4/group32", "int8/channel", "int3/channel", "uint4/group32/asym", "nf4/group64",
                                  "nf4/group32/scale(int8)", "kmeans4", "ternary/channel", "fp16", "int4"])  # fmt: skip
@pytest.mark.parametrize("input", [None, "uint8/asym"])
@pytest.mark.parametrize("features", FEATURES)
def test_saving_gives_the_parts_of_the_weight_back(text: str, input: str | None, features: str) -> None:
    weight = quantize(torch.randn(33, 64), QuantSpec.parse(text))
    encoding = QuantSpec.parse("uint8/asym")
    activation = Activation(encoding, QParams(torch.tensor([0.1]), torch.tensor([3.0]))) if input else None
    layer = LowbitLinear(weight, torch.randn(33), activation, FEATURES[features])
    state = layer.state_dict()
    assert state["packed"].dtype is torch.uint8
    assert torch.equal(state["packed"], weight.packed)
    names = ["packed", "weight_scale", "weight_zero_point", "weight_codebook", "weight_scale_packed",
             "weight_scale_scale", "weight_scale_zero_point", "bias", "input_scale", "input_zero_point"]  # fmt: skip
    assert list(state) == [name for name in names if name in state]
    if isinstance(weight.scale, QTensor):
        assert torch.equal(state["weight_scale_packed"], weight.scale.packed)
    else:
        assert torch.equal(state["weight_scale"], weight.scale)
    for name, part in (("weight_zero_point", weight.zero_point), ("weight_codebook", weight.codebook)):
        assert (name in state) == (part is not None)
        assert part is None or torch.equal(state[name], part)


def other(layer: LowbitLinear) -> LowbitLinear:
    """A layer of the same specs with another weight."""
    twin = copy.deepcopy(layer)
    twin.lay_out(replace(layer.weight, packed=layer.packed.flip(0)))
    return twin


@pytest.mark.parametrize("text", ["int4/group32", "int8/channel", "nf4/group32/scale(int8)"])
def test_some_parts_or_all_can_be_loaded(text: str) -> None:
    layer, x = linear(text, None, 32, 64), torch.randn(3, 64)
    twin, state = other(layer), layer.state_dict()
    assert not torch.equal(twin(x), layer(x))
    half = copy.deepcopy(twin)
    half.load_state_dict({"packed": state["packed"]}, strict=False)
    assert torch.equal(half(x), layer(x))
    bias = copy.deepcopy(twin)
    bias.load_state_dict({"bias": torch.zeros(32)}, strict=False)
    assert torch.equal(bias.packed, twin.packed)
    for assign in (False, True):
        full = copy.deepcopy(twin)
        assert str(full.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
        assert torch.equal(full(x), layer(x))


def test_loading_says_what_is_missing_unexpected_or_of_another_shape() -> None:
    layer = linear("int4/group32", None, 32, 64)
    state = layer.state_dict()
    before = layer.packed.clone()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "packed"'):
        layer.load_state_dict({name: value for name, value in state.items() if name != "packed"})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight_zero_point"'):
        layer.load_state_dict({**state, "weight_zero_point": torch.zeros(32, 2)})
    with pytest.raises(RuntimeError, match=r"size mismatch for packed: the layer has \[32, 32\], given \[32, 31\]"):
        layer.load_state_dict({**state, "packed": state["packed"][:, 1:]})
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_scale: .* given list"):
        layer.load_state_dict({**state, "weight_scale": [1.0]})
    assert torch.equal(layer.packed, before)


def test_a_loaded_layer_does_not_hold_the_memory_of_the_state_dict() -> None:
    layer = LowbitEmbedding(quantize(torch.randn(9, 8), QuantSpec.parse("int8/channel")), None, None, frozenset())
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.load_state_dict(state)
    expected = layer(torch.arange(9))
    for value in state.values():
        value.zero_()
    assert torch.equal(layer(torch.arange(9)), expected)


def test_parts_that_were_written_to_are_computed_anew() -> None:
    layer = linear("int4/group32", None, 32, 64)
    state, expected = layer.state_dict(), layer.packed.clone()
    state["packed"].zero_()
    assert torch.equal(layer.packed, expected)


def stored(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Names, types and places of the tensors of a file, and their bytes; the order of metadata is no one's choice."""
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def test_layers_of_one_weight_share_their_constants_through_copies_and_files(tmp_path: Path) -> None:
    model: Any = convert(calibrated(TiedLayers(), "w8a8", [torch.randn(4, 8)]))
    save(model, tmp_path / "one")
    again = load(tmp_path / "one", TiedLayers())
    models: list[Any] = [model, copy.deepcopy(model), again, model.to("cpu")]
    for found in models:
        assert found.a.kernel_layout is found.b.kernel_layout
        assert found.a.packed is found.b.packed
    save(again, tmp_path / "two")
    assert stored(tmp_path / "one") == stored(tmp_path / "two")


def test_an_embedding_and_a_head_of_one_weight_are_saved_once(tmp_path: Path) -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.inner(self.embed(ids)).relu())

    model, ids = Language(), torch.randint(40, (2, 6))
    specs = {f"{name}.weight": "int4/group32" for name in ("embed", "inner", "head")}
    plan = Plan.preset("w4a16", model, ids, sites=specs)
    shipped = convert(calibrated(model, plan, [ids]))
    assert isinstance(shipped.head, LowbitLinear)
    assert isinstance(shipped.embed, LowbitEmbedding)
    rows = {row.path: row.bytes for row in coverage(shipped)}
    assert rows["embed.weight"] == 40 * 16 + 40 * 4
    assert rows["head.weight"] == 0
    save(shipped, tmp_path / "one")
    again = load(tmp_path / "one", Language())
    assert torch.equal(again(ids), shipped(ids))
    save(again, tmp_path / "two")
    assert stored(tmp_path / "one") == stored(tmp_path / "two")


def test_a_shipped_layer_can_be_pickled() -> None:
    layer, x = linear("int4/group32", None, 32, 64), torch.randn(3, 64)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x), layer(x))
    assert torch.equal(again.packed, layer.packed)


def test_a_layer_on_no_device_has_the_shapes_of_its_parts() -> None:
    layer = linear("uint4/group32/asym", None, 32, 64)
    expected = {name: (value.shape, value.dtype) for name, value in layer.state_dict().items()}
    found = layer.to("meta").state_dict()
    assert all(value.is_meta for value in found.values())
    assert {name: (value.shape, value.dtype) for name, value in found.items()} == expected


def float_weights() -> int:
    """Float tensors of the test's size that are alive."""
    found = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    return sum(x.shape == (67, 67) and x.is_floating_point() for x in found)


@pytest.mark.parametrize("inplace", [True, False])
def test_float_weights_are_freed_one_by_one(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place each float weight is gone when the next layer is packed; elsewhere none is copied."""
    net = nn.Sequential(*(nn.Linear(67, 67, bias=False) for _ in range(5)))
    plan, x = Plan.preset("w8a8", net, torch.randn(2, 67), sites={"4.weight": "int8/channel"}), torch.randn(2, 67)
    simulated = calibrated(net, plan, [x])
    gc.collect()
    start, alive, pack = float_weights(), list[int](), ship.pack_weight

    def counted(weight: Tensor, quantizer: Any) -> QTensor:
        alive.append(float_weights() - start)
        return pack(weight, quantizer)

    monkeypatch.setattr(ship, "pack_weight", counted)
    shipped = convert(simulated, inplace=inplace)
    assert alive == ([0, -1, -2, -3, -4] if inplace else [0] * 5)
    assert float_weights() - start == (-5 if inplace else 0)
    assert sum(isinstance(layer, LowbitLinear) for layer in shipped.modules()) == 5


@native
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    "arguments",
    [
        ("int4/group32", "int8/token/dynamic", "6", "2048", "linear"),
        ("int8/channel", "int8/token/dynamic", "6", "2048", "linear"),
        ("int4/channel", "uint8/asym", "6", "512", "conv"),
    ],
    ids=lambda arguments: f"{arguments[-1]} {arguments[0]}",
)
def test_the_process_is_as_large_as_accounted(arguments: tuple[str, ...]) -> None:
    """Resident memory of a stack of layers in a process of its own; half a MiB for what is no tensor."""
    script = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["resident"] <= 1.01 * found["accounted"] + 2**19


def test_layers_made_in_inference_mode() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(3, 8)
    prepared = calibrated(model, Plan.preset("w8a8", model, x), [x])
    with torch.inference_mode():
        shipped = convert(prepared)
        shipped.load_state_dict(shipped.state_dict())
        assert torch.equal(shipped(x), prepared.eval()(x))
