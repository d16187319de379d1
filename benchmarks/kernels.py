"""README claim: speed of the linear kernels against other runtimes and the memory bandwidth, in alternating runs.

Shapes of decoder layers (out, in), batches of 1 to 512 rows. Every kernel walks through copies of its weights that
together exceed twice the last-level cache, so that each call reads them from memory. Per row: time, float32 time over
its time (median and 10th to 90th percentile over rounds), bytes of weights per second and, for few rows, the share of
what a plain sum over a buffer of the same size reads in the same round; error of the product, relative to float32's.
Before each time is taken threads of the one before have gone to sleep, and one call is not counted.
Peers (peers.py) that are not installed are named and left out. Versions of all are printed and stored.
Writes results/kernels.json after every number of rows, and keeps what it holds of other shapes; ``--tiny`` only shows
that everything runs.

    pip install onnxruntime onnx openvino
    CMAKE_ARGS=-DLLAVA_BUILD=OFF pip install llama-cpp-python  # builds for this CPU, ten minutes of one core
    python benchmarks/kernels.py [--rounds 15] [--threads 2] [--shapes 4096x4096] [--tiny]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bitwright.kernels.cpu import cpu_features
from bitwright.kernels.row import Activation, Packed
from bitwright.kernels.table import select
from bitwright.numerics.affine import live_qparams
from bitwright.numerics.qtensor import quantize
from bitwright.numerics.spec import QuantSpec
from peers import GROUPS, Contender, contender, missing, peers, timed, versions
from results import FOLDER, write

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
ROWS = (1, 8, 64, 512)
FORMATS = ("int8", "int4", "int3", "int2", "ternary")
INPUTS = {"static": "uint8/asym", "dynamic": "int8/token/dynamic", "float": None}
FEW = 8  # so many rows are limited by memory
PATIENCE = 1.0  # seconds; who needs longer for one call is left out
SETTLE = 0.02  # seconds in which threads that wait for work by spinning give up


def last_level_cache() -> int:
    """Bytes of the third-level cache; 64 MiB where the system does not say."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(path.read_text().strip().removesuffix("K")) << 10 if path.exists() else 64 << 20


def ours(weight: Tensor, x: Tensor, cold: int) -> Iterator[Contender]:
    """Rows of the kernel table: each format with each kind of input, per channel and per group."""
    kinds = ["channel", *(f"group{size}" for size in GROUPS if weight.shape[1] % size == 0)]
    for fmt, kind, (how, text) in itertools.product(FORMATS, kinds, INPUTS.items()):
        if how == "static" and kind != "channel":
            continue  # as fast as with a scale per row
        spec, input = QuantSpec.parse(f"{fmt}/{kind}"), None if text is None else QuantSpec.parse(text)
        kernel = select("linear", spec, input, tuple(weight.shape), cpu_features())
        qparams = None if input is None or input.dynamic else live_qparams(x, input)
        encoding = None if input is None else Activation(input, qparams)

        def call(x: Tensor, *parts: Tensor, kernel=kernel, spec=spec, encoding=encoding) -> Tensor:  # type: ignore[no-untyped-def]
            return kernel.run(x, Packed(*parts), spec, None, encoding)

        yield contender(f"{spec} {how}", tuple(kernel.pack(quantize(weight, spec), 1)), call, cold)


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
        time.sleep(SETTLE)
        each.time(x, 0.0)
        each.seconds.append(each.time(x, least))
        if len(x) <= FEW:
            time.sleep(SETTLE)
            read(each.bytes // 4)
            each.reading.append(timed(lambda count=each.bytes // 4: read(count), least))


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
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], help="outputs x inputs")
    parser.add_argument("--tiny", action="store_true", help="small shapes, one round, writes nothing")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*", category=UserWarning, module="torch")
    shapes = [tuple(int(part) for part in shape.split("x")) for shape in options.shapes]
    rounds, least, cold = options.rounds, 0.02, 2 * last_level_cache()
    if options.tiny:
        shapes, rounds, least, cold = [(64, 256), (96, 512)], 1, 0.0, 1 << 16
    path = FOLDER / "kernels.json"
    stored: dict[str, object] = json.loads(path.read_text()) if path.exists() else {}
    results = stored | {"versions": versions()}
    print(*(f"{name} {version}" for name, version in versions().items()), sep=", ")
    for package in missing():
        print(f"left out: {package} is not installed")
    for n, k in shapes:
        weight, widest = torch.randn(n, k) / k**0.5, torch.randn(max(ROWS), k)
        with torch.inference_mode():
            found = [*peers(weight, widest, ROWS, cold, options.threads), *ours(weight, widest, cold)]
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
