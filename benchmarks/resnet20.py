"""README claim: ResNet20 keeps its answers at W8A8 without training; W4A4 QAT never ends below its start.

Calibration: 512 training images. Validation (chooses the kept QAT state): 2,000 other training images. Test: the 10,000
test images, read once at the end. Writes results/resnet20.json.

    python benchmarks/resnet20.py [--steps 400] [--train-images 20000]
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from data import jpeg_cifar10, shared
from models import CifarResNet
from results import write

CALIBRATION, VALIDATION = 512, 2000


def batches_of(x: Tensor, y: Tensor, size: int = 500) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def augmented(x: Tensor, y: Tensor, size: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Shuffled batches with random flips and shifts of up to 4 pixels, drawn once."""
    order = torch.randperm(len(x), generator=generator)
    out = []
    for index in order.split(size):
        if len(index) < size:
            continue
        batch = F.pad(x[index], (4, 4, 4, 4))
        dx, dy = torch.randint(0, 9, (2,), generator=generator).tolist()
        batch = batch[:, :, dy : dy + 32, dx : dx + 32]
        flip = torch.rand(size, generator=generator) < 0.5
        out.append((torch.where(flip.view(-1, 1, 1, 1), batch.flip(3), batch), y[index]))
    return out


def quantized(model: nn.Module, preset: str, calibration: Tensor) -> nn.Module:
    prepared = bw.prepare(model, bw.Plan.preset(preset, model, calibration[:2]))
    bw.calibrate(prepared, calibration.split(128))
    return prepared


def same_answers(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return torch.cat([a(part).argmax(1) == b(part).argmax(1) for part in x.split(500)]).float().mean().item()


def report(name: str, float_scores: Tensor, model: nn.Module, test: list[tuple[Tensor, Tensor]]) -> dict[str, object]:
    scores = bw.item_scores(model, test)
    drop = bw.paired_drop(float_scores, scores)
    print(f"{name:10s} top-1 {100 * scores.mean().item():6.2f} %   drop {drop}")
    return {"top1": scores.mean().item(), "drop": drop.drop, "low": drop.low, "high": drop.high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--train-images", type=int, default=20_000)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    float_model = CifarResNet(20)
    bw.load_weights(float_model, shared("cifar10_resnet") / "resnet20_jpeg_finetuned.pt").eval()
    x, y = jpeg_cifar10("train", CALIBRATION + VALIDATION + args.train_images)
    calibration, x, y = x[:CALIBRATION], x[CALIBRATION:], y[CALIBRATION:]
    validation = batches_of(x[:VALIDATION], y[:VALIDATION])
    x, y = x[VALIDATION:], y[VALIDATION:]
    test_x, test_y = jpeg_cifar10("test")
    test = batches_of(test_x, test_y)
    float_scores = bw.item_scores(float_model, test)
    results: dict[str, object] = {"float": float_scores.mean().item(), "items": len(test_x)}
    print(f"float      top-1 {100 * float_scores.mean().item():6.2f} %")

    w8a8 = bw.convert(quantized(float_model, "w8a8", calibration))
    results["w8a8 ptq"] = report("w8a8 ptq", float_scores, w8a8, test)
    results["w8a8 same answer"] = same_answers(float_model, w8a8, test_x)
    print(f"           same answer {100 * results['w8a8 same answer']:.2f} %")  # type: ignore[operator]

    model = quantized(float_model, "w4a4", calibration)
    results["w4a4 ptq"] = report("w4a4 ptq", float_scores, bw.convert(model), test)
    generator = torch.Generator().manual_seed(0)
    data = [batch for _ in range(-(-args.steps * 128 // len(x))) for batch in augmented(x, y, 128, generator)]
    start = time.perf_counter()
    history = bw.train(
        model,
        lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]),
        data,
        schedule=bw.Schedule(steps=args.steps, lr=0.1),
        score=lambda m: bw.item_scores(m, validation),
        on_step=lambda step, loss: print(f"\rstep {step + 1}/{args.steps} loss {loss:.3f}", end="", flush=True),
    )
    seconds = time.perf_counter() - start
    print(f"\rQAT: {seconds:.0f} s, validation scores {[f'{step}: {100 * s:.2f}' for step, s in history.scores]}")
    shipped = bw.convert(model)
    results["w4a4 qat"] = report("w4a4 qat", float_scores, shipped, test) | {
        "seconds": seconds,
        "steps": args.steps,
    }
    with torch.no_grad():
        results["trained == shipped"] = torch.equal(model.eval()(test_x[:500]), shipped(test_x[:500]))
    print(f"trained == shipped, bit for bit: {results['trained == shipped']}")
    write("resnet20", results)


if __name__ == "__main__":
    main()
