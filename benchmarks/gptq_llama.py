"""What GPTQ takes on decoder layers of a Llama of a billion parameters: seconds and memory.

Decoder layers of TinyLlama's shape (width 2048, feed-forward 5632, 32 heads, 4 of keys and values; 44 M weights, 176 MB
in float32) with random weights and a small vocabulary; int4 weights in groups of 128, scales from the extremes; 16
sequences of 256 random tokens, one per batch. Memory is resident memory beyond what the prepared model and the tokens
hold before calibration, in multiples of one layer's float32 weights: the most at any time, and the most that waits
where a linear layer begins (activations of all sequences in the float and the quantized model).

Activations are allocated and freed in a thread per sequence, and glibc gives such memory back late: three times as
much waits resident with its defaults. So the script starts itself with MALLOC_MMAP_THRESHOLD_=500000, which anyone can
set. Writes results/gptq_llama.json. Needs 5 GB.

    python benchmarks/gptq_llama.py [--layers 2] [--threads 2] [--steps gptq]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

import bitwright as bw
from bitwright.algorithms.pipeline import outcomes
from results import write
from stories import Logits

SEQUENCES, LENGTH, WORDS = 16, 256, 512


def decoder(layers: int) -> tuple[nn.Module, int]:
    """The model, and the bytes of one decoder layer's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=WORDS,
    )
    model = LlamaForCausalLM(config)
    return Logits(model.eval()), sum(4 * p.numel() for p in model.model.layers[0].parameters())


def memory(name: str) -> int:
    """Bytes of this process's resident memory now (``VmRSS``) or at most since `forget_peak` (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", nargs="*", default=["gptq"])
    options = parser.parse_args()
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") != "500000":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": "500000"})
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model, block = decoder(options.layers)
    batches = list(torch.randint(WORDS, (SEQUENCES, 1, LENGTH)))
    sites = {"*embed*.weight": "float", "*lm_head.*": "float", "*layers*.weight": "int4/group128"}
    ranges = {"*.weight": "minmax"}
    plan = bw.Plan.preset("w4a16", model, batches[0], sites=sites, steps=options.steps, observers=ranges)
    model = bw.prepare(model, plan)
    before, waiting, reached = memory("VmRSS"), 0, dict[str, float]()
    forget_peak()

    def on_layer(path: str, done: int, total: int) -> None:
        nonlocal waiting
        waiting = max(waiting, memory("VmRSS") - before)
        reached[path] = time.perf_counter()

    start = time.perf_counter()
    bw.calibrate(model, batches, on_layer=on_layer)
    end = time.perf_counter()
    peak = memory("VmHWM") - before
    print(peak / block)
    first = min(reached.values())
    results: dict[str, object] = {
        "seconds per decoder layer": (end - first) / options.layers,
        "seconds for ranges": first - start,
        "peak": peak / block,
        "waiting": waiting / block,
        "changed": sum(not outcome.skipped for outcome in outcomes(model)),
    }
    for name, value in results.items():
        print(f"{name}: {value:.2f}")
    write("gptq_llama", {"decoder layers": options.layers, "bytes of a layer": block, **results})


if __name__ == "__main__":
    main()
