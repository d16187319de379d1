"""The test program of the native kernels: sanitized here, emulated where the tools are: 64-bit Arm, AVX-512 VNNI."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def made(target: str) -> str:
    """What ``make`` prints for a target that has to succeed."""
    done = subprocess.run(["make", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ("make", "g++"))), reason="needs make and g++")
def test_sanitizers_find_nothing() -> None:
    out = made("sanitize")
    assert "conv2d: 200 cases equal" in out
    assert "refusals: as stated" in out


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(shutil.which, ("make", "aarch64-linux-gnu-g++", "qemu-aarch64"))),
    reason="needs make, g++-aarch64-linux-gnu and qemu-user",
)
def test_arm_computes_the_same() -> None:
    out = made("arm")
    assert "instruction sets: portable neon_dotprod neon_i8mm\n" in out
    assert "instruction sets: portable\n" in out  # a CPU without dot products
    assert out.count("refusals: as stated") == 2


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(shutil.which, ("make", "g++", "bochs-bin", "xorriso", "cpio"))) or os.geteuid() != 0,
    reason="needs what tools/avx512.sh names, and root for a device file",
)
def test_avx512_computes_the_same() -> None:
    out = made("avx512")
    assert "instruction sets: portable avx2 avx512_vnni" in out
    assert "refusals: as stated" in out
