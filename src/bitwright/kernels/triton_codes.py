"""What the Triton kernels share: codes unpacked in registers, the block shapes tried, and whether Triton interprets.

Imported where a kernel is launched and nowhere else: this file and its two users need Triton.
"""
# What runs in a kernel is typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# rows and outputs of a block, warps, stages of the pipeline
_SHAPES = ((16, 32, 4, 4), (16, 64, 4, 4), (32, 64, 4, 4), (64, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 3))


@triton.jit
def _slice(rows, k, mask, bits: tl.constexpr, taken: tl.constexpr, width: tl.constexpr):
    byte = tl.load(rows + (k // 32 * (4 * bits) + 4 * taken + k % (4 * width)), mask=mask, other=0).to(tl.int32)
    shift = k % 32 // (4 * width) * width
    return ((byte >> shift) & ((1 << width) - 1)) << taken


@triton.jit
def _digit(rows, k, mask):
    byte = tl.load(rows + (k // 40 * 8 + k % 8), mask=mask, other=0).to(tl.int32)
    plane = k % 40 // 8
    # ceil(2**16 / 3**plane): the product's upper bits are the quotient for every byte
    late = tl.where(plane == 2, 7282, tl.where(plane == 3, 2428, 810))
    factor = tl.where(plane == 0, 65536, tl.where(plane == 1, 21846, late))
    return ((byte * factor) >> 16) % 3


@triton.jit
def unpack(rows, k, mask, bits: tl.constexpr):
    """Codes from 0, int32, of the inputs ``k`` in the rows that start at ``rows``; see `triton_layout`."""
    if bits == 0:
        code = _digit(rows, k, mask)
    elif bits == 3:
        code = _slice(rows, k, mask, bits, 0, 2) | _slice(rows, k, mask, bits, 2, 1)
    elif bits == 5:
        code = _slice(rows, k, mask, bits, 0, 4) | _slice(rows, k, mask, bits, 4, 1)
    elif bits == 6:
        code = _slice(rows, k, mask, bits, 0, 4) | _slice(rows, k, mask, bits, 4, 2)
    elif bits == 7:
        lower = _slice(rows, k, mask, bits, 0, 4) | _slice(rows, k, mask, bits, 4, 2)
        code = lower | _slice(rows, k, mask, bits, 6, 1)
    else:
        code = _slice(rows, k, mask, bits, 0, bits)
    return code


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, which works on CPU tensors (``TRITON_INTERPRET=1``)."""
    return not isinstance(unpack, triton.JITFunction)


def tuned(*keys: str) -> Any:
    """`triton.autotune` over a few block shapes, by ``bucket`` (rows, rounded up to a power of two) and ``keys``."""
    configs = [triton.Config({"block_m": m, "block_n": n}, num_warps=w, num_stages=s) for m, n, w, s in _SHAPES]
    if interpreted():
        configs = configs[:1]
    return triton.autotune(configs, key=["bucket", *keys], prune_configs_by={"early_config_prune": _fitting})


def _fitting(configs: list[triton.Config], named: dict[str, Any], **_: Any) -> list[triton.Config]:
    return [config for config in configs if config.kwargs["block_m"] <= max(16, named["bucket"])]


def run_length(size: int, most: int) -> int:
    """Inputs of a block: the largest power of two that divides a group of ``size``, at most ``most``."""
    return min(size & -size, most)


def launch(kernel: Any, m: int, n: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over ``m`` rows and ``n`` outputs; multiply-adds are not fused, they would round once."""
    bucket = triton.next_power_of_2(m)
    grid = lambda meta: (triton.cdiv(m, meta["block_m"]), triton.cdiv(n, meta["block_n"]))  # noqa: E731
    kernel[grid](*arguments, m, n, bucket, **constants, enable_fp_fusion=False)
