"""Docs claim: ResNet20 with weights of 4.0 and 3.0 bits on average, allocated and calibrated by bitwright and by MCT.

Model Compression Toolkit: its integer program over {8, 6, 5, 4, 3, 2} bits, then its gradient-based calibration of 4
epochs, weights symmetric per channel, activations in 8 bits, per tensor, with zero points. bitwright: the exact
allocation over these and ``midrise`` by the harm of GPTQ's codes, then ``gptq``, ``ranges``, ``affine_repair``. Both
may give every layer any width; an average counts codes of all weights, 512 images calibrate, no labels. The published
weights, calibrated on lossless images, and those fine-tuned on JPEG images; 10,000 JPEG test images, read once per row.
Drops are paired with the float model, the last column with each other. Harm is kept in
results/mixed_peer_<weights>.json, rows in results/mixed_peer.json, and both are continued. MCT's layers for object
detection want torchvision; nothing here has any, so names stand in for them.

    pip install model-compression-toolkit
    python benchmarks/mixed_peer.py [--weights published] [--bits 4 3]
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.costs.cost import plan_bytes
from compressed_resnet20 import WEIGHTS as WIDTHS
from compressed_resnet20 import stored
from data import jpeg_cifar10, shared
from models import CifarResNet
from ptq_peer import against
from ptq_resnet20 import CALIBRATION, RECIPES, WEIGHTS, answers, lossless
from resnet20 import batches_of
from results import FOLDER, write

EPOCHS, STEPS = 4, RECIPES["gptq, ranges, repair"]
BITS = (8, 6, 5, 4, 3, 2)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def toolkit() -> Any:
    """MCT, with empty classes in place of layers that it only looks for."""
    layers: Any = ModuleType("edgemdt_cl.pytorch")
    for name in ("CustomLayer", "MulticlassNMS", "MulticlassNMSWithIndices", "MulticlassNMSOBB"):
        setattr(layers, name, type(name, (nn.Module,), {}))
    sys.modules.setdefault("edgemdt_cl.pytorch", layers)
    import model_compression_toolkit

    return model_compression_toolkit


def peer(model: nn.Module, bits: float, calibration: Tensor) -> nn.Module:
    """The model allocated and calibrated by MCT."""
    mct = toolkit()
    from mct_quantizers import QuantizationMethod
    from model_compression_toolkit.target_platform_capabilities.constants import KERNEL_ATTR, WEIGHTS_N_BITS
    from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import tpc

    base, _, default = tpc.get_op_quantization_configs()
    base, default = (
        config.clone_and_edit(activation_quantization_method=QuantizationMethod.UNIFORM) for config in (base, default)
    )
    widths = [base.clone_and_edit(attr_to_edit={KERNEL_ATTR: {WEIGHTS_N_BITS: n}}) for n in BITS]
    target = tpc.generate_tpc(default, base, widths, "cpu")

    def images() -> Iterator[list[Tensor]]:
        for batch in calibration.split(64):
            yield [batch]

    made, _ = mct.gptq.pytorch_gradient_post_training_quantization(
        copy.deepcopy(model),
        images,
        target_resource_utilization=mct.core.ResourceUtilization(
            weights_memory=sum(weight.numel() for weight in weights_of(model)) * bits / 8
        ),
        core_config=mct.core.CoreConfig(mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig()),
        gptq_config=mct.gptq.get_pytorch_gptq_config(n_epochs=EPOCHS),
        target_platform_capabilities=target,
    )
    return made.eval()


def ours(model: nn.Module, name: str, bits: float, calibration: Tensor) -> tuple[nn.Module, dict[str, Any]]:
    """The model allocated and calibrated by bitwright; its widths by layer and their average."""
    sites = {**{name: specs[0] for name, specs in WIDTHS.items()}, "linear.input": "uint8/asym"}
    plan = bw.Plan.preset("w8a8", model, calibration[:2], sites=sites, steps=STEPS)
    kept = FOLDER / f"mixed_peer_{name}.json"
    harm = bw.sensitivity(model, plan, list(calibration.split(64)), WIDTHS, work=kept)
    weights = [site for site in plan.sites if site.is_weight]
    count = sum(weight.numel() for weight in weights_of(model))
    narrowest = stored(model, plan, weights)
    limit = plan_bytes(model, plan) + int(count * (bits - 2) / 8)
    found = bw.mixture(model, plan, calibration[:1], harm).allocate(bw.Budget(bytes=limit))
    mixed = bw.with_allocation(plan, found, f"least harm at {bits} bits")
    torch.manual_seed(0)
    prepared = bw.prepare(model, mixed)
    bw.calibrate(prepared, calibration.split(64))
    average = 2 + 8 * (stored(model, mixed, weights) - narrowest) / count
    row = {"formats": found.sites, "average": average}
    return bw.convert(prepared), row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS))
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.0])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x, _ = jpeg_cifar10("train", CALIBRATION)
    items = batches_of(*jpeg_cifar10("test"))
    labels = torch.cat([y for _, y in items])
    path = FOLDER / "mixed_peer.json"
    for name in options.weights:
        model = CifarResNet(20)
        bw.load_weights(model, shared("cifar10_resnet") / WEIGHTS[name]).eval()
        calibration = x if name == "finetuned" else lossless()
        wanted = answers(model, items)
        for bits in options.bits:
            results = json.loads(path.read_text()) if path.exists() else {}
            key = f"{name}, {bits:g} bits"
            if key not in results:
                made, row = ours(model, name, bits, calibration)
                torch.manual_seed(0)
                versions = {"bitwright": made, "mct": peer(model, bits, calibration)}
                found = {who: answers(version, items) for who, version in versions.items()}
                results[key] = row | against(wanted, found, labels)
                write("mixed_peer", results)
            print(key, results[key], flush=True)


if __name__ == "__main__":
    main()
