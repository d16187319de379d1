"""Speed of the GPU rows against torch float16, torchao and bitsandbytes, in alternating runs; needs a CUDA device.

Shapes of decoder layers (out, in), batches of 1, 16 and 512 rows. Every contender walks through copies of its weights
that together exceed twice the device's L2 cache, so that each call reads them from memory. A time is that of many
calls between two events, launches included. Per row: time, float16's time over its time (median and 10th to 90th
percentile over rounds), bytes of weights per second, error relative to the float32 product.
Writes results/gpu_kernels.json; libraries that are not installed, or refuse a shape, are named and left out.

    python benchmarks/gpu_kernels.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.errors import KernelError
from bitwright.kernels.device import device_features
from bitwright.kernels.row import Activation, Packed
from bitwright.kernels.table import select
from bitwright.numerics.affine import live_qparams
from bitwright.numerics.qtensor import quantize
from bitwright.numerics.spec import QuantSpec
from results import write

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
ROWS = (1, 16, 512)
INTEGERS = ("int8/channel", "int4/channel", "int2/channel", "ternary/channel", "int4/group128")
DECODED = ("int8/channel", "int4/group128", "int3/group128", "int2/group128", "nf4/group64", "fp8_e4m3/channel")
INPUTS = {"static": "uint8/asym", "dynamic": "int8/token/dynamic"}
CALLS = 50
Call = Callable[[Tensor], Tensor]


@dataclass
class Contender:
    """A product with copies of its weights, of ``bytes`` each; ``calls`` takes them in turn."""

    name: str
    bytes: int
    calls: Iterator[Call]
    seconds: list[float] = field(default_factory=list)

    def time(self, x: Tensor) -> float:
        """Seconds per call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            next(self.calls)(x)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / CALLS


def copies(name: str, size: int, make: Callable[[], Call], cold: int) -> Contender:
    """As many instances as fill ``cold`` bytes."""
    return Contender(name, size, itertools.cycle([make() for _ in range(1 + cold // size)]))


def ours(weight: Tensor, x: Tensor, cold: int) -> Iterator[Contender]:
    """Rows of the kernel table, as this device chooses them."""
    pairs = [(w, how, i) for w, (how, i) in itertools.product(INTEGERS, INPUTS.items())]
    for text, how, input in [*pairs, *((w, "float16", None) for w in DECODED)]:
        spec, encoding = QuantSpec.parse(text), None
        if input is not None:
            found = QuantSpec.parse(input)
            encoding = Activation(found, None if found.dynamic else live_qparams(x.float(), found))
        kernel = select("linear", spec, encoding and encoding.spec, tuple(weight.shape), device_features(x.device))
        packed = kernel.pack(quantize(weight, spec), 1)

        def make(kernel=kernel, packed=packed, spec=spec, encoding=encoding) -> Call:  # type: ignore[no-untyped-def]
            own = Packed(*(None if part is None else part.clone() for part in packed))  # type: ignore[arg-type]
            return lambda x: kernel.run(x, own, spec, None, encoding)

        size = sum(part.nbytes for part in packed if part is not None)
        yield copies(f"{spec} {how} ({kernel.name})", size, make, cold)


def layer_of(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False, device=weight.device, dtype=dtype)
    layer.weight.data.copy_(weight)
    return layer.requires_grad_(False)


def torchao(weight: Tensor, cold: int) -> Iterator[Contender]:
    """Weight-only int8 and int4, and dynamic int8."""
    api = importlib.import_module("torchao.quantization")
    count, half, wide = weight.numel(), torch.float16, torch.bfloat16
    for name, config, dtype, size in (
        ("int8 weight-only", api.Int8WeightOnlyConfig, half, count),
        ("int8 dynamic", api.Int8DynamicActivationInt8WeightConfig, half, count),
        ("int4/group128 weight-only, bfloat16", lambda: api.Int4WeightOnlyConfig(group_size=128), wide, count // 2),
    ):

        def make(config: Any = config, dtype: torch.dtype = dtype) -> Call:
            layer = layer_of(weight, dtype)
            api.quantize_(layer, config())
            return lambda x: layer(x.to(dtype))

        yield copies(f"torchao {name}", size, make, cold)


def bitsandbytes(weight: Tensor, cold: int) -> Iterator[Contender]:
    """NF4 and LLM.int8()."""
    library = importlib.import_module("bitsandbytes")
    n, k = weight.shape

    def nf4() -> Call:
        layer = library.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.float16, quant_type="nf4")
        layer.weight = library.nn.Params4bit(weight.half().cpu(), requires_grad=False, quant_type="nf4")
        return layer.to(weight.device)

    def int8() -> Call:
        layer = library.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
        layer.weight = library.nn.Int8Params(weight.half().cpu(), requires_grad=False, has_fp16_weights=False)
        return layer.to(weight.device)

    yield copies("bitsandbytes nf4", n * k // 2, nf4, cold)
    yield copies("bitsandbytes int8", n * k, int8, cold)


def contenders(weight: Tensor, x: Tensor, cold: int) -> list[Contender]:
    """Float16 first, then everything that is installed and runs here."""

    def half() -> Call:
        own = weight.half()
        return lambda x: F.linear(x, own)

    found = [copies("torch float16", 2 * weight.numel(), half, cold), *ours(weight, x, cold)]
    for theirs in (torchao, bitsandbytes):
        try:
            found += theirs(weight, cold)
        except Exception as error:  # whatever a library that is missing or too old raises
            print(f"  {theirs.__name__} left out: {type(error).__name__}: {error}")
    return found


def running(found: list[Contender], x: Tensor) -> list[Contender]:
    """Those that compute these rows, each called through all its copies once, which compiles and tunes it."""
    kept = []
    for each in found:
        each.seconds = []
        try:
            each.time(x)
            kept.append(each)
        except (RuntimeError, KernelError, ValueError) as error:
            print(f"  {each.name} left out: {error}")
    return kept


def summary(found: list[Contender], x: Tensor, exact: Tensor) -> dict[str, dict[str, float]]:
    """What is printed and written per contender."""
    rows = {}
    for each in found:
        speeds = sorted(a / b for a, b in zip(found[0].seconds, each.seconds, strict=True))
        seconds = statistics.median(each.seconds)
        rows[each.name] = {
            "ms": 1e3 * seconds, "speed": statistics.median(speeds), "speed 10 %": speeds[len(speeds) // 10],
            "speed 90 %": speeds[-1 - len(speeds) // 10], "GB/s": each.bytes / seconds / 1e9,
            "error": ((next(each.calls)(x).float() - exact).norm() / exact.norm()).item(),
        }  # fmt: skip
        r = rows[each.name]
        speed = f"x{r['speed']:6.2f} [{r['speed 10 %']:.2f}, {r['speed 90 %']:.2f}]"
        print(f"  {each.name:60s} {r['ms']:8.4f} ms  {speed:24s} {r['GB/s']:8.1f} GB/s  error {r['error']:.1e}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "this benchmark times GPU kernels: it needs a CUDA device and a torch built for it; found none"
        )
    torch.manual_seed(0)
    device = torch.device("cuda")
    machine = torch.cuda.get_device_properties(device)
    results: dict[str, object] = {"gpu": machine.name, "features": sorted(device_features(device))}
    for n, k in SHAPES:
        weight = torch.randn(n, k, device=device) / k**0.5
        widest = torch.randn(max(ROWS), k, device=device).half()
        with torch.inference_mode():
            found = contenders(weight, widest, 2 * machine.L2_cache_size)
            for m in ROWS:
                x = widest[:m]
                print(f"{n} x {k}, {m} rows")
                kept = running(found, x)
                for each in kept * options.rounds:
                    each.seconds.append(each.time(x))
                results[f"{n} x {k}, {m} rows"] = summary(kept, x, F.linear(x.float(), weight))
    write("gpu_kernels", results)


if __name__ == "__main__":
    main()
