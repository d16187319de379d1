"""README claim: a Llama of 1.1 billion parameters, tokens per second against llama.cpp, in alternating runs.

TinyLlama's shape with random weights: this times shapes, not accuracy. All layers have the same weights, each in
memory of its own, so that one is converted. Ours is plain PyTorch with a cache (decoder.py; single tokens go through
layers that torch compiles), quantized by the public functions: weights as named, activations of linear layers in 8
bits with a scale per token. llama.cpp gets the same weights in a file of float16, rounded by its own function, all
matrices in the type named. Output layer and embedding have 8 bits on both sides. Decoding: the median of 32 single
tokens behind a prompt of 32; prefill: 512 tokens at once. Rates are medians over rounds; ratios are taken within
rounds (median, 10 % and 90 % quantiles). Bytes are what a token reads, in the kernels' own layout: all weights but the
embedding. Errors are those of the logits behind the prompt, relative to the float model's.
Writes results/llama.json; ``--tiny`` only shows that everything runs. Needs 14 GB, and 5 GB in the temporary folder.

    pip install gguf
    CMAKE_ARGS=-DLLAVA_BUILD=OFF pip install llama-cpp-python  # builds for this CPU, ten minutes of one core
    python benchmarks/llama.py [--rounds 5] [--threads 2] [--only int4 Q4] [--tiny]
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bitwright as bw
from decoder import DECODED, PREFILL, PROMPT, Shape, Weights, model_of, random_weights, repeat, start
from peers import missing, versions
from results import write

OURS = {
    "int8/channel": "Q8_0", "int8/group32": "Q8_0", "int4/channel": "Q4_0", "int4/group32": "Q4_0",
    "int3/group32": "Q3_K", "int2/group32": "Q2_K", "ternary/channel": "TQ2_0", "ternary/group32": "TQ2_0",
}  # fmt: skip
"""Formats of weights, each with llama.cpp's of as many bits."""
THEIRS = {"F16": 1, "Q8_0": 7, "Q4_0": 2, "Q4_K": 14, "Q3_K": 11, "Q2_K": 10, "TQ2_0": 37}
"""Names of types by their ``llama_ftype``."""
Q8_0 = 8


def shipped(weights: Weights, shape: Shape, fmt: str) -> nn.Module:
    """Our low-bit model: blocks in the format, output layer and embedding in 8 bits per channel."""
    model, example = model_of(weights, shape), (torch.arange(4), *start(shape))
    sites = {"blocks.*.weight": fmt, "head.weight": "int8/channel", "head.input": "int8/token/dynamic"}
    ranges = {"*.weight": "minmax"}
    plan = bw.Plan.preset("w8a8-dynamic", model, example, target="cpu", sites=sites, observers=ranges)
    prepared = bw.prepare(model, plan, inplace=True)
    bw.calibrate(prepared)
    return repeat(bw.convert(prepared, inplace=True), shape)


@dataclass
class Contender:
    """``feed(ids, at)`` runs tokens from a position on and returns the last logits."""

    name: str
    bytes: int
    feed: Callable[[list[int], int], Tensor]
    decode: list[float] = field(default_factory=list)  # seconds per token, one entry per round
    prefill: list[float] = field(default_factory=list)
    error: float = 0.0

    def round(self, ids: list[int]) -> None:
        self.feed(ids[:PROMPT], 0)
        tokens = range(PROMPT, PROMPT + DECODED)
        self.decode.append(statistics.median(self.seconds(ids[at : at + 1], at) for at in tokens))
        self.prefill.append(self.seconds(ids[:PREFILL], 0) / PREFILL)

    def seconds(self, ids: list[int], at: int) -> float:
        start = time.perf_counter()
        self.feed(ids, at)
        return time.perf_counter() - start


def torch_contender(name: str, model: nn.Module, shape: Shape) -> Contender:
    turns, cache, _ = start(shape)
    parts = [*model.named_parameters(), *(pair for pair in model.named_buffers() if "kernel_" in pair[0])]
    size = sum(part.nbytes for key, part in parts if not key.startswith("embed"))
    return Contender(name, size, lambda ids, at: model(torch.tensor(ids), turns, cache, at))


def gguf_file(weights: Weights, shape: Shape, path: Path) -> None:
    """The model as llama.cpp reads it, matrices in float16; fused products come apart."""
    import gguf

    writer, s = gguf.GGUFWriter(path, "llama"), shape
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(s.words)
    writer.add_context_length(2048)
    writer.add_embedding_length(s.width)
    writer.add_block_count(s.layers)
    writer.add_feed_forward_length(s.hidden)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_rope_dimension_count(s.size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, tensor in named_for_gguf(weights, s):
        writer.add_tensor(f"{name}.weight", (tensor.half() if tensor.dim() == 2 else tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def named_for_gguf(weights: Weights, s: Shape) -> Iterator[tuple[str, Tensor]]:
    parts = {"qkv": ("attn_q", "attn_k", "attn_v"), "gate_up": ("ffn_gate", "ffn_up"), "out": ("attn_output",)}
    parts |= {"down": ("ffn_down",), "norm1": ("attn_norm",), "norm2": ("ffn_norm",)}
    rows = {"qkv": [s.width, s.kv_heads * s.size, s.kv_heads * s.size], "gate_up": [s.hidden, s.hidden]}
    for name, tensor in weights.items():
        if name.startswith("blocks"):
            kind = name.split(".")[2]
            pieces = tensor.split(rows.get(kind, len(tensor)))
            for i in range(s.layers):
                yield from ((f"blk.{i}.{part}", piece) for part, piece in zip(parts[kind], pieces, strict=True))
        else:
            known = {"embed.weight": "token_embd", "norm.weight": "output_norm", "head.weight": "output"}
            yield known[name], tensor


def llama_contender(name: str, source: Path, shape: Shape, threads: int) -> Contender:
    """llama.cpp on its own rounding of the file."""
    import llama_cpp as lib

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    path = source if name == "F16" else source.with_name(f"{name}.gguf")
    if path != source:
        settings = lib.llama_model_quantize_default_params()
        settings.ftype, settings.nthread, settings.pure = THEIRS[name], threads, True
        settings.output_tensor_type = settings.token_embedding_type = Q8_0
        if lib.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(settings)):
            raise SystemExit(f"llama.cpp did not quantize to {name}")
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 1024, PREFILL, PREFILL
    settings.n_threads = settings.n_threads_batch = threads
    context = lib.llama_init_from_model(model, settings)
    memory = lib.llama_get_memory(context)

    def feed(ids: list[int], at: int) -> Tensor:
        if not at:
            lib.llama_memory_clear(memory, False)
        tokens = (lib.llama_token * len(ids))(*ids)
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit(f"llama.cpp did not decode with {name}")
        logits = lib.llama_get_logits_ith(context, -1)  # waits until they are there
        return torch.frombuffer(
            ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * shape.words)).contents, dtype=torch.float32
        )

    embedding = shape.words * shape.width * 2 if name == "F16" else shape.words * shape.width // 32 * 34
    return Contender(f"llama.cpp {name}", lib.llama_model_size(model) - embedding, feed)


def contenders(
    weights: Weights, shape: Shape, chosen: Sequence[str], folder: Path, threads: int
) -> Iterator[Contender]:
    """The float model first, then of ours and llama.cpp's those whose name holds one of ``chosen``."""
    yield torch_contender("torch float32", repeat(model_of(weights, shape), shape), shape)
    for fmt in (fmt for fmt in OURS if any(part in fmt for part in chosen)):
        yield torch_contender(fmt, shipped(weights, shape, fmt), shape)
    if "llama-cpp-python" in missing():
        print("left out: llama-cpp-python is not installed")
        return
    gguf_file(weights, shape, source := folder / "F16.gguf")
    for name in (name for name in THEIRS if any(part in name for part in chosen)):
        yield llama_contender(name, source, shape, threads)


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times faster, by rounds."""
    speeds = torch.tensor(slow, dtype=torch.float64) / torch.tensor(fast, dtype=torch.float64)
    low, median, high = speeds.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return {"speed": median, "speed 10 %": low, "speed 90 %": high}


def summary(found: list[Contender]) -> dict[str, Any]:
    """Per contender its rates and their ratios to the float model; and of ours to llama.cpp's of as many bits."""
    by_name = {each.name: each for each in found}
    results: dict[str, Any] = {}
    for kind in ("decode", "prefill"):
        base: list[float] = getattr(found[0], kind)
        rows, pairs = {}, {}
        for each in found:
            seconds: list[float] = getattr(each, kind)
            rate = {"tokens/s": 1 / statistics.median(seconds), "bytes": each.bytes, "error": each.error}
            rows[each.name] = rate | ratio(base, seconds)
            other = by_name.get(f"llama.cpp {OURS.get(each.name)}")
            if other:
                pairs[f"{each.name} over {other.name}"] = ratio(getattr(other, kind), seconds)
        results |= {kind: rows, f"{kind}, ours over theirs": pairs}
    return results


def show(results: dict[str, Any]) -> None:
    for kind, rows in results.items():
        for name, r in rows.items():
            rate = (
                f"{r['tokens/s']:8.2f} tokens/s {r['bytes'] / 1e6:8.1f} MB, error {r['error']:.1e}"
                if "bytes" in r
                else ""
            )
            print(
                f"{kind} {name:38s} x{r['speed']:6.2f} [{r['speed 10 %']:.2f}, {r['speed 90 %']:.2f}] {rate}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names of formats")
    parser.add_argument("--tiny", action="store_true", help="a small model, one round, writes nothing")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    shape, rounds = Shape(), options.rounds
    if options.tiny:
        shape, rounds = Shape(layers=2, width=256, hidden=512, heads=4, kv_heads=2, words=512), 1
    weights, ids = random_weights(shape), torch.randint(shape.words, (PREFILL,)).tolist()
    print(*(f"{name} {version}" for name, version in versions().items()), sep=", ")
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        found, exact = [], torch.zeros(0)
        for each in contenders(weights, shape, options.only, Path(folder), options.threads):
            logits = each.feed(ids[:PROMPT], 0).clone()
            exact = logits if not found else exact
            each.error = ((logits - exact).norm() / exact.norm()).item()
            for at in range(PROMPT, PROMPT + 4):  # compiles
                each.feed(ids[at : at + 1], at)
            found.append(each)
            print(f"{each.name}: ready, {each.bytes / 1e6:.1f} MB, error {each.error:.1e}", flush=True)
        for _ in range(rounds):
            for each in found:
                each.round(ids)
            results = summary(found)
            show(results)
            if not options.tiny:
                write("llama", {"versions": versions(), **results})


if __name__ == "__main__":
    main()
