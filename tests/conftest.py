"""Fixtures of all tests: one torch thread, one seed, and the development data where it exists."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Tensors in tests are small: a second thread would mostly wait, and the machine may be shared.
torch.set_num_threads(1)

# A shell starts background jobs with interrupts ignored, and what ignores them when Python starts stays ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Time limits per example only measure how busy the machine is.
settings.register_profile("bitwright", deadline=None)
settings.load_profile("bitwright")

_ROOT = Path(__file__).resolve().parents[1]


# Files whose tests wait for compilers come first, so that no core waits for them at the end.
_COMPILING = ("test_self_test.py", "test_torch_ops.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _COMPILING)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = _ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the development data in {folder}, which is absent")
    return folder
