"""README claim: the same images, calibration data and bits, quantized by bitwright and by Brevitas.

Brevitas with the steps of its example for image classification: MSE ranges for weights and activations, GPTQ in the
order of activation energy on quantized activations, bias correction; weights symmetric per channel, activations
asymmetric per tensor. The first convolution and the classifier have 8 bits in both. Residual adds have 8 bits in
bitwright and stay float in Brevitas. Weights, calibration and test images are those of ptq_resnet20.py; the recipe of
bitwright is its "gptq, bias". Drops are paired with the float model, the last column with each other. Writes
results/ptq_peer.json after every row and continues from it.

    pip install brevitas dependencies==2.0.1 unfoldNd
    python benchmarks/ptq_peer.py [--weights published] [--only W4A8 W2A8]
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import bitwright as bw
from data import jpeg_cifar10, shared
from models import CifarResNet
from ptq_resnet20 import CALIBRATION, SETTINGS, WEIGHTS, answers, calibrated, lossless
from resnet20 import batches_of
from results import FOLDER, write

TABLE = ("W4A8", "W3A8", "W4A4", "W3A3", "W2A8")


def brevitas(model: nn.Module, setting: str, calibration: Tensor) -> nn.Module:
    """The model quantized by Brevitas; batch norms are merged first."""
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.inject import value
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    found = re.fullmatch(r"W(\d)A(\d)", setting)
    assert found is not None
    weight_bits, input_bits = (int(bits) for bits in found.groups())

    def wide(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.in_channels == 3)

    weight_bit_width = value(lambda module: 8 if wide(module) else weight_bits)
    act_bit_width = value(lambda module: 8 if wide(module) else input_bits)
    maps = ptq_common.create_quant_maps(
        bias_bit_width=None, weight_bit_width=weight_bit_width, act_bit_width=act_bit_width,
        weight_param_method="mse", weight_scale_type="float_scale", weight_quant_type="sym",
        weight_quant_granularity="per_channel", weight_narrow_range=False, weight_quant_format="int",
        act_quant_format="int", act_scale_type="float_scale", act_param_method="mse", act_quant_type="asym",
        act_quant_granularity="per_tensor", act_quant_percentile=99.999, act_scale_computation_type="static",
        uint_sym_act_for_unsigned_values=True, dtype=torch.float32, device="cpu",
    )  # fmt: skip
    made = layerwise_quantize(merged(model), compute_layer_map=maps[1])
    loader = [(images, None) for images in calibration.split(64)]
    ptq_common.calibrate(loader, made)
    with torch.no_grad():
        made.eval()(calibration[:1])  # makes the quantizers of the weights
    ptq_common.apply_gptq(loader, made, act_order=True, use_quant_activations=True)
    ptq_common.apply_bias_correction(loader, made)
    return made.eval()


def merged(model: nn.Module) -> nn.Module:
    """A copy with batch norms folded into the convolutions before them."""
    model = copy.deepcopy(model).eval()
    pairs = [("conv1", "bn1")]
    blocks = [name for name, _ in model.named_modules() if re.fullmatch(r"layer\d\.\d", name)]
    pairs += [(f"{name}.conv{i}", f"{name}.bn{i}") for name in blocks for i in (1, 2)]
    for conv, norm in pairs:
        parts: list[Any] = [model.get_submodule(conv), model.get_submodule(norm)]
        model.set_submodule(conv, fuse_conv_bn_eval(*parts))
        model.set_submodule(norm, nn.Identity())
    return model


def compared(model: nn.Module, setting: str, calibration: Tensor, items: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Drops, shares of unchanged answers, and the paired difference of the two."""
    wanted, labels = answers(model, items), torch.cat([y for _, y in items])
    ours = bw.convert(calibrated(model, setting, "gptq, bias", calibration)[0])
    torch.manual_seed(0)
    versions = {"bitwright": answers(ours, items), "brevitas": answers(brevitas(model, setting, calibration), items)}
    return against(wanted, versions, labels)


def against(wanted: Tensor, found: dict[str, Tensor], labels: Tensor) -> dict[str, Any]:
    """Drops and shares of unchanged answers of two versions, and by how much the first is ahead."""
    right = [(answer == labels).float() for answer in found.values()]
    row: dict[str, Any] = {}
    for (name, answer), own in zip(found.items(), right, strict=True):
        drop = bw.paired_drop((wanted == labels).float(), own)
        same = (answer == wanted).float().mean().item()
        row[name] = {"drop": drop.drop, "low": drop.low, "high": drop.high, "same": same}
    gain = bw.paired_drop(*right)
    return row | {"ahead": {"drop": gain.drop, "low": gain.low, "high": gain.high}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS))
    parser.add_argument("--only", nargs="+", default=TABLE, choices=[name for name in SETTINGS if "," not in name])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x, _ = jpeg_cifar10("train", CALIBRATION)
    items = batches_of(*jpeg_cifar10("test"))
    path = FOLDER / "ptq_peer.json"
    for name in options.weights:
        model = CifarResNet(20)
        bw.load_weights(model, shared("cifar10_resnet") / WEIGHTS[name]).eval()
        for setting in options.only:
            results = json.loads(path.read_text()) if path.exists() else {}
            key = f"{name} {setting}"
            if key not in results:
                results[key] = compared(model, setting, x if name == "finetuned" else lossless(), items)
                write("ptq_peer", results)
            print(key, results[key], flush=True)


if __name__ == "__main__":
    main()
