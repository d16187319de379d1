import pytest
import torch
from torch import nn

from bitwright.bench.measure import measure, model_bytes
from bitwright.errors import NumericsError


def test_a_model_is_as_fast_as_itself_and_a_larger_one_slower():
    small, large = nn.Linear(64, 64), nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
    rows = {
        row.name: row
        for row in measure(
            {"small": small, "large": nn.Sequential(nn.Linear(64, 512), large)}, torch.randn(8, 64), rounds=5
        )
    }
    assert rows["small"].speed.median == 1.0
    assert rows["large"].speed.median < 1.0
    assert rows["large"].seconds > rows["small"].seconds > 0


def test_bytes_count_shared_tensors_once():
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    both = nn.Sequential(a, b)
    before = model_bytes(both)
    b.weight = a.weight
    assert (before, model_bytes(both)) == (128, 64)


def test_training_mode_is_restored():
    model = nn.Dropout().train()
    measure({"model": model}, torch.ones(3), rounds=1)
    assert model.training


def test_nothing_to_measure_is_an_error():
    with pytest.raises(NumericsError, match="at least one model"):
        measure({}, torch.ones(1))
