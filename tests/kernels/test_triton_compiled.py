"""The GPU kernels as Triton compiles them, which needs no GPU: every product and sum rounds on its own.

What the interpreter proves of the source (`test_triton_rows`) holds on a GPU if the compiler fuses no multiply with an
add and divides exactly. Here that is read from the PTX of two generations of NVIDIA GPUs.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402  # pyright: ignore
from triton.compiler import ASTSource  # noqa: E402  # pyright: ignore

from bitwright.kernels.triton_decoded import decoded_linear  # noqa: E402
from bitwright.kernels.triton_integer import encode_rows, integer_linear  # noqa: E402

AMPERE, HOPPER = 80, 90
POINTERS = {"codes": "i8", "shifts": "i32", "sums": "i32", "weight": "u8"}
SIZES = {"k", "row_bytes", "m", "n", "bucket", "per_row"}
BLOCKS = {"block_m": 64, "block_n": 64}
INTEGERS = {"bits": 4, "lowest": -8, "size": 128, "grouped": True, "block_k": 128, **BLOCKS}
LIVE = {"scale": None, "zero_point": None}
CODES = {"qmin": 0, "qmax": 255, "symmetric": False, "offset": 128, "block": 1024}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def ptx(kernel: Any, constants: dict[str, Any], x: str, y: str, arch: int) -> str:
    """PTX of a kernel for these types of x and y; constants are also the pointers that are None."""
    function = getattr(kernel, "fn", kernel) if not isinstance(kernel, triton.JITFunction) else kernel
    types = {**POINTERS, "x": x, "y": y}
    signature = {
        name: "constexpr" if name in constants else "i32" if name in SIZES else f"*{types.get(name, 'fp32')}"
        for name in function.arg_names
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]


def inexact(text: str) -> list[str]:
    """Instructions that round once where the definition rounds twice, or approximate."""
    return re.findall(r"\b(?:fma|mad|div|rcp|mul|add|sub)\.(?!rn\.)[a-z.]*f32\b|\bfma\.rn\.f32\b", text)


def test_what_would_round_otherwise_is_found() -> None:
    lines = ("fma.rn.f32", "div.full.f32", "rcp.approx.ftz.f32", "mad.f32", "mul.f32", "mul.ftz.f32")
    assert all(inexact(f"\t{line} \t%f1, %f2, %f3;") for line in lines)
    assert not inexact("div.rn.f32 mul.rn.f32 add.rn.f32 sub.rn.f32 mad.lo.s32 cvt.rn.f32.s32")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [AMPERE, HOPPER])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_integer_epilogue_rounds_as_defined(grouped: bool, arch: int) -> None:
    text = ptx(integer_linear, {**INTEGERS, "grouped": grouped, "size": 128 if grouped else 4096}, "i8", "fp32", arch)
    assert not inexact(text)
    assert re.search(r"mma\S*\.s32\.s8\.s8", text)  # tensor cores
    assert "mul.rn.f32" in text
    assert "add.rn.f32" in text


@pytest.mark.slow
@pytest.mark.parametrize("arch", [AMPERE, HOPPER])
@pytest.mark.parametrize("missing", [{}, LIVE, {**LIVE, "symmetric": True}])
def test_activations_are_divided_by_their_scale(missing: dict[str, Any], arch: int) -> None:
    text = ptx(encode_rows, {**CODES, **missing}, "fp32", "fp32", arch)
    assert not inexact(text)
    assert "div.rn.f32" in text
    assert "st.global.b8" in text or re.search(r"st\.global\.\S*b(8|16|32)", text)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [AMPERE, HOPPER])
@pytest.mark.parametrize("x", ["fp16", "bf16", "fp32"])
def test_float_activations_are_multiplied_in_their_type(x: str, arch: int) -> None:
    import triton.language as tl

    types = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}
    constants = {"bits": 4, "kind": "integer", "lowest": -8, "levels": 0, "per_row": False, "size": 128, "block_k": 32}
    constants |= {"dot_type": types[x], "zeros": None, "table": None, "bias": None, **BLOCKS}
    instruction = {"fp16": r"mma\S*\.f16", "bf16": r"mma\S*\.bf16", "fp32": r"\bfma\.rn\.f32"}[x]
    assert re.search(instruction, ptx(decoded_linear, constants, x, x, arch))
