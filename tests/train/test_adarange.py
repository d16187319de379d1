"""Adaptive ranges: which range is tracked, when it is learned, when it is tracked again, and that all of it resumes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from bitwright.flow.checkpoint import load, save
from bitwright.nn import adarange
from bitwright.nn.adarange import DWELL, EVERY, PATIENCE, decided_range, most_clipped
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.numerics.affine import choose_qparams
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan
from bitwright.train.adarange import adaptive, step
from bitwright.train.loop import train
from bitwright.train.schedule import Phase, Schedule
from nets import calibrated, one_thread  # noqa: F401

SIZE = 2048


def batch(kind: str, random: torch.Generator, size: int = SIZE) -> Tensor:
    """One batch of a distribution."""
    uniform = torch.rand(size, generator=random)
    if kind == "uniform":
        return 2 * uniform - 1
    if kind == "Gaussian":
        return torch.randn(size, generator=random)
    if kind == "Laplace":
        return (0.5 - uniform).sign() * torch.log1p(-2 * (uniform - 0.5).abs().clamp(max=0.49999))
    normal, square = torch.randn(size, generator=random), torch.randn(3, size, generator=random).square().mean(0)
    return normal / square.sqrt()  # Student's t with 3 degrees of freedom


def started(kind: str, spec: str, random: torch.Generator) -> Quantizer:
    """A quantizer in training mode, calibrated on one batch."""
    made, x = Quantizer("fc.input", QuantSpec.parse(spec), None, "minmax", "adarange"), batch(kind, random)
    made.set_qparams(choose_qparams(x.min().view(1), x.max().view(1), made.spec))
    made.stage = Stage.SIMULATE
    return made.train()


def switches(kind: str, spec: str, steps: int, size: Callable[[int], float] = lambda step: 1.0) -> list[int]:
    """The steps at which the mode of a quantizer of a simulated stream changed; the first change is to LEARN."""
    random, found = torch.Generator().manual_seed(3), []
    made = started(kind, spec, random)
    [(_, tracker)] = adaptive(made)
    for number in range(1, steps + 1):
        was, before = tracker.learning, made.qparams
        made.track(batch(kind, random) * size(number))
        step(made)
        assert made.scale.requires_grad is tracker.learning
        if tracker.learning is not was:
            found.append(number)
        if tracker.learning:  # a learned range is moved by the optimizer alone, from the tracked one on
            assert was or torch.equal(made.qparams.scale, _published(made))
            assert not was or torch.equal(made.qparams.scale, before.scale)
        elif was:  # a switch back moves nothing either
            assert torch.equal(made.qparams.scale, before.scale)
    return found


def _published(made: Quantizer) -> Tensor:
    [(_, tracker)] = adaptive(made)
    return choose_qparams(tracker.decided[:1], tracker.decided[1:], made.spec).scale


def is_wide(kind: str, spec: str) -> bool:
    random = torch.Generator().manual_seed(7)
    parsed, values = QuantSpec.parse(spec), batch(kind, random, EVERY * adarange.KEPT)
    ends = torch.stack(batch(kind, random).aminmax())
    chosen = decided_range(values, ends, parsed)
    wide = choose_qparams(ends[:1], ends[1:], parsed)
    return torch.allclose(choose_qparams(chosen[:1], chosen[1:], parsed).scale, wide.scale, rtol=1e-6)


@pytest.mark.parametrize("spec", ["uint2/asym", "uint4/asym", "uint8/asym", "int8"])
def test_uniform_data_keep_the_wide_range(spec: str) -> None:
    assert is_wide("uniform", spec)


@pytest.mark.parametrize("kind", ["Gaussian", "Laplace"])
def test_bell_shaped_data_get_the_tight_range_at_few_bits(kind: str) -> None:
    found = {spec: is_wide(kind, spec) for spec in ("int2", "int4", "uint2/asym", "uint4/asym", "uint8/asym")}
    assert found == {spec: "8" in spec for spec in found}


def test_the_tight_range_is_the_known_optimum() -> None:
    random = torch.Generator().manual_seed(8)
    values = batch("Gaussian", random, EVERY * adarange.KEPT)
    low, high = decided_range(values, torch.tensor([-3.5, 3.5]), QuantSpec.parse("int4"))
    assert high.item() == pytest.approx(2.4, abs=0.15)  # step 0.335 (Max 1960) times 7
    assert low == -high


@pytest.mark.parametrize(
    ("kind", "spec"),
    [("uniform", "uint4/asym"), ("Gaussian", "uint8/asym"), ("Gaussian", "int4"), ("Laplace", "uint2/asym")],
)
def test_a_stationary_stream_is_learned_once_and_for_all(kind: str, spec: str) -> None:
    [only] = switches(kind, spec, 500)
    assert PATIENCE * EVERY <= only <= 350


def test_a_heavy_tailed_stream_is_learned_at_most_once() -> None:
    assert len(switches("Student", "int4", 600)) <= 1


@pytest.mark.parametrize(("kind", "spec"), [("Gaussian", "int4"), ("uniform", "uint8/asym")])
def test_a_jump_of_the_scale_is_tracked_and_then_learned_again(kind: str, spec: str) -> None:
    first, away, back = switches(kind, spec, 1000, lambda number: 4.0 if number > 500 else 1.0)
    assert first < 500
    assert away == 500 + PATIENCE * EVERY
    assert away + DWELL <= back <= 1000


@pytest.mark.parametrize("spec", ["int4", "uint8/asym"])
def test_a_scale_that_alternates_is_never_learned(spec: str) -> None:
    assert switches("Gaussian", spec, 600, lambda number: 4.0 if number // 100 % 2 else 1.0) == []


def test_modes_last_at_least_the_dwell_whatever_the_stream_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["bitwright.train.adarange"], "PATIENCE", 1)  # every check could switch
    found = switches("uniform", "uint4/asym", 800, lambda number: 9.0 if number // 150 % 2 else 1.0)
    assert len(found) >= 3
    assert all(later - earlier >= DWELL for earlier, later in pairwise(found))


def test_ranges_are_learned_only_where_the_phase_allows_it() -> None:
    random = torch.Generator().manual_seed(3)
    made = started("Gaussian", "int4", random)
    [(_, tracker)] = adaptive(made)
    for _ in range(6 * EVERY):
        made.track(batch("Gaussian", random))
        step(made, learn=False)
    assert not tracker.learning
    for _ in range(EVERY):
        made.track(batch("Gaussian", random))
        step(made)
    assert tracker.learning


def test_a_frozen_range_neither_moves_nor_counts_nor_learns() -> None:
    random = torch.Generator().manual_seed(3)
    made = started("Gaussian", "uint4/asym", random)
    for number in range(5 * EVERY):
        made.freeze_range = number >= 4 * EVERY
        if number == 4 * EVERY:
            before = {name: value.clone() for name, value in made.state_dict().items()}
        made.track(batch("Gaussian", random) * (5.0 if made.freeze_range else 1.0))
        step(made)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    assert not made.scale.requires_grad
    assert not made.offset.requires_grad


def test_in_eval_mode_a_quantizer_is_a_pure_function() -> None:
    random = torch.Generator().manual_seed(3)
    made = started("Gaussian", "uint4/asym", random).eval()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    x = batch("Gaussian", random).view(8, -1)
    first = made.simulate(x)
    for _ in range(3):
        assert torch.equal(made.simulate(x), first)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_the_share_that_may_be_clipped_falls_with_the_bits() -> None:
    shares = [most_clipped(bits) for bits in range(2, 9)]
    assert shares == sorted(shares, reverse=True)


def ready() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(32, 6)
    plan = Plan.preset("w8a8", net, x, sites={"*.weight": "int8/channel", "*.input": "uint4/asym"})
    plan.ranges["input"] = "adarange"
    return net, calibrated(net, plan, [x]), x


def run(model: nn.Module, steps: range, seed: int = 0) -> nn.Module:
    for number in steps:
        random = torch.Generator().manual_seed(1000 * seed + number)
        model.train()
        step(model)
        x = torch.randn(32, 6, generator=random) * (3.0 if number > 260 else 1.0)
        model.zero_grad()
        model(x).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad)
    return model


def test_a_saved_run_resumes_exactly(tmp_path: Path) -> None:
    net, model, _ = ready()
    run(model, range(170))
    assert any(tracker.learning for _, tracker in adaptive(model))
    save(model, tmp_path / "run")
    resumed = load(tmp_path / "run", copy.deepcopy(net))
    for later in (model, resumed):
        run(later, range(170, 330))
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_only_learned_ranges_move_with_the_optimizer() -> None:
    _, model, _ = ready()
    schedule = Schedule(steps=10, shares=(0.0, 1.0, 0.0))
    optimizer = schedule.optimizer(model)
    model.train()
    assert schedule.apply(model, 0, optimizer) is Phase.JOINT
    step(model, learn=True)
    [(first, one), (second, other)] = adaptive(model)
    other.counters[0] = 1
    step(model, learn=True)
    before = first.scale.clone(), second.scale.clone()
    (model(torch.randn(32, 6)) * 100).square().mean().backward()
    assert first.scale.grad is None
    optimizer.step()
    assert torch.equal(first.scale, before[0])
    assert not torch.equal(second.scale, before[1])
    assert not one.learning


def _follow(rank: int, folder: str) -> None:
    wait = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=wait)
    model = run(ready()[1], range(160), seed=rank)
    state = {name: value for name, value in model.state_dict().items() if "input_quantizer" in name}
    torch.save(state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_other_data_decide_alike(tmp_path: Path) -> None:
    mp.spawn(_follow, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert not torch.equal(one["0.input_quantizer.tracker.samples"], other["0.input_quantizer.tracker.samples"])
    for part in ("ends", "decided", "counters", "rows"):
        assert torch.equal(one[f"0.input_quantizer.tracker.{part}"], other[f"0.input_quantizer.tracker.{part}"])
    assert int(one["0.input_quantizer.tracker.counters"][2]) == 160


def test_the_loop_lets_adaptive_ranges_learn_in_the_joint_phase_only() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(64, 8)
    prepared = calibrated(model, Plan.preset("w8a8", model, x, ranges={"input": "adarange"}), [x])
    seen: list[tuple[int, bool]] = []
    trackers = [tracker for _, tracker in adaptive(prepared)]

    def note(step: int, _: float) -> None:
        seen.append((step, any(tracker.learning for tracker in trackers)))

    steps = 400
    train(prepared, lambda m, b: m(b).square().mean(), [x], schedule=Schedule(steps=steps, lr=1e-3), on_step=note)
    learned = [step for step, learning in seen if learning]
    assert learned
    assert learned[0] >= steps // 4  # not in the warm-up
