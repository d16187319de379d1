"""What a device offers to the kernel table."""

from __future__ import annotations

import pytest
import torch

from bitwright.kernels.cpu import cpu_features
from bitwright.kernels.device import device_features


def test_a_cpu_offers_its_own_and_other_devices_nothing() -> None:
    assert device_features(torch.device("cpu")) == cpu_features()
    assert device_features("meta") == device_features("mps") == frozenset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_offers_triton_and_nothing_of_the_cpu() -> None:
    assert device_features("cuda") == {"cuda", "triton"}
