"""README claim: a character LSTM keeps its bits per character at W8A8, and QAT wins back what W4A8 loses.

Two published 2-layer LSTMs of 128 units, on their texts. The last tenth of a text is the test, the tenth before it
chooses the kept QAT state, the rest calibrates and trains. (The publisher trained on all of it, so the float figure is
one of training data; what is measured is how far the quantized models are from it on text that quantization never
saw.) State is carried through the whole test. Writes results/char_lstm.json.

    OMP_NUM_THREADS=1 python benchmarks/char_lstm.py [--steps 300] [--characters 100000]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from bitwright.nn.recurrent import QRecurrent
from bitwright.numerics.affine import encode
from data import shared
from results import write

MODELS = ("shakespeare", "charlotte_bronte")
WINDOW, WARM = 96, 32  # characters per training window; the first ones only bring the state up
STREAMS, CHUNK = 50, 200  # parallel streams of a test, and characters per call


class CharLSTM(nn.Module):
    """Characters ``[n, t]`` to logits ``[n, t, characters]``, with the names of the published checkpoints."""

    def __init__(self, characters: int, hidden: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(characters, hidden)
        self.lstm = nn.LSTM(hidden, hidden, 2, batch_first=True)
        self.head = nn.Linear(hidden, characters)

    def forward(self, ids: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, final = self.lstm(self.emb(ids), state)
        return self.head(out), final


@dataclass(frozen=True)
class Text:
    """Character numbers of the parts of a text."""

    train: Tensor
    validation: Tensor
    test: Tensor


def published(name: str, folder: Path) -> tuple[CharLSTM, Text]:
    """A published model and its text."""
    stored = torch.load(folder / f"charlstm_{name}.pt", weights_only=True)
    model = CharLSTM(stored["V"], stored["H"])
    model.load_state_dict(stored["state_dict"])
    text = (folder / f"{name}.txt").read_text(encoding="utf-8")
    ids = torch.tensor([stored["vocab"][c] for c in text if c in stored["vocab"]])
    tenth = len(ids) // 10
    return model.eval(), Text(ids[: -2 * tenth], ids[-2 * tenth : -tenth], ids[-tenth:])


def windows(ids: Tensor, count: int, size: int, seed: int) -> list[Tensor]:
    """``count`` batches of ``size`` windows at random places."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - WINDOW, (count, size), generator=generator)
    return [torch.stack([ids[s : s + WINDOW] for s in row.tolist()]) for row in starts]


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids[:, :-1])[0][:, WARM:]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, WARM + 1 :].flatten())


@torch.no_grad()
def bits_per_character(model: nn.Module, ids: Tensor, characters: int) -> float:
    """Cross entropy in bits over the first ``characters`` of a text, read in parallel streams with their states."""
    model.eval()
    length = min(characters, len(ids)) // STREAMS
    streams, state, total = ids[: length * STREAMS].view(STREAMS, length), None, 0.0
    for start in range(0, length - 1, CHUNK):
        part = streams[:, start : start + CHUNK + 1]
        logits, state = model(part[:, :-1], state)
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / (STREAMS * (length - 1)) / math.log(2)


@torch.no_grad()
def contracts(simulated: nn.Module, shipped: nn.Module, ids: Tensor) -> dict[str, object]:
    """C1: stored codes are those of training. C2: outputs and states agree bit for bit. And what each weight became."""
    checked, equal = 0, True
    for path, layer in simulated.named_modules():
        if isinstance(layer, QRecurrent):
            for slot, weight in layer.quantized_weights().items():
                quantizer, part = layer.quantizer(slot), shipped.get_submodule(f"{path}.{slot}")
                assert quantizer is not None
                codes = encode(weight, quantizer.spec, quantizer.qparams)  # type: ignore[arg-type]
                equal &= torch.equal(part.weight.codes.float(), codes)  # type: ignore[union-attr, attr-defined]
                checked += 1
    streams, same, states = ids[: 8 * 2 * CHUNK].view(8, -1), True, (None, None)
    for part in streams.split(CHUNK, 1):
        left, right = simulated.eval()(part, states[0]), shipped(part, states[1])
        states = left[1], right[1]
        same &= all(torch.equal(a, b) for a, b in zip((left[0], *left[1]), (right[0], *right[1]), strict=True))
    rows = [row for row in bw.coverage(shipped) if row.path.startswith("lstm.weight")]
    return {
        "codes of training == stored codes": equal and checked == len(rows),
        "trained == shipped": same,
        "recurrent weights": len(rows),
        "recurrent weights held as codes": sum(row.format.startswith("int") for row in rows),
        "recurrent bytes per weight": sum(row.bytes for row in rows) / sum(row.elements for row in rows),
        "bytes": sum(row.bytes for row in bw.coverage(shipped)),
    }


def measured(model: CharLSTM, preset: str, text: Text, args: argparse.Namespace) -> dict[str, object]:
    """Bits per character before and after QAT of one preset."""
    calibration = windows(text.train, 4, 16, seed=1)
    simulated = bw.prepare(model, bw.Plan.preset(preset, model, calibration[0]))
    bw.calibrate(simulated, calibration)
    found: dict[str, object] = {"ptq": bits_per_character(bw.convert(simulated), text.test, args.characters)}
    start = time.perf_counter()
    schedule = bw.Schedule(steps=args.steps, lr=args.lr)
    bw.train(
        simulated,
        loss,
        windows(text.train, args.steps, args.batch, seed=2),
        schedule=schedule,
        optimizer=schedule.optimizer(simulated, weight_decay=0.0),
        score=lambda m: -bits_per_character(m, text.validation, args.characters // 4),
        score_every=max(1, args.steps // 4),
    )
    found["seconds"] = time.perf_counter() - start
    shipped = bw.convert(simulated)
    found["qat"] = bits_per_character(shipped, text.test, args.characters)
    return found | contracts(simulated, shipped, text.test)


def run(argv: list[str], folder: Path) -> dict[str, object]:
    """All figures, printed as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5.0)
    parser.add_argument("--characters", type=int, default=100_000)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    args = parser.parse_args(argv)
    results: dict[str, object] = {"steps": args.steps, "batch": args.batch, "lr": args.lr}
    for name in args.models:
        torch.manual_seed(0)
        model, text = published(name, folder)
        plain = bits_per_character(model, text.test, args.characters)
        results[name] = found = {"float": plain, "characters": min(args.characters, len(text.test))}
        print(f"{name}: float {plain:.4f} bits per character")
        for preset in ("w8a8", "w4a8"):
            found[preset] = row = measured(model, preset, text, args)
            print(f"{name}: {preset} " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return results


if __name__ == "__main__":
    write("char_lstm", run(sys.argv[1:], shared("lm_char_lstm")))
