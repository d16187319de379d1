"""Whole models in ONNX files: valid, small, run by ONNX Runtime in integers, close to the converted model."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import with_statistics
from nets import ResNet20

pytest.importorskip("onnxruntime")

import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper

from bitwright.errors import ExportError, MissingExtraError
from bitwright.export.graph import lowbit_layers
from bitwright.export.onnx import export
from bitwright.export.parity import Parity, parity, run_onnx, settings
from bitwright.flow.calibrate import calibrate
from bitwright.flow.checkpoint import load_weights
from bitwright.flow.convert import convert
from bitwright.flow.prepare import prepare
from bitwright.graph.dataflow import call
from bitwright.lowbit.elementwise import LowbitAdd
from bitwright.lowbit.layer import LowbitLayer
from bitwright.lowbit.linear import LowbitLinear
from bitwright.plan.plan import Plan


class Residual(nn.Module):
    """A convolution, a depthwise one that pads ``same``, and a shortcut with its own convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.depthwise = nn.Conv2d(outputs, outputs, 3, padding="same", groups=outputs)
        self.down = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(F.pad(x, (0, 2, 1, 1)))))
        return F.relu(self.depthwise(y) + self.down(x))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.blocks = nn.Sequential(Residual(8, 16, 2), Residual(16, 16))
        self.hidden, self.fc = nn.Linear(16, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x))).mean((2, 3))
        return self.fc(F.relu(self.hidden(x)))


class Cnn1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.second, self.fc = nn.Conv1d(8, 8, 4, padding="same", dilation=2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.fc(F.relu(self.second(x)).flatten(2).mean(-1))


class Words(nn.Module):
    """Two embeddings, layers that may be called twice, two inputs and two outputs."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.times = times
        self.words, self.places = nn.Embedding(50, 32), nn.Embedding(6, 32)
        self.up, self.down, self.norm = nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32)
        self.fc = nn.Linear(32, 7)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for _ in range(self.times):
            x = self.norm(x + self.down(F.gelu(self.up(x))))
        return self.fc((x * mask.unsqueeze(-1)).mean(1)), x


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 10, 10)


def series(batch: int) -> Tensor:
    return torch.randn(batch, 4, 20)


def features(batch: int) -> Tensor:
    return torch.randn(batch, 16)


def sentences(batch: int) -> dict[str, Tensor]:
    return {"mask": torch.rand(batch, 6), "ids": torch.randint(0, 50, (batch, 6))}


@dataclass(frozen=True)
class Case:
    net: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    preset: str
    sites: dict[str, str]
    fused: dict[str, int]  # how often ONNX Runtime's optimised graph has these operators
    tolerance: float = 1e-5


CASES = {
    "cnn-w8a8": Case(
        Cnn, images, "w8a8", {}, {"QLinearConv": 7, "QLinearAdd": 1, "MatMulIntegerToFloat": 1, "Conv": 0}, 0.02
    ),
    "cnn-mixed": Case(
        Cnn,
        images,
        "w4a8",
        {
            "blocks.0.conv.weight": "ternary/channel",
            "blocks.1.conv.input": "uint4/asym",
            "blocks.1.down.input": "int8",
            "blocks.1.conv.weight": "int6",
            "hidden.weight": "int3/channel",
        },
        {"QLinearConv": 7, "Clip": 1, "Conv": 0},
        0.05,
    ),
    "cnn-w4a4": Case(Cnn, images, "w4a4", {}, {"QLinearConv": 7, "Clip": 5, "Conv": 0}, 0.1),
    "cnn-fp16": Case(Cnn, images, "fp16", {}, {"Cast": 0, "DequantizeLinear": 0}),
    "cnn-dynamic": Case(Cnn, images, "w8a8-dynamic", {}, {"ConvInteger": 7, "MatMulInteger": 1}, 0.02),
    "cnn1d-w4a8": Case(Cnn1d, series, "w4a8", {}, {"QLinearConv": 1, "Pad": 0}, 0.02),
    "mlp-w8a8": Case(mlp, features, "w8a8", {}, {"MatMulIntegerToFloat": 2, "MatMul": 0}),
    "words-w4a16": Case(
        Words,
        sentences,
        "w4a16",
        {"up.weight": "int4/group32", "down.weight": "uint4/group16/asym", "words.weight": "int4/group8"},
        {"MatMulNBits": 2, "DequantizeLinear": 0},
    ),
    "words-twice-w8a8": Case(
        lambda: Words(2), sentences, "w8a8", {"places.weight": "nf4/channel"}, {"MatMulIntegerToFloat": 4}
    ),
}


def converted(net: nn.Module, preset: str, batch: Any, sites: dict[str, str] | None = None) -> nn.Module:
    model = prepare(net, Plan.preset(preset, net, batch, sites=sites))
    calibrate(model, [batch])
    return convert(model)


@dataclass(frozen=True)
class Exported:
    case: Case
    model: nn.Module
    path: Path
    proto: onnx.ModelProto
    parity: Parity


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    case, path = request.param, tmp_path_factory.mktemp("onnx") / "model.onnx"
    if case is CASES["words-twice-w8a8"] and "session.x64quantprecision" in settings():
        pytest.skip("without VNNI: ONNX Runtime's exact setting refuses weights that two calls of a layer share")
    model = converted(with_statistics(case.net()).eval(), case.preset, case.batch(16), case.sites)
    export(model, path, case.batch(2))
    return Exported(case, model, path, onnx.load(str(path)), parity(model, path, case.batch(33)))


def optimised(path: Path, tmp_path: Path, entries: dict[str, str]) -> tuple[onnxruntime.InferenceSession, Counter[str]]:
    """A session with default optimisations, and the operators it runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return session, Counter(node.op_type.replace("FusedConv", "Conv") for node in nodes)


def test_files_are_valid_and_hold_nothing_else(exported: Exported) -> None:
    onnx.checker.check_model(exported.proto, full_check=True)
    graph = exported.proto.graph
    assert [(entry.domain, entry.version) for entry in exported.proto.opset_import] == [("", 21)]
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used
    assert all(value.type.tensor_type.shape.dim[0].dim_param == "batch" for value in (*graph.input, *graph.output))
    assert str(Path(__file__).parent).encode() not in exported.proto.SerializeToString()
    assert [path.name for path in exported.path.parent.iterdir()] == ["model.onnx"]


def test_codes_and_scales_are_the_models_own(exported: Exported) -> None:
    tensors = {tensor.name: tensor for tensor in exported.proto.graph.initializer}
    for path, layer in lowbit_layers(exported.model).items():
        if isinstance(layer, LowbitAdd):
            continue
        weight, fmt = tensors[f"{path}.weight"], layer.weight_spec.format
        codes = torch.from_numpy(numpy_helper.to_array(weight).astype("float32"))
        if layer.weight_spec.granularity.kind == "group" and codes.dim() == 3:
            codes = codes.flatten(1)
        assert torch.equal(codes.T if isinstance(layer, LowbitLinear) else codes, layer.weight.codes.float())
        if fmt.dtype is not None:
            assert weight.data_type == TensorProto.FLOAT16
            continue
        kinds = {True: (TensorProto.INT4, TensorProto.UINT4), False: (TensorProto.INT8, TensorProto.UINT8)}
        assert weight.data_type in kinds[fmt.bits <= 4]
        scale = torch.from_numpy(numpy_helper.to_array(tensors[f"{path}.weight_scale"]).copy())
        ours = layer.weight_scale
        assert torch.equal((scale.T if scale.dim() == 2 and isinstance(layer, LowbitLinear) else scale).flatten(),
                           ours.flatten())  # fmt: skip
    assert any(isinstance(layer, LowbitLayer) for layer in lowbit_layers(exported.model).values())


def test_output_agrees_on_another_batch_size(exported: Exported) -> None:
    found = exported.parity
    assert found.output.max_abs <= exported.case.tolerance, found
    assert found.argmax_agreement > 0.95


def test_every_layer_is_compared(exported: Exported) -> None:
    found = exported.parity
    if exported.case is CASES["cnn-dynamic"] and "session.x64quantprecision" in settings():
        pytest.skip("without VNNI: ONNX Runtime's ConvInteger saturates whatever the setting")
    assert [layer.path for layer in found.layers] == list(lowbit_layers(exported.model))
    assert all(layer.sqnr > 40 for layer in found.layers), found
    assert found.first_difference(tolerance=0.3) is None


def test_default_session_runs_integers(exported: Exported, tmp_path: Path) -> None:
    _, operators = optimised(exported.path, tmp_path, settings())
    assert {name: operators[name] for name in exported.case.fused} == exported.case.fused, operators


def test_settings_for_machines_without_vnni(exported: Exported, tmp_path: Path) -> None:
    if exported.case is CASES["words-twice-w8a8"]:
        pytest.skip("with this setting ONNX Runtime refuses weights that two calls of a layer share")
    session, _ = optimised(exported.path, tmp_path, settings() | {"session.x64quantprecision": "1"})
    batch = exported.case.batch(3)
    named = batch if isinstance(batch, dict) else {session.get_inputs()[0].name: batch}
    found = session.run(None, {name: value.numpy() for name, value in named.items()})[0]
    assert torch.allclose(torch.from_numpy(found), run_onnx(exported.path, batch)[0], atol=exported.case.tolerance)


@pytest.mark.shared_data
@pytest.mark.slow
def test_published_resnet20(shared_data: Path, tmp_path: Path) -> None:
    net = load_weights(ResNet20(), shared_data / "cifar10_resnet" / "resnet20-12fca82f.th").eval()
    stored = np.load(shared_data / "cifar10_lossless4k" / "cifar10_lossless_4000.npz")
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = (torch.from_numpy(stored["x"][:512]).permute(0, 3, 1, 2).float() / 255 - mean) / std
    model = converted(net, "w4a8", x[256:])
    export(model, tmp_path / "model.onnx", x[:2])
    found = parity(model, tmp_path / "model.onnx", x[:256])
    assert found.argmax_agreement >= 0.995
    assert all(layer.sqnr > 30 for layer in found.layers)
    _, operators = optimised(tmp_path / "model.onnx", tmp_path, settings())
    assert (operators["QLinearConv"], operators["Conv"], operators["QLinearAdd"]) == (19, 0, 6)


@pytest.mark.parametrize(("gain", "integers"), [(0.0, 1), (1e-6, 0)])
def test_channels_that_a_batch_norm_switched_off(gain: float, integers: int, tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(144, 4)
    )
    norm = with_statistics(net.eval())[1]
    norm.weight.data[:3], norm.bias.data[:3] = gain, torch.tensor([300.0, 0.5, -300.0])
    model = converted(net, "w8a8", images(8))
    export(model, tmp_path / "model.onnx", images(2))
    found = parity(model, tmp_path / "model.onnx", images(8))
    assert found.output.sqnr > 60  # ONNX Runtime saturates a bias above 2**31 steps of s_x * s_w
    _, operators = optimised(tmp_path / "model.onnx", tmp_path, settings())
    assert operators["QLinearConv"] == integers


def test_layers_of_a_wrong_file_are_found(tmp_path: Path) -> None:
    batch = features(8)
    model = converted(mlp(), "w8a8", batch)
    export(model, tmp_path / "model.onnx", batch)
    proto = onnx.load(str(tmp_path / "model.onnx"))
    [scale] = [tensor for tensor in proto.graph.initializer if tensor.name == "2.weight_scale"]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 1.5, scale.name))
    onnx.save(proto, str(tmp_path / "wrong.onnx"))
    found = parity(model, tmp_path / "wrong.onnx", batch)
    first = found.first_difference()
    assert first is not None
    assert first.path == "2"
    with pytest.raises(ExportError, match="has no layer '1'; it is the file of another model"):
        parity(converted(nn.Sequential(nn.ReLU(), mlp()[0], nn.ReLU(), mlp()[2], nn.Linear(32, 4)), "w8a8", batch),
               tmp_path / "model.onnx", batch)  # fmt: skip
    with pytest.raises(ExportError, match="takes 1 inputs"):
        run_onnx(tmp_path / "model.onnx", (batch, batch))
    with pytest.raises(ExportError, match="cannot run the file on this batch"):
        run_onnx(tmp_path / "model.onnx", torch.randn(2, 15))


def test_a_single_layer_with_a_batch_of_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = converted(nn.Linear(16, 4), "w4a16", features(1), {"weight": "int8/channel"})
    export(model, tmp_path / "model.onnx", features(1))
    batch = features(5)
    assert torch.allclose(run_onnx(tmp_path / "model.onnx", batch)[0], call(model, batch), atol=1e-5)
    assert parity(model, tmp_path / "model.onnx", batch).layers[0].path == ""
    assert capfd.readouterr() == ("", "")


class DataDecides(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if x.sum() > 0 else x)


class NoSuchOperator(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(super().forward(x).unsqueeze(-1) * torch.eye(4))


@pytest.fixture
def model() -> nn.Module:
    return converted(mlp(), "w8a8", features(4))


def test_models_that_are_not_converted(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Sequential has no low-bit layers; call bitwright"):
        export(mlp(), tmp_path / "model.onnx", features(2))
    prepared = prepare(mlp(), Plan.preset("w8a8", mlp(), features(2)))
    with pytest.raises(ExportError, match=r"simulates its low-bit layers; export what bitwright\.convert\(model\)"):
        export(prepared, tmp_path / "model.onnx", features(2))
    with pytest.raises(ExportError, match="no low-bit layers"):
        parity(mlp(), tmp_path / "model.onnx", features(2))


def test_unknown_low_bit_layers(tmp_path: Path) -> None:
    other = nn.Sequential(converted(mlp(), "w8a8", features(4))[0])
    other[0].__class__ = type("LowbitOther", (LowbitLayer,), {})
    with pytest.raises(ExportError, match="0: LowbitOther has no ONNX form; set its sites to 'float'"):
        export(other, tmp_path / "model.onnx", features(2))


def test_paths_that_cannot_be_written(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"the folder .*missing does not exist; create it first"):
        export(model, tmp_path / "missing" / "model.onnx", features(2))
    with pytest.raises(ExportError, match="it is a folder; name a file"):
        export(model, tmp_path, features(2))

    def refuse(self: Path, data: bytes) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(ExportError, match=r"cannot write .*model\.onnx: Permission denied"):
        export(model, tmp_path / "model.onnx", features(2))
    assert list(tmp_path.iterdir()) == []


def test_examples_that_do_not_fit(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match=r"the example with shapes \[\[2, 40\]\] does not fit the model"):
        export(model, path, torch.randn(2, 40))
    with pytest.raises(ExportError, match=r"dim 0 of every input is the batch .* found sizes \[2, 3\]"):
        export(model, path, (features(2), features(3)))
    with pytest.raises(ExportError, match="found no tensor with a dimension"):
        export(model, path, ())
    with pytest.raises(ExportError, match="unknown export format 'tflite'; known formats: onnx"):
        export(model, path, features(2), format="tflite")


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (DataDecides, "cannot be traced by torch.export with a dynamic batch size: GuardOnDataDependentSymNode"),
        (NoSuchOperator, "cannot be expressed in ONNX: DispatchError: No ONNX function found for .*linalg_eigh"),
    ],
)
def test_models_that_onnx_cannot_express(
    cls: type[nn.Sequential], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = converted(cls(nn.Linear(16, 8), nn.Linear(8, 4)), "w8a8", features(4), {"1.*": "float"})
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "model.onnx", features(2))
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages(model: nn.Module, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"to ONNX needs onnx, onnxscript and onnxruntime, .*\[onnx\]"):
        export(model, tmp_path / "model.onnx", features(2))


def test_large_models_are_refused(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["bitwright.export.onnx"], "_LARGEST_FILE", 100)
    with pytest.raises(ExportError, match="an ONNX file holds less than 2; use fewer bits, or export parts"):
        export(model, tmp_path / "model.onnx", features(2))


def test_import_needs_no_onnx(tmp_path: Path) -> None:
    code = "import sys, bitwright; sys.exit(any(name in sys.modules for name in ('onnx', 'onnxscript', 'onnxruntime')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
