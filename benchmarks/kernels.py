"""README claim: speed of the linear kernels against torch and against the memory bandwidth, in alternating runs.

Shapes of decoder layers (out, in), batches of 1 to 512 rows. Every kernel walks through copies of its weights that
together exceed twice the last-level cache, so that each call reads them from memory. Per row: time, float32 time over
its time (median and 10th to 90th percentile over rounds), bytes of weights per second and, for few rows, the share of
what a plain sum over a buffer of the same size reads in the same round; error of the product, relative to float32's.
Writes results/kernels.json after every shape; ``--tiny`` only shows that everything runs.

    python benchmarks/kernels.py [--rounds 15] [--threads 2] [--tiny]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.kernels.cpu import cpu_features
from bitwright.kernels.row import Activation, Packed
from bitwright.kernels.table import select
from bitwright.numerics.affine import live_qparams
from bitwright.numerics.qtensor import quantize
from bitwright.numerics.spec import QuantSpec
from results import write

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
ROWS = (1, 8, 64, 512)
FORMATS = ("int8", "int4", "int3", "int2", "ternary")
INPUTS = {"static": "uint8/asym", "dynamic": "int8/token/dynamic", "float": None}
GROUPS = (32, 128)
FEW = 8  # so many rows are limited by memory
PATIENCE = 3.0  # seconds; who needs longer for one call is left out
Call = Callable[[Tensor], Tensor]


@dataclass
class Contender:
    """A product with copies of its weights; ``calls`` takes them in turn."""

    name: str
    bytes: int
    calls: Iterator[Call]
    seconds: list[float] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)  # of a sum over as many bytes

    def time(self, x: Tensor, least: float) -> float:
        """Seconds per call, of as many calls as take ``least`` seconds."""
        return _timed(lambda: next(self.calls)(x), least)


def _timed(call: Callable[[], object], least: float) -> float:
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < least or not count:
        call()
        count += 1
    return spent / count


def last_level_cache() -> int:
    """Bytes of the third-level cache; 64 MiB where the system does not say."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(path.read_text().strip().removesuffix("K")) << 10 if path.exists() else 64 << 20


def contender(name: str, parts: tuple[Tensor | None, ...], call: Callable[..., Tensor], cold: int) -> Contender:
    """``call(x, *parts)`` with copies of ``parts`` that fill ``cold`` bytes."""
    size = sum(part.nbytes for part in parts if part is not None)
    copies = [[None if part is None else part.clone() for part in parts] for _ in range(1 + cold // size)]
    bound = [lambda x, own=own: call(x, *own) for own in copies]
    return Contender(name, size, itertools.cycle(bound))


def ours(weight: Tensor, x: Tensor, cold: int) -> Iterator[Contender]:
    """Rows of the kernel table: each format with each kind of input, per channel and per group."""
    kinds = ["channel", *(f"group{size}" for size in GROUPS if weight.shape[1] % size == 0)]
    for fmt, kind, (how, text) in itertools.product(FORMATS, kinds, INPUTS.items()):
        spec, input = QuantSpec.parse(f"{fmt}/{kind}"), None if text is None else QuantSpec.parse(text)
        kernel = select("linear", spec, input, tuple(weight.shape), cpu_features())
        qparams = None if input is None or input.dynamic else live_qparams(x, input)
        encoding = None if input is None else Activation(input, qparams)

        def call(x: Tensor, *parts: Tensor, kernel=kernel, spec=spec, encoding=encoding) -> Tensor:  # type: ignore[no-untyped-def]
            return kernel.run(x, Packed(*parts), spec, None, encoding)

        yield contender(f"{spec} {how}", tuple(kernel.pack(quantize(weight, spec), 1)), call, cold)


def theirs(weight: Tensor, cold: int) -> Iterator[Contender]:
    """Torch's own: float32, dynamic int8, and its two weight-only kernels."""
    yield contender("torch float32", (weight,), F.linear, cold)
    size = weight.numel()
    layers = []
    for _ in range(1 + cold // size):
        layer = nn.Linear(*reversed(weight.shape), bias=False)
        layer.weight = nn.Parameter(weight.clone())
        layers.append(torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), dtype=torch.qint8))
    yield Contender("torch dynamic int8", size, itertools.cycle(layers))
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    yield contender("torch int8 weight-only", (codes, scale), torch.ops.aten._weight_int8pack_mm, cold)
    for group in (size for size in GROUPS if weight.shape[1] % size == 0):
        blocks = weight.unflatten(1, (-1, group))
        step = blocks.abs().amax(2) / 7
        codes = ((blocks / step[..., None]).round() + 8).to(torch.int32).flatten(1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.stack([step, torch.zeros_like(step)], -1).transpose(0, 1).bfloat16().contiguous()

        def call(x: Tensor, packed: Tensor, scales: Tensor, group: int = group) -> Tensor:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, group, scales)

        yield contender(f"torch int4/group{group} weight-only, bfloat16", (packed, scales), call, cold)


def patient(found: list[Contender], x: Tensor) -> list[Contender]:
    """Those that answer in time, after a first call each; who does not is named."""
    kept = []
    for each in found:
        each.seconds, each.reading = [], []
        seconds = each.time(x, 0.0)
        if seconds <= PATIENCE:
            kept.append(each)
        else:
            print(f"  {each.name}: left out, one call took {seconds:.1f} s")
    return kept


def measure(found: list[Contender], x: Tensor, rounds: int, least: float, cold: int) -> None:
    """Every contender once per round, in turn; for few rows each with a sum over as many bytes right behind it."""
    buffer = torch.ones((cold + max(c.bytes for c in found)) // 4)
    at = 0

    def read(count: int) -> None:
        nonlocal at
        at = at + count if at + 2 * count <= len(buffer) else 0
        buffer[at : at + count].sum()

    for each in found * rounds:
        each.seconds.append(each.time(x, least))
        if len(x) <= FEW:
            each.reading.append(_timed(lambda count=each.bytes // 4: read(count), least))


def summary(found: list[Contender], x: Tensor, exact: Tensor) -> dict[str, dict[str, float]]:
    """What is printed and written per contender."""
    first, rows = found[0].seconds, {}
    for each in found:
        speeds = sorted(a / b for a, b in zip(first, each.seconds, strict=True))
        seconds = statistics.median(each.seconds)
        error = (next(each.calls)(x).float() - exact).norm() / exact.norm()
        rows[each.name] = {
            "ms": 1e3 * seconds, "speed": statistics.median(speeds), "speed 10 %": speeds[len(speeds) // 10],
            "speed 90 %": speeds[-1 - len(speeds) // 10], "GB/s": each.bytes / seconds / 1e9, "error": error.item(),
        }  # fmt: skip
        if len(x) <= FEW:
            shares = [a / b for a, b in zip(each.reading, each.seconds, strict=True)]
            rows[each.name]["share of bandwidth"] = statistics.median(shares)
    return rows


def show(rows: dict[str, dict[str, float]]) -> None:
    for name, r in rows.items():
        share = f"{r['share of bandwidth']:5.0%} of reading" if "share of bandwidth" in r else ""
        speed = f"x{r['speed']:6.2f} [{r['speed 10 %']:.2f}, {r['speed 90 %']:.2f}]"
        print(f"  {name:42s} {r['ms']:9.3f} ms  {speed:24s} {r['GB/s']:7.2f} GB/s {share:18s} error {r['error']:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="small shapes, one round, writes nothing")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*", category=UserWarning, module="torch")
    shapes, rounds, least, cold = SHAPES, options.rounds, 0.02, 2 * last_level_cache()
    if options.tiny:
        shapes, rounds, least, cold = ((64, 256), (96, 384)), 1, 0.0, 1 << 16
    results: dict[str, object] = {}
    for n, k in shapes:
        weight, widest = torch.randn(n, k) / k**0.5, torch.randn(max(ROWS), k)
        with torch.inference_mode():
            found = [*theirs(weight, cold), *ours(weight, widest, cold)]
            for m in ROWS:
                x = widest[:m]
                print(f"{n} x {k}, {m} rows")
                in_time = patient(found, x)
                measure(in_time, x, rounds, least, cold)
                rows = summary(in_time, x, F.linear(x, weight))
                show(rows)
                results[f"{n} x {k}, {m} rows"] = rows
                if not options.tiny:
                    write("kernels", results)


if __name__ == "__main__":
    main()
