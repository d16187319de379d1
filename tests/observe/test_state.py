"""Observers stop and continue: their state is a dict of tensors that survives a file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitwright.errors import CalibrationError
from bitwright.numerics.spec import QuantSpec
from bitwright.observe.observer import OBSERVERS, make_observer

TEXTS = ["minmax", "ema:0.5", "percentile:99.9", "mse", "mse:low=-0.2", "kl", "fixed:-9,9"]


def test_every_observer_is_tried():
    assert {text.partition(":")[0] for text in TEXTS} == set(OBSERVERS)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("spec", ["uint8/asym", "int4"])
def test_an_observer_that_was_stored_half_way_ends_like_one_that_ran_through(text, spec, tmp_path):
    batches = [(torch.randn(500) * size).clamp(min=-0.2) for size in (0.1, 1.0, 0.5, 1.9)]
    whole, first = make_observer(text), make_observer(text)
    for batch in batches:
        whole.update(batch)
    for batch in batches[:2]:
        first.update(batch)
    save_file(first.state(), tmp_path / "state.safetensors")
    second = make_observer(text)
    second.load_state(load_file(tmp_path / "state.safetensors"))
    first.update(torch.full((3,), 8.0))  # the stored state is a copy
    for batch in batches[2:]:
        second.update(batch)
    found, wanted = (observer.qparams(QuantSpec.parse(spec)) for observer in (second, whole))
    assert torch.equal(found.scale, wanted.scale)
    if wanted.zero_point is not None:
        assert torch.equal(found.zero_point, wanted.zero_point)


@pytest.mark.parametrize("text", TEXTS)
def test_the_state_of_an_observer_that_saw_nothing_is_that_it_saw_nothing(text):
    second = make_observer(text)
    second.load_state(make_observer(text).state())
    with pytest.raises(CalibrationError, match="saw no values"):
        second.qparams(QuantSpec.parse("int8"))
    second.update(torch.ones(4))
    assert second.qparams(QuantSpec.parse("int8")).scale.shape == (1,)
