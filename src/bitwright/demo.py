"""The whole line on real data that scikit-learn carries: handwritten digits, 1,797 images of 8x8 pixels.

A small residual CNN is trained for some seconds, then quantized in four ways. The data is cut into three parts that
never mix: training (also calibrates), validation (keeps the best QAT state, and judges mixed plans) and test
(read once per row, at the end).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.algorithms.pipeline import calibrate
from bitwright.bench.html import to_html
from bitwright.bench.measure import Measurement, measure
from bitwright.bench.report import Report, Row, bits_per_layer, to_markdown, to_table, write_text
from bitwright.claims.certify import certify
from bitwright.costs.cost import plan_bytes
from bitwright.errors import MissingExtraError
from bitwright.export.onnx import export
from bitwright.export.parity import parity
from bitwright.flow.checkpoint import save
from bitwright.flow.convert import convert
from bitwright.flow.evaluate import item_scores, paired_drop, top1
from bitwright.flow.prepare import prepare
from bitwright.harm.sensitivity import sensitivity
from bitwright.plan.plan import Plan
from bitwright.search.budget import Budget
from bitwright.search.mixed import choices_of, mixture
from bitwright.search.mixed_trials import mixed
from bitwright.train.loop import train
from bitwright.train.schedule import Schedule

Batches = list[tuple[Tensor, Tensor]]

FLOAT_EPOCHS, QAT_STEPS, LR = 24, 240, 0.2


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a residual add."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[n, inputs, h, w] -> [n, outputs, h / stride, w / stride]``."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class DigitNet(nn.Module):
    """A residual CNN for 8x8 digits: a stem, three blocks, a linear classifier."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.classifier = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 1, 8, 8] -> [n, 10]``."""
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.classifier(x.mean((2, 3)))


@dataclass(frozen=True, slots=True)
class Digits:
    """Disjoint splits; pixels are scaled to 0..1."""

    train: tuple[Tensor, Tensor]
    validation: Batches
    test: Batches


def load_digits(seed: int = 0) -> Digits:
    """The digits, shuffled: 900 for training, 297 for validation, 600 for the test."""
    try:
        from sklearn import datasets
    except ImportError as cause:
        raise MissingExtraError("scikit-learn", "demo", "the demo's data set") from cause
    data: Any = datasets.load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    x = (torch.from_numpy(data.images).float() / 16).unsqueeze(1)[order]
    y = torch.from_numpy(data.target).long()[order]
    return Digits((x[:900], y[:900]), [(x[900:1197], y[900:1197])], [(x[1197:], y[1197:])])


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of one (images, labels) batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def right(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """1.0 for every right answer of one (images, labels) batch."""
    return top1(model(batch[0]), batch[1])


def shifted_batches(x: Tensor, y: Tensor, epochs: int, seed: int, size: int = 50) -> Batches:
    """Shuffled batches, each shifted by up to one pixel in either direction."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(size):
            dx, dy = torch.randint(-1, 2, (2,), generator=generator).tolist()
            padded = F.pad(x[index], (1, 1, 1, 1))
            batches.append((padded[:, :, 1 + dy : 9 + dy, 1 + dx : 9 + dx], y[index]))
    return batches


def train_float(model: nn.Module, data: Digits, on_step: object) -> None:
    """Ordinary float training with SGD and a one-cycle rate."""
    batches = shifted_batches(*data.train, FLOAT_EPOCHS, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=len(batches))
    model.train()
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        loss(model, batch).backward()
        optimizer.step()
        schedule.step()
        on_step()  # type: ignore[operator]
    model.eval()


@dataclass
class _Version:
    name: str
    simulated: nn.Module | None
    shipped: nn.Module


def run_demo(folder: str | Path = "report", *, console: Console | None = None) -> Report:
    """Run the line, print the table, and write both reports, the ONNX files and the mixed model to ``folder``."""
    folder, console = Path(folder), console or Console()
    torch.manual_seed(0)
    data, model = load_digits(), DigitNet()
    with _progress(console) as progress:
        task = progress.add_task("float training", total=FLOAT_EPOCHS * 18)
        train_float(model, data, lambda: progress.advance(task))
        versions = _quantize(model, data, progress)
        report = _judge(model, versions, data, folder, progress)
    write_text(folder / "report.html", to_html(report))
    write_text(folder / "report.md", to_markdown(report))
    console.print(to_table(report))
    console.print(
        f"wrote {folder / 'report.html'}, {folder / 'report.md'}, and of the mixed model {folder / 'mixed'}, "
        f"{folder / 'mixed.onnx'} and {folder / 'certificate.html'}"
    )
    return report


def _quantize(model: nn.Module, data: Digits, progress: Progress) -> list[_Version]:
    x = data.train[0]
    versions = []
    for preset in ("w8a8", "w4a4"):
        task = progress.add_task(f"{preset} PTQ", total=1)
        prepared = prepare(model, Plan.preset(preset, model, x[:2]))
        calibrate(prepared, x[:512].split(128))
        versions.append(_Version(f"{preset} PTQ", prepared, convert(prepared)))
        progress.advance(task)
    task = progress.add_task("w4a4 QAT", total=QAT_STEPS)
    trained = prepare(model, Plan.preset("w4a4", model, x[:2]))
    calibrate(trained, x[:512].split(128))
    train(
        trained,
        loss,
        shifted_batches(*data.train, -(-QAT_STEPS // 18), seed=2),
        schedule=Schedule(steps=QAT_STEPS, lr=LR),
        score=lambda m: item_scores(m, data.validation),
        on_step=lambda step, value: progress.advance(task),
    )
    versions.append(_Version("w4a4 QAT", trained, convert(trained)))
    best = _mixed(model, x[:512].split(128), data.validation[0][0].split(99), progress)
    versions.append(_Version("mixed PTQ", best, convert(best)))
    return versions


def _mixed(model: nn.Module, batches: Sequence[Tensor], judge: Sequence[Tensor], progress: Progress) -> nn.Module:
    """The calibrated model within the bytes of W4A4 whose weights have 2 to 8 bits by layer, chosen without labels."""
    plan = Plan.preset("w4a4", model, batches[0][:2], steps=["gptq"])
    specs, task = choices_of(plan), progress.add_task("mixed PTQ", total=None)
    harm = sensitivity(
        model, plan, batches, specs, on_row=lambda row, done, total: progress.update(task, completed=done, total=total)
    )
    choices = mixture(model, plan, batches[0][:1], harm)
    return mixed(model, plan, batches, choices, Budget(bytes=plan_bytes(model, plan)), judge=judge).model


def _judge(model: nn.Module, versions: list[_Version], data: Digits, folder: Path, progress: Progress) -> Report:
    """One row per version, on the test split."""
    task = progress.add_task("measuring", total=len(versions) + 1)
    x = data.test[0][0]
    timings = _by_name(measure({"float": model, **{v.name: v.shipped for v in versions}}, x[:16]))
    progress.advance(task)
    base = item_scores(model, data.test)
    rows = [Row("float", base.mean().item(), bytes=timings["float"].bytes)]
    folder.mkdir(parents=True, exist_ok=True)
    for version in versions:
        scores = item_scores(version.shipped, data.test)
        onnx_path = (
            folder / f"{version.name.split()[0] if 'mixed' in version.name else version.name.replace(' ', '-')}.onnx"
        )
        export(version.shipped, onnx_path, x[:2])
        rows.append(
            Row(
                version.name,
                scores.mean().item(),
                paired_drop(base, scores),
                timings[version.name].bytes,
                timings[version.name].speed,
                _bit_for_bit(version, x),
                f"{100 * parity(version.shipped, onnx_path, x).argmax_agreement:.1f} %",
            )
        )
        progress.advance(task)
    save(versions[-1].shipped, folder / "mixed")
    _certify(model, versions[-1], data, folder)
    notes = [
        f"A residual CNN on scikit-learn's handwritten digits; {len(x)} test images that nothing was chosen on.",
        "trained = shipped: largest difference between the simulated and the converted model; exact means 0. "
        "same in ONNX Runtime: share of equal answers of the exported file.",
        "Speed: batch of 16, alternating runs, relative to float PyTorch (median, 10 % to 90 % of the rounds), "
        f"{torch.get_num_threads()} threads.",
    ]
    bits = {version.name: bits_per_layer(version.shipped) for version in versions}
    return Report("bitwright on handwritten digits", notes, rows, bits, percent=True)


def _certify(model: nn.Module, version: _Version, data: Digits, folder: Path) -> None:
    issued = certify(
        model, version.shipped, data.test, right, simulated=version.simulated, onnx=folder / "mixed.onnx",
        seen={"training and calibration": [data.train], "validation": data.validation},
    )  # fmt: skip
    issued.save(folder / "certificate.json")
    write_text(folder / "certificate.html", issued.to_html())


def _by_name(measured: list[Measurement]) -> dict[str, Measurement]:
    return {entry.name: entry for entry in measured}


def _bit_for_bit(version: _Version, x: Tensor) -> str:
    assert version.simulated is not None
    with torch.no_grad():
        difference = (version.simulated.eval()(x) - version.shipped(x)).abs().max().item()
    return "exact" if difference == 0 else f"differs by {difference:.2g}"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:20}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(),
        console=console,
    )  # fmt: skip
