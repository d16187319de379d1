"""README claim: the exported ONNX file gives the same answers in ONNX Runtime as the converted model, layer by layer.

ResNet20 fine-tuned on JPEG CIFAR-10: 512 training images for calibration, 2,000 test images to compare. MobileNetV1 of
the visual wake words task on CIFAR-10 test images enlarged to 96x96: other data than it was trained on, so only the
agreement of two runtimes is judged. Writes results/onnx_parity.json.

    python benchmarks/onnx_parity.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from bitwright.export.parity import parity
from data import jpeg_cifar10, shared
from models import CifarResNet, MobileNetV1
from results import write

MIXED = {"layer1.*.weight": "int4/channel", "layer2.*.conv1.weight": "ternary/channel"}


def compared(name: str, model: nn.Module, plan: bw.Plan, calibration: Tensor, x: Tensor) -> dict[str, object]:
    prepared = bw.prepare(model, plan)
    bw.calibrate(prepared, calibration.split(128))
    shipped = bw.convert(prepared, inplace=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        bw.export(shipped, path, x[:2])
        found = parity(shipped, path, x)
    print(f"{name}: same answers {100 * found.argmax_agreement:.2f} %, output SQNR {found.output.sqnr:.1f} dB")
    for layer in found.layers:
        print(f"    {layer.path:24s} largest difference {layer.max_abs:9.2e}  SQNR {layer.sqnr:6.1f} dB")
    layers = {layer.path: {"max_abs": layer.max_abs, "sqnr": layer.sqnr} for layer in found.layers}
    return {"same answers": found.argmax_agreement, "output sqnr": found.output.sqnr, "layers": layers}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    resnet = CifarResNet(20)
    bw.load_weights(resnet, shared("cifar10_resnet") / "resnet20_jpeg_finetuned.pt").eval()
    calibration, x = jpeg_cifar10("train", 512)[0], jpeg_cifar10("test", 2000)[0]
    results: dict[str, object] = {}
    for name, preset, rules in (("w8a8", "w8a8", {}), ("w4a8", "w4a8", {}), ("int8/int4/ternary", "w8a8", MIXED)):
        plan = bw.Plan.preset(preset, resnet, x[:2], target="onnxruntime", sites=rules)
        results[f"ResNet20 {name}"] = compared(f"ResNet20 {name}", resnet, plan, calibration, x)
    mobilenet = MobileNetV1()
    bw.load_weights(mobilenet, shared("mlperf_tiny") / "vww_mobilenetv1_025.pt").eval()
    calibration, x = (F.interpolate(part[:512], size=96).clamp(-2, 2) / 4 + 0.5 for part in (calibration, x))
    plan = bw.Plan.preset("w8a8", mobilenet, x[:2], target="onnxruntime")
    results["MobileNetV1 w8a8"] = compared("MobileNetV1 w8a8", mobilenet, plan, calibration, x)
    write("onnx_parity", results)


if __name__ == "__main__":
    main()
