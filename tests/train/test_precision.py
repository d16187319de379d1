"""Bits that change during training keep every range, and end where the plan says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitwright.errors import TrainingError
from bitwright.nn.quantizer import Quantizer
from bitwright.plan.plan import Plan
from bitwright.train.loop import train
from bitwright.train.precision import Cyclic, Precision, Progressive, own_bits, set_bits, set_own_bits
from bitwright.train.schedule import Schedule
from models import Mlp
from nets import calibrated, one_thread, unequal_kernels  # noqa: F401


def ready() -> tuple[nn.Module, torch.Tensor]:
    net, x = Mlp(), torch.randn(16, 16)
    rules = {"0.weight": "int4/channel", "0.input": "int8", "2.weight": "ternary/channel", "2.input": "uint4/asym"}
    return calibrated(net, Plan.preset("w8a8", net, x, sites=rules), [x]), x


def formats(model: nn.Module) -> dict[str, str]:
    return {q.site: str(q.spec.format) for q in model.modules() if isinstance(q, Quantizer)}


def ends(model: nn.Module) -> dict[str, tuple[torch.Tensor, ...]]:
    """Largest value (symmetric), or smallest and largest, of every quantizer."""
    found = {}
    for q in model.modules():
        if isinstance(q, Quantizer):
            p, fmt = q.qparams, q.spec.format
            assert p is not None
            high = (fmt.qmax - (0 if p.zero_point is None else p.zero_point)) * p.scale
            found[q.site] = (high,) if p.zero_point is None else ((fmt.qmin - p.zero_point) * p.scale, high, p.scale)
    return found


def test_progressive_bits_change_where_they_should() -> None:
    model, _ = ready()
    rule, seen = Progressive((8, 6, 5), until=0.75), []
    own = formats(model)
    for step in range(40):
        set_bits(model, rule, step, 40)
        seen.append(formats(model))
    assert own == {"0.weight": "int4", "0.input": "int8", "2.weight": "ternary", "2.input": "uint4"}
    for name, expected in {"0.weight": "int8 int6 int5 int4", "2.input": "uint8 uint6 uint5 uint4"}.items():
        assert [seen[step][name] for step in (0, 9, 10, 19, 20, 29, 30, 39)] == [
            fmt for fmt in expected.split() for _ in range(2)
        ]
    assert {formats["0.input"] for formats in seen} == {"int8"}  # never below what the plan asks for
    assert {formats["2.weight"] for formats in seen} == {"ternary"}
    assert own_bits(model)


def test_cyclic_bits_follow_the_cosine() -> None:
    rule = Cyclic(low=3, high=8, cycles=4, until=0.5)
    bits = [rule.bits_at(step, 800, own=4) for step in range(800)]
    assert set(bits[400:]) == {4}
    for start in range(0, 400, 100):
        cycle = bits[start : start + 100]
        assert cycle == sorted(cycle)
        assert (cycle[0], cycle[50], cycle[-1]) == (3, 6 if cycle[50] == 6 else 5, 8)


@pytest.mark.parametrize("bits", [(8,), (8, 6), (6, 5), (3,)])
def test_a_change_of_bits_keeps_the_represented_range(bits: tuple[int, ...]) -> None:
    model, _ = ready()
    before = ends(model)
    rule: Precision = Progressive(bits, 1.0)
    for step in range(len(bits)):
        set_bits(model, rule, step, len(bits))
        for site, values in ends(model).items():
            if len(values) == 1:
                assert torch.allclose(values[0], before[site][0], rtol=1e-6), site
            else:  # the zero point is a whole number: each end may move by half a step
                for one, other in zip(values[:2], before[site], strict=False):
                    assert ((one - other).abs() <= 0.51 * max(values[2], before[site][2])).all(), site
    set_own_bits(model)
    assert own_bits(model)


@pytest.mark.parametrize("rule", [Progressive((8, 6)), Cyclic(2, 8, cycles=3)])
def test_training_ends_at_the_plan_and_scores_only_its_bits(rule: Precision) -> None:
    model, x = ready()
    own, seen = formats(model), []

    def score(model: nn.Module) -> float:
        seen.append(formats(model))
        return float(len(seen))

    history = train(
        model,
        lambda m, b: (m(b) - 1).square().mean(),
        [x],
        schedule=Schedule(steps=20, lr=1.0, precision=rule),
        score=score,
        score_every=1,
        on_step=lambda step, _: None if step >= 10 else seen.append(own),
    )
    assert all(found == own for found in seen)
    assert [step for step, _ in history.scores if 0 < step <= 10] == []
    assert history.scores[0][0] == 0
    assert history.best_step == 20
    assert formats(model) == own
    assert unequal_kernels(model, [x]) == []


def test_an_error_on_the_way_leaves_the_bits_of_the_plan() -> None:
    model, x = ready()
    own = formats(model)

    def stop(step: int, _: float) -> None:
        assert formats(model) != own
        raise KeyError

    with pytest.raises(KeyError):
        train(model, lambda m, b: m(b).sum(), [x], schedule=Schedule(steps=9, precision=Progressive()), on_step=stop)
    assert formats(model) == own
    assert unequal_kernels(model, [x]) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Progressive((6, 8)), r"must fall from step to step, got \(6, 8\)"),
        (lambda: Progressive(()), "must fall"),
        (lambda: Progressive((8, 9)), r"whole numbers from 2 to 8, got \(8, 9\)"),
        (lambda: Progressive((8.0,)), "whole numbers"),  # type: ignore[arg-type]
        (lambda: Progressive(until=0.0), "expected 0 < until <= 1"),
        (lambda: Cyclic(4, 4), "low < high and cycles >= 1, got 4, 4, 8"),
        (lambda: Cyclic(cycles=0), "cycles >= 1"),
        (lambda: Cyclic(low=1), "from 2 to 8"),
        (lambda: Schedule(steps=4, precision=Progressive(until=0.8)), "bits must not change after the joint phase"),
    ],
)
def test_what_makes_no_sense_cannot_be_built(make: object, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        make()  # type: ignore[operator]
